"""Which jobs go back into the queue, and when they give up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fsdp_qlora import checkpoint as training_checkpoint
from fsdp_qlora import requeue, run_folder
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.requeue import GIVE_UP, GO, REQUEUE

TRIES = 3


def test_names_are_those_of_training() -> None:
    assert (requeue.EXIT, requeue.CHECKPOINTS) == (run_folder.EXIT, training_checkpoint.FOLDER)
    assert [bool(requeue.CHECKPOINT.fullmatch(training_checkpoint.name_of(step))) for step in (0, 10**7)] == [
        True,
        True,
    ]
    assert not requeue.CHECKPOINT.fullmatch("step-000010.partial-abc")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine"


def note(run_dir: Path, status: str, saved_step: int | None) -> None:
    """Leave exit.json as training does."""
    run_dir.mkdir(parents=True, exist_ok=True)
    content = {"status": status, "step": saved_step or 0, "num_steps": 100, "saved_step": saved_step, "reason": "x"}
    (run_dir / "exit.json").write_text(json.dumps(content))


def checkpoint(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)


def attempt(run_dir: Path, status: str | None, saved_step: int | None = None, signalled: bool = False) -> int:
    """Begin an attempt that ends as told, None being without a word; return the answer at its end."""
    code, _ = requeue.begin(run_dir, TRIES)
    assert code == GO
    assert not (run_dir / "exit.json").exists(), "an attempt that dies must not leave the word of an earlier one"
    if status is not None:
        note(run_dir, status, saved_step)
    return requeue.end(run_dir, TRIES, signalled)[0]


def test_a_complete_run_is_done_and_stays_known_as_complete(run_dir: Path) -> None:
    assert attempt(run_dir, "completed", 100) == GO
    assert requeue.begin(run_dir, TRIES)[0] == GO
    assert (run_dir / "exit.json").exists(), "training looks there, and ends at once"
    assert requeue.end(run_dir, TRIES, signalled=False)[0] == GO


def test_preemptions_that_save_go_back_for_ever(run_dir: Path) -> None:
    for step in range(1, 10):
        assert attempt(run_dir, "preempted", step) == REQUEUE


def test_preemptions_that_save_nothing_new_give_up(run_dir: Path) -> None:
    assert attempt(run_dir, "preempted", 5) == REQUEUE
    assert [attempt(run_dir, "preempted", 5) for _ in range(TRIES)] == [REQUEUE] * (TRIES - 1) + [GIVE_UP]


def test_progress_starts_the_count_anew(run_dir: Path) -> None:
    for step in (5, 5, 5, 6, 6, 6, 7):
        assert attempt(run_dir, "preempted", step) == REQUEUE


def test_a_failed_run_stays_out(run_dir: Path) -> None:
    checkpoint(run_dir, 40)
    assert attempt(run_dir, "failed", 40) == GIVE_UP


def test_stopped_while_loading_goes_back_a_few_times(run_dir: Path) -> None:
    answers = [attempt(run_dir, None, signalled=True) for _ in range(TRIES)]
    assert answers == [REQUEUE] * (TRIES - 1) + [GIVE_UP]


def test_a_crash_goes_back_only_if_it_got_further(run_dir: Path) -> None:
    assert requeue.begin(run_dir, TRIES)[0] == GO
    checkpoint(run_dir, 10)
    assert requeue.end(run_dir, TRIES, signalled=False)[0] == REQUEUE
    assert attempt(run_dir, None) == GIVE_UP


def test_attempts_killed_with_their_machine_count_at_the_next_start(run_dir: Path) -> None:
    for _ in range(TRIES):
        assert requeue.begin(run_dir, TRIES)[0] == GO
    code, text = requeue.begin(run_dir, TRIES)
    assert code == GIVE_UP
    assert "3 attempts got no further than step 0" in text
    assert requeue.begin(run_dir, TRIES)[0] == GO, "a job submitted by hand counts anew"


def test_killed_attempts_that_saved_do_not_count(run_dir: Path) -> None:
    for step in range(1, 3 * TRIES):
        assert requeue.begin(run_dir, TRIES)[0] == GO
        checkpoint(run_dir, step)


def test_a_new_job_on_an_old_run_has_all_its_tries(run_dir: Path) -> None:
    checkpoint(run_dir, 10)
    assert attempt(run_dir, "preempted", 10) == REQUEUE


def test_a_run_whose_folder_was_deleted_counts_anew(run_dir: Path) -> None:
    for step in (90, 90, 90):
        assert attempt(run_dir, "preempted", step) == REQUEUE
    shutil.rmtree(run_dir)
    assert [attempt(run_dir, "preempted", step) for step in range(1, 6)] == [REQUEUE] * 5


def test_an_attempt_that_starts_over_progresses_from_step_0(run_dir: Path) -> None:
    checkpoint(run_dir, 90)
    for step in (10, 20, 30, 40, 50):
        assert requeue.begin(run_dir, TRIES)[0] == GO
        shutil.rmtree(run_dir)
        checkpoint(run_dir, step)
        assert requeue.end(run_dir, TRIES, signalled=False)[0] == REQUEUE, "it crashed after some progress"


def test_nothing_is_left_beside_a_complete_run(run_dir: Path) -> None:
    assert attempt(run_dir, "completed", 100) == GO
    assert list(run_dir.parent.iterdir()) == [run_dir]


def test_the_state_is_outside_the_run_folder(run_dir: Path) -> None:
    requeue.begin(run_dir, TRIES)
    assert not run_dir.exists(), "training refuses a folder with other things in it"


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["--output_dir", "runs/a"], "runs/a"),
        (["--output-dir=runs/b", "--max_steps", "3"], "runs/b"),
        (["--config", "CONFIG"], "runs/c"),
        (["--config", "CONFIG", "--output_dir", "runs/d"], "runs/d"),
        ([], "runs/default"),
    ],
)
def test_the_run_folder_is_the_one_that_training_uses(tmp_path: Path, arguments: list[str], folder: str) -> None:
    (tmp_path / "run.yaml").write_text("output_dir: runs/c\n")
    given = [str(tmp_path / "run.yaml") if argument == "CONFIG" else argument for argument in arguments]
    assert requeue.output_dir(given) == Path(folder)


def test_wrong_arguments_end_the_job_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="belongs to no setting"):
        requeue.output_dir(["stray"])
    assert requeue.main(["begin", "--lora_rnak", "8"]) == 2
    assert "did you mean --lora_rank?" in capsys.readouterr().err


def test_command_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output_dir", str(run_dir), "--max_steps", "3"]
    assert requeue.main(["--max_fruitless", "1", "begin", *arguments]) == GO
    assert requeue.main(["--max_fruitless", "1", "--signalled", "end", *arguments]) == GIVE_UP
    assert "1 attempts got no further than step 0; giving up" in capsys.readouterr().out

"""Who may write to an output folder, and what of an earlier run is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fsdp_qlora.adapters import trained_step, write_adapter
from fsdp_qlora.checkpoint import FOLDER, Manifest, Position, name_of, publish
from fsdp_qlora.config import TrainConfig, to_dict
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.run_folder import Progress, drop_later_best, keep_metrics, start_over, take, where_to_start, write_exit


def config(folder: Path, **settings: object) -> TrainConfig:
    return TrainConfig(output_dir=str(folder), **settings)  # type: ignore[arg-type]


def take_and_release(folder: Path, **settings: object) -> bool:
    lock, finished = take(config(folder, **settings))
    lock.release()
    return finished


def add_checkpoint(run: Path, step: int) -> Path:
    partial = run / FOLDER / f"{name_of(step)}.partial-x"
    partial.mkdir(parents=True)
    return publish(partial, Manifest(Position(step), 1, 1, {}, {}, {}, {}), "x")


def test_output_folder_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert not take_and_release(folder)
    assert folder.is_dir()
    assert not take_and_release(folder, resume="none"), "an empty one may be there"


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_an_earlier_result_is_not_overwritten_unasked(tmp_path: Path, resume: str) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ConfigError, match=r"is not empty; choose another, or replace its results with --overwrite"):
        take(config(tmp_path, resume=resume))
    assert not take_and_release(tmp_path, overwrite=True)
    assert (tmp_path / "adapter").exists(), "nothing is deleted before the new run trains"
    start_over(tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_what_a_run_left_before_its_first_checkpoint_does_not_stop_the_next(tmp_path: Path) -> None:
    for name in ("run.json", "metrics.jsonl", "exit.json", "exit.json.0ab1.partial"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "best.partial").mkdir()
    (tmp_path / FOLDER / "step-000004.partial-abc").mkdir(parents=True)
    assert not take_and_release(tmp_path)
    assert not (tmp_path / "exit.json").exists(), "it would be taken for this run's"
    assert not list((tmp_path / FOLDER).iterdir())
    with pytest.raises(ConfigError, match="is not empty"):
        take(config(tmp_path, resume="none"))


def test_a_run_with_checkpoints_is_taken_over(tmp_path: Path) -> None:
    add_checkpoint(tmp_path, 4)
    (tmp_path / "adapter").mkdir()
    assert not take_and_release(tmp_path)
    assert not take_and_release(tmp_path, resume=str(tmp_path / FOLDER / "step-000004"))
    with pytest.raises(ConfigError, match="is not empty"):
        take(config(tmp_path, resume="none"))


def test_a_run_from_another_folder_is_restarted_by_the_same_command(tmp_path: Path) -> None:
    run, other = tmp_path / "run", str(tmp_path / "other")
    (run / "best.partial").mkdir(parents=True)
    assert not take_and_release(run, resume=other)
    assert where_to_start(config(run, resume=other)) == other, "it was ended before its first checkpoint"
    own = add_checkpoint(run, 4)
    assert not take_and_release(run, resume=other)
    assert where_to_start(config(run, resume=other)) == "auto"
    assert where_to_start(config(run, resume=str(own))) == str(own)
    (tmp_path / "taken" / "thesis").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not empty"):
        take(config(tmp_path / "taken", resume=other))


def test_a_completed_run_is_recognised_by_its_settings(tmp_path: Path) -> None:
    add_checkpoint(tmp_path, 4)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(config(tmp_path))}))
    write_exit(tmp_path, "completed", Progress(4, 4, 4), "done")
    assert take_and_release(tmp_path)
    assert json.loads((tmp_path / "exit.json").read_text())["status"] == "completed", "it stays true"
    assert not take_and_release(tmp_path, max_steps=9)


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restarted_job_overwrites_what_was_there_and_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    def leave(**settings: object) -> None:
        (tmp_path / "run.json").write_text(json.dumps({"config": to_dict(config(tmp_path, **settings))}))

    asked = config(tmp_path, overwrite=True)
    add_checkpoint(tmp_path, 4)
    leave()
    monkeypatch.setenv(variable, "1")
    assert where_to_start(asked) == "none", "an earlier run's: the first start ended before it trained"
    leave(overwrite=True)
    assert where_to_start(asked) == "auto"
    assert not take_and_release(tmp_path, overwrite=True)
    (tmp_path / "adapter").mkdir()
    write_exit(tmp_path, "completed", Progress(4, 4, 4), "done")
    assert take_and_release(tmp_path, overwrite=True), "all is done"
    monkeypatch.setenv(variable, "0")
    assert where_to_start(asked) == "none"
    assert not take_and_release(tmp_path, overwrite=True)


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    lock, _ = take(config(tmp_path))
    again = "import sys; from fsdp_qlora.run_folder import take; from fsdp_qlora.config import TrainConfig;"
    again += "take(TrainConfig(output_dir=sys.argv[1], overwrite=True))"
    command = [sys.executable, "-c", again, str(tmp_path)]
    assert "is in use by a running process" in subprocess.run(command, capture_output=True, text=True).stderr
    lock.release()
    assert subprocess.run(command).returncode == 0


def test_links_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (FOLDER, "metrics.jsonl", "adapter"):
        run = tmp_path / f"run-{name}"
        run.mkdir()
        (run / name).symlink_to(outside)
        with pytest.raises(ConfigError, match=f"{name} is a symbolic link"):
            take(config(run, overwrite=True))


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(ConfigError, match="cannot be used"):
            take(config(folder, overwrite=True))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="not writable"):
        take(config(tmp_path))


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0 / (step + 1)}) for step in range(5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5, "lo']))
    assert [record["step"] for record in keep_metrics(tmp_path, 3)] == [0, 1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:4]


def test_the_best_adapter_of_a_step_that_is_trained_again_is_dropped(tmp_path: Path) -> None:
    assert drop_later_best(tmp_path, 0) is None
    (tmp_path / "best").mkdir()
    write_adapter(tmp_path / "best", {}, {}, step=6)
    assert drop_later_best(tmp_path, 6) is None
    assert trained_step(tmp_path / "best") == 6
    assert drop_later_best(tmp_path, 4) == 6
    assert not (tmp_path / "best").exists()


def test_the_first_exit_counts_and_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-secret-value")
    assert write_exit(tmp_path, "failed", Progress(3, 8, 2), "rank 1: planted-secret-value was refused")
    assert not write_exit(tmp_path, "failed", Progress(3, 8, 2), "rank 0: lost rank 1")
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]
    assert json.loads((tmp_path / "exit.json").read_text()) == {
        "status": "failed",
        "step": 3,
        "num_steps": 8,
        "saved_step": 2,
        "reason": "rank 1: [secret] was refused",
    }

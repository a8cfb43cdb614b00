"""A signal ends a run after a checkpoint of the step it was at; the next start goes on from there."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests.faults import trials
from tests.faults.faults import fail_at, signal_in_evaluation
from tests.faults.jobs import ended, losses, of_world, state, train


@pytest.mark.parametrize(
    ("world_size", "place", "kind"),
    [
        (1, "load", "SIGTERM"),
        (1, "evaluation", "SIGUSR1"),
        (1, "first step", "SIGINT"),
        (1, "save", "SIGTERM, forwarded again"),
        (2, "load", "SIGTERM"),
        (2, "later step", "SIGTERM"),
        (2, "save", "SIGUSR1"),
    ],
)
def test_a_signal_to_one_rank_saves_and_ends_all(
    inputs: dict[str, str], references: dict[int, Path], tmp_path: Path, world_size: int, place: str, kind: str
) -> None:
    lost, _ = trials.signalled(inputs, references[world_size], tmp_path / "run", world_size, place, kind)
    assert lost == 0


def test_a_signal_to_all_ranks(inputs: dict[str, str], tmp_path: Path) -> None:
    trials.stopped_between_steps(inputs, tmp_path / "run", 2)


def evaluations(run: Path) -> dict[int, float]:
    """Return the evaluation losses by step."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}


@pytest.mark.parametrize("num_evaluations", [0, 2])
def test_an_evaluation_ends_between_two_batches(inputs: dict[str, str], tmp_path: Path, num_evaluations: int) -> None:
    """After so many whole ones, which are those of steps 0 and 2."""
    reference, run, counts = tmp_path / "reference", tmp_path / "run", tmp_path / "counts"
    settings = {**of_world(inputs, 2), "eval_dataset": inputs["dataset"], "eval_steps": 2, "save_steps": 0}
    each = 12  # its 24 rows on two ranks
    assert train(2, {**settings, "output_dir": reference}) == [0, 0]
    fault = functools.partial(signal_in_evaluation, num_evaluations * each + 3, 1, counts)
    assert train(2, {**settings, "output_dir": run}, fault) == [0, 0], trials.printed(run)
    assert [int(counts.with_suffix(f".{rank}").read_text()) for rank in (0, 1)] == [num_evaluations * each + 3] * 2
    step = 4 if num_evaluations else 0
    assert ended(run)["status"] == "preempted"
    assert (ended(run)["step"], ended(run)["saved_step"]) == (step, step or None)
    assert evaluations(run).keys() == ({0, 2} if num_evaluations else set())
    trials.finish_and_compare({**settings, "output_dir": run}, 2, reference)
    assert evaluations(run) == evaluations(reference)
    assert evaluations(run).keys() == {0, 2, 4, 6, 8}


def test_a_second_signal_ends_at_once(inputs: dict[str, str], references: dict[int, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    # a save ends before the next one begins: at the third step, that of the first is complete
    settings = {**of_world(inputs, 1), "output_dir": run, "save_steps": 1}
    fault = functools.partial(fail_at, "later step", "SIGTERM twice", 0, tmp_path / "marker")
    assert train(1, settings, fault) == [128 + 15]
    assert not (run / "exit.json").exists()
    assert (run / "checkpoints" / "step-000001" / "manifest.json").exists()
    assert train(1, settings) == [0]
    assert state(run) == state(references[1])


def test_a_finished_run_is_left_alone(inputs: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {**of_world(inputs, 1), "output_dir": run, "max_steps": 2}
    assert train(1, settings) == [0]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train(1, settings) == [0]
    assert "completed: nothing to do" in trials.printed(run)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert train(1, {**settings, "max_steps": 4}) == [0], "more steps: it goes on"
    assert sorted(losses(run)) == [1, 2, 3, 4]

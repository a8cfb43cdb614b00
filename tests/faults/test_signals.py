"""A signal ends a run after a checkpoint of the step it was at; the next start goes on from there."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.faults.faults import fail_at
from tests.faults.jobs import ended, losses, of_world, state, train


@pytest.mark.parametrize(
    ("world_size", "place", "kind", "saved"),
    [
        (1, "load", "SIGTERM", None),
        (1, "evaluation", "SIGUSR1", 1),
        (1, "first step", "SIGINT", 1),
        (1, "save", "SIGTERM, forwarded again", None),
        (2, "load", "SIGTERM", None),
        (2, "later step", "SIGTERM", 4),
        (2, "save", "SIGUSR1", None),
    ],
)
def test_a_signal_to_one_rank_saves_and_ends_all(
    inputs: dict[str, str],
    references: dict[int, Path],
    tmp_path: Path,
    world_size: int,
    place: str,
    kind: str,
    saved: int | None,
) -> None:
    run = tmp_path / "run"
    settings = {**of_world(inputs, world_size), "output_dir": run}
    fault = functools.partial(fail_at, place, kind, world_size - 1)
    assert train(world_size, settings, fault) == [0] * world_size, run.with_suffix(".log").read_text()
    record = ended(run)
    assert record["status"] == "preempted"
    if place == "load":
        assert (record["step"], record["saved_step"]) == (0, None)
    else:
        assert record["step"] == record["saved_step"] == max(losses(run)), "no step is lost"
        assert saved is None or record["saved_step"] == saved
        assert record["num_steps"] == 8
    assert train(world_size, settings) == [0] * world_size, run.with_suffix(".log").read_text()
    assert ended(run) == {
        "status": "completed",
        "step": 8,
        "num_steps": 8,
        "saved_step": 8,
        "reason": "all steps are done",
    }
    assert losses(run) == losses(references[world_size])
    assert state(run) == state(references[world_size])


def test_a_second_signal_ends_at_once(inputs: dict[str, str], references: dict[int, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {**of_world(inputs, 1), "output_dir": run}
    assert train(1, settings, functools.partial(fail_at, "later step", "SIGTERM twice", 0)) == [128 + 15]
    assert not (run / "exit.json").exists()
    assert (run / "checkpoints" / "step-000002" / "manifest.json").exists()
    assert train(1, settings) == [0]
    assert state(run) == state(references[1])


def test_a_finished_run_is_left_alone(inputs: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {**of_world(inputs, 1), "output_dir": run, "max_steps": 2}
    assert train(1, settings) == [0]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train(1, settings) == [0]
    assert "completed: nothing to do" in run.with_suffix(".log").read_text()
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert train(1, {**settings, "max_steps": 4}) == [0], "more steps: it goes on"
    assert sorted(losses(run)) == [1, 2, 3, 4]

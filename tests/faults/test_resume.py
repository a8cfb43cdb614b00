"""Runs that are killed and started again end as if nothing had happened."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.faults.faults import kill_after_step
from tests.faults.jobs import ended, losses, of_world, state, train


@pytest.mark.parametrize(("world_size", "step"), [(1, 1), (1, 2), (1, 5), (1, 8), (2, 3), (2, 6)])
def test_a_killed_run_ends_with_the_same_bits(
    inputs: dict[str, str], references: dict[int, Path], tmp_path: Path, world_size: int, step: int
) -> None:
    run = tmp_path / "run"
    settings = {**of_world(inputs, world_size), "output_dir": run}
    assert train(world_size, settings, functools.partial(kill_after_step, step)) == [-9] * world_size
    assert max(losses(run)) == step
    assert train(world_size, settings) == [0] * world_size, run.with_suffix(".log").read_text()
    assert losses(run) == losses(references[world_size])
    assert state(run) == state(references[world_size])
    assert ended(run)["status"] == "completed"

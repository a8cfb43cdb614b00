"""Runs that are killed and started again end as if nothing had happened."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.faults.faults import kill_after_step
from tests.faults.jobs import SETTINGS, ended, losses, make_inputs, state, train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


class References(dict[int, Path]):
    """Uninterrupted runs by world size, each done when it is first asked for."""

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        super().__init__()
        self.settings, self.folder = settings, folder

    def __missing__(self, world_size: int) -> Path:
        run = self.folder / str(world_size)
        assert train(world_size, {**self.settings, "output_dir": run}) == [0] * world_size
        self[world_size] = run
        return run


def of_world(inputs: dict[str, str], world_size: int) -> dict[str, Any]:
    """Return settings with the same global batch for every world size."""
    return {**SETTINGS, **inputs, "gradient_accumulation_steps": 4 // world_size}


@pytest.fixture(scope="module")
def references(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("references")
    found = {}
    for world_size in (1, 2):
        found[world_size] = folder / str(world_size)
        settings = {**of_world(inputs, world_size), "output_dir": found[world_size]}
        assert train(world_size, settings) == [0] * world_size, found[world_size].with_suffix(".log").read_text()
    return found


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

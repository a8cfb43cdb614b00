"""Inputs of the jobs, and runs that nothing interrupts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.jobs import make_inputs, of_world, train


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model and a dataset, as settings."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def references(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Uninterrupted runs by world size."""
    folder = tmp_path_factory.mktemp("references")
    found = {}
    for world_size in (1, 2):
        found[world_size] = folder / str(world_size)
        settings = {**of_world(inputs, world_size), "output_dir": found[world_size]}
        assert train(world_size, settings) == [0] * world_size, found[world_size].with_suffix(".log").read_text()
    return found

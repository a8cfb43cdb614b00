"""One rank fails: all processes end soon and not with 0, and the first error is told once."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.faults import trials
from tests.faults.faults import nan_in_gradient
from tests.faults.jobs import ended, of_world, train


@pytest.mark.parametrize(
    ("place", "kind"),
    [("load", "kill"), ("first step", "raise"), ("later step", "exit"), ("save", "kill"), ("save", "raise")],
)
def test_a_rank_that_fails_ends_the_job(inputs: dict[str, str], tmp_path: Path, place: str, kind: str) -> None:
    victim = 0 if (place, kind) == ("save", "raise") else 1
    _, codes, _ = trials.failing_rank(inputs, tmp_path / "run", place, kind, victim)
    assert codes[victim] == {"kill": -9, "raise": 1, "exit": 0}[kind]
    if kind == "raise":
        assert "something broke" in trials.printed(tmp_path / "run")


def test_a_rank_that_dies_while_it_reads_for_another_ends_the_job(inputs: dict[str, str], tmp_path: Path) -> None:
    settings = {"sharding": "none", "loading": "broadcast"}
    _, codes, _ = trials.failing_rank(inputs, tmp_path / "run", "load", "kill", 0, **settings)
    assert codes == [-9, 1]


@pytest.mark.parametrize(("place", "victim"), [("load", 1), ("later step", 1), ("later step", 0)])
def test_a_rank_that_stands_still_is_named(inputs: dict[str, str], tmp_path: Path, place: str, victim: int) -> None:
    job, codes, _ = trials.failing_rank(inputs, tmp_path / "run", place, "pause", victim)
    assert codes[victim] is None, "it was stopped until it was killed here"
    printed = job.printed()
    assert f"no progress for {trials.TIMEOUT_S} s at step {0 if place == 'load' else 3}" in printed
    silent = (
        "rank 1 has given no sign of life for" if victim == 1 else "rank 0, which passes on the ranks' signs of life"
    )
    assert silent in printed
    if place != "load":
        assert f"rank {1 - victim} is in" in printed
        assert "called by" in printed


def test_a_rank_that_skips_a_collective_ends_the_job(inputs: dict[str, str], tmp_path: Path) -> None:
    trials.skipped_collective(inputs, tmp_path / "run", 1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_nan_on_one_rank_stops_all_and_names_the_samples(
    inputs: dict[str, str], tmp_path: Path, world_size: int
) -> None:
    run = tmp_path / "run"
    fault = functools.partial(nan_in_gradient, 3, world_size - 1)
    assert train(world_size, {**of_world(inputs, world_size), "output_dir": run}, fault) == [1] * world_size
    record = ended(run)
    assert (record["status"], record["step"], record["saved_step"]) == ("failed", 2, 2), "the last good state is kept"
    assert "step 3: loss" in record["reason"]
    assert "training examples [" in record["reason"]
    assert trials.printed(run).count("\nerror: ") == 1

"""One rank fails: all processes end soon and not with 0, and the first error is told once."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import pytest

from tests.faults.faults import fail_at
from tests.faults.jobs import Job, ended, of_world, start

TIMEOUT_S = 5


def run_with_fault(
    inputs: dict[str, str], run: Path, place: str, kind: str, victim: int
) -> tuple[Job, list[int | None]]:
    """Return the job and the exit codes of a run of two ranks, after checking what holds for every fault."""
    settings = {**of_world(inputs, 2), "output_dir": run, "timeout_s": TIMEOUT_S, "eval_split": 0.2}
    job = start(2, settings, functools.partial(fail_at, place, kind, victim))
    survivor = job.processes[1 - victim]
    survivor.join(TIMEOUT_S + 10)
    seconds = time.monotonic() - job.started
    codes = job.wait(0.5)
    assert codes[1 - victim] == 1, f"after {seconds:.0f} s: {codes}\n{job.printed()}"
    exit_record = ended(run)
    assert exit_record["status"] == "failed"
    errors = [line for line in job.printed().splitlines() if line.startswith("error: ")]
    for text in (exit_record["reason"], errors[0]):
        assert "rank" in text
        assert "step" in text
    # other lines, if any, say what the other ranks were at when the time was over
    assert all(line.startswith("error: rank ") for line in errors[1:]), job.printed()
    assert len(errors) == 1 or kind == "pause", job.printed()
    return job, codes


@pytest.mark.parametrize(
    ("place", "kind"),
    [("load", "kill"), ("first step", "raise"), ("later step", "exit"), ("later step", "kill"), ("save", "raise")],
)
def test_a_rank_that_fails_ends_the_job(inputs: dict[str, str], tmp_path: Path, place: str, kind: str) -> None:
    _, codes = run_with_fault(inputs, tmp_path / "run", place, kind, victim=1)
    assert codes[1] == {"kill": -9, "raise": 1, "exit": 0}[kind]
    if kind == "raise":
        assert "something broke" in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize(("place", "victim"), [("load", 1), ("later step", 1), ("later step", 0)])
def test_a_rank_that_stands_still_is_named(inputs: dict[str, str], tmp_path: Path, place: str, victim: int) -> None:
    job, codes = run_with_fault(inputs, tmp_path / "run", place, "pause", victim)
    assert codes[victim] is None, "it was stopped until it was killed here"
    printed = job.printed()
    assert f"no progress for {TIMEOUT_S} s at step {0 if place == 'load' else 3}" in printed
    silent = (
        r"rank 1 has given no sign of life for" if victim == 1 else "rank 0, which passes on the ranks' signs of life"
    )
    assert silent in printed
    if place != "load":
        assert f"rank {1 - victim} is in" in printed
        assert "called by" in printed

"""One trial each: a run with a fault, another start, and what must hold afterwards. AssertionError if it does not.

The tests do a few of them, scripts/reliability_report.py all.
"""

from __future__ import annotations

import functools
import re
import signal
import time
from pathlib import Path
from typing import Any

from tests.faults.faults import fail_at, kill_after_step, kill_in_save, nothing, skip_collective
from tests.faults.jobs import Job, ended, losses, of_world, start, state, train

TIMEOUT_S = 8
"""Time limit of runs with a failing rank."""


def finish_and_compare(settings: dict[str, Any], world_size: int, reference: Path) -> None:
    """Start a run again and compare all it left with an uninterrupted one, bit for bit."""
    run = Path(settings["output_dir"])
    assert train(world_size, settings) == [0] * world_size, printed(run)
    assert ended(run)["status"] == "completed"
    assert losses(run) == losses(reference)
    assert state(run) == state(reference)


def printed(run: Path) -> str:
    return run.with_suffix(".log").read_text(errors="replace")


def killed_after_step(inputs: dict[str, str], reference: Path, run: Path, world_size: int, step: int) -> None:
    """R1: kill -9 of all ranks after a step."""
    settings = {**of_world(inputs, world_size), "output_dir": run}
    assert train(world_size, settings, functools.partial(kill_after_step, step)) == [-9] * world_size, printed(run)
    assert max(losses(run)) == step
    finish_and_compare(settings, world_size, reference)


def killed_in_save(
    inputs: dict[str, str], reference: Path, run: Path, world_size: int, moment: int, victim: int = 0
) -> bool:
    """R2: kill -9 of a rank at a moment of the third save; return False if the save was over by then."""
    settings = {**of_world(inputs, world_size), "output_dir": run}
    codes = train(world_size, settings, functools.partial(kill_in_save, 3, moment, victim))
    if codes == [0] * world_size:
        return False
    assert codes[victim] == -9, printed(run)
    assert all(code in (1, -9) for code in codes), printed(run)
    complete = sorted(path.name for path in (run / "checkpoints").iterdir() if re.fullmatch(r"step-\d{6}", path.name))
    assert complete[-1] >= "step-000004", "the second save was complete"
    finish_and_compare(settings, world_size, reference)
    assert f"going on from {run / 'checkpoints' / complete[-1]}\n" in printed(run)
    return True


def resharded(inputs: dict[str, str], reference: Path, run: Path, before: int, after: int, **changes: Any) -> float:
    """R3: go on with another number of ranks; return the largest difference of a loss, relative to the uninterrupted run."""
    first = {**of_world(inputs, before), **changes, "output_dir": run}
    assert set(train(before, first, functools.partial(kill_after_step, 5))) == {-9}, printed(run)
    assert train(after, {**of_world(inputs, after), **changes, "output_dir": run}) == [0] * after, printed(run)
    found, expected = losses(run), losses(reference)
    assert found.keys() == expected.keys()
    assert targets(run) == targets(reference), "every step has the same samples"
    return max(abs(found[step] - expected[step]) / expected[step] for step in expected)


def targets(run: Path) -> list[tuple[int, int]]:
    """Return (step, target tokens) of every step."""
    found = re.findall(r'"step": (\d+), .*"target_tokens": (\d+)', (run / "metrics.jsonl").read_text())
    return [(int(step), int(number)) for step, number in found]


def failing_rank(
    inputs: dict[str, str], run: Path, place: str, kind: str, victim: int, **changes: Any
) -> tuple[Job, list[int | None], float]:
    """F1, F2: one of two ranks fails; return the job, its exit codes and the seconds from then to the end of the other."""
    settings = {**of_world(inputs, 2), "output_dir": run, "timeout_s": TIMEOUT_S, "eval_split": 0.2, **changes}
    marker = run.with_suffix(".failed")
    job = start(2, settings, functools.partial(fail_at, place, kind, victim, marker))
    job.processes[1 - victim].join(TIMEOUT_S + 60)
    seconds = time.time() - marker.stat().st_mtime
    codes = job.wait(0.5)
    assert codes[1 - victim] == 1, f"after {seconds:.0f} s: {codes}\n{job.printed()}"
    assert seconds < TIMEOUT_S + 10, job.printed()
    record = ended(run)
    assert record["status"] == "failed"
    errors = [line for line in job.printed().splitlines() if line.startswith("error: ")]
    for text in (record["reason"], errors[0]):
        assert "rank" in text
        assert "step" in text
    # other lines, if any, say what the other ranks were at when the time was over
    assert all(line.startswith("error: rank ") for line in errors[1:]), job.printed()
    assert len(errors) == 1 or kind == "pause", job.printed()
    return job, codes, seconds


def skipped_collective(inputs: dict[str, str], run: Path, victim: int) -> float:
    """F6: one of two ranks leaves out a collective of step 3; return the seconds of the run, start-up included."""
    settings = {**of_world(inputs, 2), "output_dir": run, "timeout_s": TIMEOUT_S}
    started = time.monotonic()
    assert train(2, settings, functools.partial(skip_collective, 3, victim)) == [1, 1], printed(run)
    seconds = time.monotonic() - started
    assert seconds < TIMEOUT_S + 30
    assert f"no progress for {TIMEOUT_S} s at step 2" in printed(run)
    assert "is in all_reduce, called by" in printed(run)
    assert max(losses(run)) == 2, "nothing is logged of a step of which the ranks hold different results"
    return seconds


def signalled(
    inputs: dict[str, str], reference: Path, run: Path, world_size: int, place: str, kind: str
) -> tuple[int, float]:
    """F3: a signal to the last rank; return how many steps were lost, and the seconds to the end of the run."""
    settings = {**of_world(inputs, world_size), "output_dir": run}
    marker = run.with_suffix(".failed")
    codes = train(world_size, settings, functools.partial(fail_at, place, kind, world_size - 1, marker))
    seconds = time.time() - marker.stat().st_mtime
    assert codes == [0] * world_size, printed(run)
    record = ended(run)
    assert record["status"] == "preempted"
    trained = max(losses(run), default=0) if (run / "metrics.jsonl").exists() else 0
    assert record["step"] == trained
    finish_and_compare(settings, world_size, reference)
    return trained - (record["saved_step"] or 0), seconds


def stopped_between_steps(inputs: dict[str, str], run: Path, world_size: int, number: int = signal.SIGTERM) -> float:
    """F3: a signal from outside while it trains; return the seconds to the end of the run, its checkpoint on the disk."""
    settings = {**of_world(inputs, world_size), "output_dir": run, "max_steps": 10_000, "save_steps": 0}
    job = start(world_size, settings, nothing)
    while "step 3/" not in job.printed():
        assert any(process.is_alive() for process in job.processes), job.printed()
        time.sleep(0.02)
    sent = time.monotonic()
    job.signal(number)
    codes = job.wait()
    seconds = time.monotonic() - sent
    assert codes == [0] * world_size, job.printed()
    record = ended(run)
    assert record["step"] == record["saved_step"] == max(losses(run))
    return seconds

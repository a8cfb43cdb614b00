"""A disk that is full or read-only, and secrets that must not reach it."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from tests.e2e.conftest import SECRET
from tests.faults import trials
from tests.faults.faults import disk_full, read_only, say_the_token
from tests.faults.jobs import Fault, ended, of_world, train

FULL = {f"{share:.0%} written": functools.partial(disk_full, 2, share) for share in (0, 0.1, 0.5, 0.99)}
"""The disk is full in the second save; takes the victim, then the rank."""


def check_disk(inputs: dict[str, str], reference: Path, run: Path, fault: Fault, message: str) -> None:
    """D3: the second save fails on one of two ranks."""
    settings = {**of_world(inputs, 2), "output_dir": run}
    assert train(2, settings, fault) == [1, 1], trials.printed(run)
    record = ended(run)
    assert (record["status"], record["saved_step"]) == ("failed", 2)
    assert message in record["reason"]
    assert trials.printed(run).count("\nerror: ") == 1
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"], "nothing half-written stays"
    trials.finish_and_compare(settings, 2, reference)


@pytest.mark.parametrize(("share", "victim"), [("0% written", 0), ("10% written", 1), ("99% written", 0)])
def test_a_full_disk_stops_all_ranks_and_spares_what_is_there(
    inputs: dict[str, str], references: dict[int, Path], tmp_path: Path, share: str, victim: int
) -> None:
    message = "0.000 GB are free; free space" if share == "0% written" else f"written by rank {victim} (File too large)"
    check_disk(inputs, references[2], tmp_path / "run", functools.partial(FULL[share], victim), message)


def test_a_disk_without_room_for_a_checkpoint_is_noticed_before_training(
    inputs: dict[str, str], references: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = {**of_world(inputs, 2), "output_dir": run}
    assert train(2, settings, functools.partial(disk_full, 0, 0, 0)) == [1, 1], trials.printed(run)
    record = ended(run)
    assert (record["status"], record["step"]) == ("failed", 0)
    message = r"a checkpoint and the results take 0\.\d+ GB and 0\.000 GB are free; free space, or choose another"
    assert re.search(message, record["reason"])
    trials.finish_and_compare(settings, 2, references[2])


def test_a_read_only_folder_stops_all_ranks(
    inputs: dict[str, str], references: dict[int, Path], tmp_path: Path
) -> None:
    fault = functools.partial(read_only, 4)
    check_disk(inputs, references[2], tmp_path / "run", fault, "cannot be written by rank 0 (Read-only file system)")


def test_a_secret_is_found_nowhere(inputs: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    # in a setting, in the text of an error, and in the environment of the process
    settings = {**of_world(inputs, 1), "output_dir": run, "run_name": f"with-{SECRET}", "debug": True}
    assert train(1, settings, functools.partial(say_the_token, SECRET)) == [1]
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"run.json", "exit.json", "metrics.jsonl", "manifest.json"} <= {path.name for path in files}
    assert "401 for https://user:[secret]@hub.example" in trials.printed(run)
    for text in (trials.printed(run).encode(), *(path.read_bytes() for path in files)):
        assert SECRET.encode() not in text

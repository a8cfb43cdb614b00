"""Killed and stopped runs on a GPU: bf16, compiled and offloaded, going on after a kill; two ranks of which one is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.jobs import losses, make_inputs
from tests.ranks import free_port

pytestmark = pytest.mark.gpu

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
LIMIT_S = 25


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"), hidden_size=256, intermediate_size=512)


def start(
    rank: int, world_size: int, port: int, settings: dict[str, object], fault: str | None = None
) -> subprocess.Popen[str]:
    """Start one rank of a run, with a call of a function of faults.py before it; only the run itself ends the others."""
    environment = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    program = [str(TRAIN)]
    if fault is not None:
        program = [
            "-c",
            f"from tests.faults.faults import *; {fault}; from fsdp_qlora.cli import main; main()",
            "train",
        ]
    return subprocess.Popen(
        [sys.executable, *program, *(f"--{name}={value}" for name, value in settings.items())],
        cwd=TRAIN.parent,
        env=os.environ | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def logged(run: Path) -> dict[int, float]:
    """Return the losses logged so far."""
    return losses(run) if (run / "metrics.jsonl").exists() else {}


def newest(run: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-??????")), default=0)


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_killed_run_goes_on_where_it_was(inputs: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {
        **inputs,
        "output_dir": run,
        "context_length": 256,
        "eval_split": 0,
        "gradient_accumulation_steps": 2,
        "max_steps": 60,
        "save_steps": 20,
        "lora_rank": 8,
        "lora_dropout": 0.1,
        "lr": 1e-3,
        "precision": "bf16",
        "compile": "auto",
        "cpu_offload": "all",
    }
    process = start(0, 1, free_port(), settings)
    wait_until(lambda: newest(run) and max(logged(run)) >= newest(run) + 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved, before = newest(run), logged(run)
    again = start(0, 1, free_port(), settings)
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert f"going on from {run}/checkpoints/step-{saved:06d}" in said
    after = losses(run)
    assert list(after) == list(range(1, 61))
    assert json.loads((run / "exit.json").read_text())["status"] == "completed"
    # The forward pass is the same bit for bit; FlashAttention's backward adds up in an order that changes.
    assert after[saved + 1] == before[saved + 1]
    for step in before:
        assert after[step] == pytest.approx(before[step], rel=1e-2)


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "rank 0 failed at step"), (signal.SIGSTOP, "rank 1 has given no sign of life")],
    ids=["killed", "stopped"],
)
def test_the_other_rank_ends_in_time_and_says_why(
    inputs: dict[str, str], tmp_path: Path, number: signal.Signals, reason: str
) -> None:
    """One of two ranks goes in the middle of a run; on one GPU they talk through gloo, on two through NCCL."""
    run, port = tmp_path / "run", free_port()
    settings = {**inputs, "output_dir": run, "context_length": 256, "eval_split": 0, "max_steps": 5000}
    settings |= {"compile": "off", "timeout_s": LIMIT_S, "lora_rank": 8}
    ranks = [start(rank, 2, port, settings) for rank in range(2)]
    try:
        wait_until(lambda: len(logged(run)) > 2, ranks[0])
        ranks[1].send_signal(number)
        gone_at = time.monotonic()
        said, _ = ranks[0].communicate(timeout=LIMIT_S + 60)
    finally:
        for process in ranks:
            process.kill()
    seconds = time.monotonic() - gone_at
    print(f"ended after {seconds:.1f} s with code {ranks[0].returncode}")
    assert ranks[0].returncode == 1
    assert seconds < LIMIT_S + 20
    assert reason in said, said[-2000:]


def test_a_rank_that_skips_a_collective_ends_the_run(inputs: dict[str, str], tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    settings = {**inputs, "output_dir": run, "context_length": 256, "eval_split": 0, "max_steps": 5000}
    settings |= {"compile": "off", "timeout_s": LIMIT_S, "lora_rank": 8}
    ranks = [start(rank, 2, port, settings, f"skip_collective(6, 1, {rank})") for rank in range(2)]
    try:
        wait_until(lambda: len(logged(run)) > 4, ranks[0])
        last_step_at = time.monotonic()
        said = "".join(process.communicate(timeout=LIMIT_S + 60)[0] for process in ranks)
    finally:
        for process in ranks:
            process.kill()
    seconds = time.monotonic() - last_step_at
    print(f"ended after {seconds:.1f} s:", [line for line in said.splitlines() if "error" in line])
    assert [process.returncode for process in ranks] == [1, 1], said
    assert seconds < LIMIT_S + 20
    assert "no progress for" in said
    assert max(logged(run)) == 5


def test_a_signal_to_one_of_two_ranks_saves_and_ends_both(inputs: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {**inputs, "output_dir": run, "context_length": 256, "eval_split": 0, "max_steps": 5000, "save_steps": 0}
    settings |= {"cpu_offload": "all", "timeout_s": LIMIT_S, "lora_rank": 8}
    port = free_port()
    ranks = [start(rank, 2, port, settings) for rank in range(2)]
    try:
        wait_until(lambda: len(logged(run)) > 2, ranks[0])
        ranks[1].send_signal(signal.SIGUSR1)
        sent_at = time.monotonic()
        said = [process.communicate(timeout=LIMIT_S)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    print(f"ended after {time.monotonic() - sent_at:.1f} s")
    assert [process.returncode for process in ranks] == [0, 0], said
    record = json.loads((run / "exit.json").read_text())
    assert record["status"] == "preempted"
    assert record["step"] == record["saved_step"] == newest(run) == max(losses(run)), "no step is lost"

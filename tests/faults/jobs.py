"""Whole training runs as forked processes, with a fault built into them: what they leave behind and how long they take.

A job is the command line's `train` in one process a rank, as torchrun would start it, but without torchrun: nothing kills
the other ranks when one fails, so a job that ends has ended by itself.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.conftest import rows, save_tokenizer
from tests.ranks import _forkserver, free_port
from tests.tiny import save_tiny

Fault = Callable[[int], None]
"""Called with the rank in every process before it trains; changes the program so that it fails where it should."""

SETTINGS: dict[str, Any] = {
    "context_length": 64,
    "packing": False,
    "batch_size": 1,
    "eval_split": 0,
    "max_steps": 8,
    "save_steps": 2,
    "lr": 1e-2,
    "lora_rank": 4,
    "lora_dropout": 0.1,
    "timeout_s": 60,
}


@dataclass
class Job:
    """A started job.

    Attributes:
        processes: by rank.
        log: what all ranks printed.
    """

    processes: list[Any]
    log: Path
    started: float

    def wait(self, timeout_s: float = 120) -> list[int | None]:
        """Return the exit codes by rank (negative: killed by that signal; None: still running, and killed now)."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        return codes

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def printed(self) -> str:
        """Return what all ranks printed so far."""
        return self.log.read_text(errors="replace")


def make_inputs(folder: Path, family: str = "llama", **sizes: int) -> dict[str, str]:
    """Save a tiny model (`sizes`: settings of its config) and a dataset; return them as settings."""
    base = save_tiny(family, folder / "base", **{"num_hidden_layers": 2, **sizes})
    save_tokenizer(base)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return {"model": str(base), "dataset": str(data)}


def of_world(inputs: dict[str, str], world_size: int) -> dict[str, Any]:
    """Return settings with the same global batch for every world size."""
    return {**SETTINGS, **inputs, "gradient_accumulation_steps": 4 // world_size}


def start(world_size: int, settings: dict[str, Any], fault: Fault | None = None) -> Job:
    """Start a job; settings are those of the command line."""
    output = Path(settings["output_dir"])
    log = output.with_name(f"{output.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    port = free_port()
    processes = [
        _forkserver.Process(target=_rank, args=(rank, world_size, port, settings, fault, log), daemon=True)
        for rank in range(world_size)
    ]
    started = time.monotonic()
    for process in processes:
        process.start()
    return Job(processes, log, started)


def train(world_size: int, settings: dict[str, Any], fault: Fault | None = None) -> list[int | None]:
    """Run a job to its end and return the exit codes by rank."""
    return start(world_size, settings, fault).wait()


def _rank(rank: int, world_size: int, port: int, settings: dict[str, Any], fault: Fault | None, log: Path) -> None:
    import torch

    from fsdp_qlora import cli

    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    environment = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False
    if fault is not None:
        fault(rank)
    cli.main(["train", *(f"--{name}={value}" for name, value in settings.items())])


def losses(run: Path, name: str = "loss") -> dict[int, float]:
    """Return the logged losses of a name by step; AssertionError if a step is there twice."""
    found: dict[int, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if name in record:
            assert record["step"] not in found, record
            found[record["step"]] = record[name]
    return found


def state(run: Path, step: int = 8) -> dict[str, Any]:
    """Return the hashes of all that a checkpoint holds: adapters, optimizer state and random numbers of every rank."""
    manifest: dict[str, Any] = json.loads((run / "checkpoints" / f"step-{step:06d}" / "manifest.json").read_text())
    return dict(manifest["files"])


def ended(run: Path) -> dict[str, Any]:
    """Return what exit.json says."""
    content: dict[str, Any] = json.loads((run / "exit.json").read_text())
    return content

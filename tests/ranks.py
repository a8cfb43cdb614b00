"""Run a function on N gloo ranks of this machine. Ranks are forked from a server that has imported torch once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(
    ["torch", "transformers", "bitsandbytes", "fsdp_qlora.build", "fsdp_qlora.commands.train"]
)
_spawn = multiprocessing.get_context("spawn")

_AFTERMATH_S = 2.0
"""How long to wait, after one rank raised, for what the others say: the first report is not always the cause."""


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(
    function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple[Any, ...], results: Any
) -> None:
    import torch

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 200, cuda: bool = False
) -> list[Any]:
    """Return what `function(*args)` returns on each rank, in rank order; it must be a module-level function.

    The ranks see torchrun's environment variables. Return no tensors: their memory goes with their rank.

    Args:
        timeout_s: for all ranks together.
        cuda: start fresh processes, as a forked one cannot use a GPU that its parent has touched.

    Raises:
        AssertionError: with the tracebacks of the ranks that raised, or the exit codes of those that died or hang.
    """
    context = _spawn if cuda else _forkserver
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_child, args=(function, rank, world_size, port, args, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        found = _collect(processes, results, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(world_size)]


def _collect(processes: list[Any], results: Any, deadline: float) -> dict[int, Any]:
    """Return the ranks' values; AssertionError as soon as one raised or died without a word."""
    found: dict[int, Any] = {}
    errors: dict[int, str] = {}
    while len(found) + len(errors) < len(processes) and time.monotonic() < deadline:
        silent = set(range(len(processes))) - set(found) - set(errors)
        # asked before the queue is read: a process that ended has put its result there before
        dead = {rank for rank in silent if processes[rank].exitcode is not None}
        try:
            rank, value, error = results.get(timeout=0.5)
        except Empty:
            if dead:
                deadline = min(deadline, time.monotonic())
            continue
        if error is None:
            found[rank] = value
            continue
        errors[rank] = error
        deadline = min(deadline, time.monotonic() + _AFTERMATH_S)
    if len(found) == len(processes):
        return found
    said = "\n".join(f"rank {rank} raised:\n{error}" for rank, error in sorted(errors.items()))
    silent = sorted(set(range(len(processes))) - set(found) - set(errors))
    state = ", ".join(f"rank {rank} (exit code {processes[rank].exitcode})" for rank in silent)
    raise AssertionError(f"{said}\nno result from: {state or 'none'}")

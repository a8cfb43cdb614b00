"""Run a function on N gloo ranks of this machine. Ranks are forked from a server that has imported torch once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "transformers", "bitsandbytes", "fsdp_qlora.build", "fsdp_qlora.trainer"])


def free_port() -> int:
    """Return a TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple[Any, ...], results: Any) -> None:
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


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 200) -> list[Any]:
    """Return what `function(*args)` returns on each rank, in rank order; it must be a module-level function.

    The ranks see torchrun's environment variables. AssertionError carries the traceback of the first rank that raised.
    """
    results = _context.Queue()
    port = free_port()
    processes = [
        _context.Process(target=_child, args=(function, rank, world_size, port, args, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < world_size:
            rank, value, error = results.get(timeout=timeout_s)
            if error is not None:
                raise AssertionError(f"rank {rank} of {world_size} raised:\n{error}")
            found[rank] = value
    except Empty:
        missing = sorted(set(range(world_size)) - set(found))
        raise AssertionError(f"ranks {missing} of {world_size} gave no result within {timeout_s} s") from None
    finally:
        for process in processes:
            process.join(timeout=5 if len(found) == world_size else 0.1)
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(world_size)]

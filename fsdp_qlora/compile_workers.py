"""The processes that torch.compile starts, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path


def end_compile_workers() -> None:
    """Kill torch's compile workers: a run that is over needs none, and at exit torch may wait five minutes for them.

    With torch 2.11 compiled runs on H100s hung after their last line; pytorch#162199 reports the same.
    """
    inductor = sys.modules.get("torch._inductor.async_compile")  # not imported where nothing was compiled
    for pool in getattr(inductor, "_pool_set", ()):
        process = getattr(pool, "process", None)  # the parent of the workers, who outlive it by a minute
        if process is None:
            continue
        pool.running = False  # or torch would warn that the pool has ended, and wait for it
        workers = _children(process.pid)
        process.kill()
        process.wait()
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    """Return the processes that a process has started; none where the system does not tell."""
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in thread.read_text().split()]
    return found

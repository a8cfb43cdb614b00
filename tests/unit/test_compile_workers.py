"""A run that is over ends although its compile workers do not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

HANGING = """
import os, signal
from torch._inductor.async_compile import AsyncCompile
from fsdp_qlora.compile_workers import end_compile_workers

pool = AsyncCompile.process_pool()
worker = pool.submit(os.getpid).result(60)
os.kill(pool.process.pid, signal.SIGSTOP)
print(worker, pool.process.pid, flush=True)
end_compile_workers()

"""
"""Compile workers whose parent no longer answers, for which torch's own exit waits."""


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_that_hang_are_killed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGING],
        env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    assert "unclean" not in done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    deadline = time.monotonic() + 30
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.1)

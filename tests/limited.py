"""Run a command in a process of its own that may take little more memory than it holds at rest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_PROGRAM = """
import resource, sys
from fsdp_qlora.cli import main
extra, warm_up, arguments = int(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(",")
main(warm_up)  # imports everything and fills caches that do not grow with the model
rest = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (rest + extra, rest + extra))
try:
    block = bytearray(extra + (4 << 20))  # a little is free in the heap
    sys.exit("the limit does not hold")
except MemoryError:
    main(arguments)
"""


def run_limited(warm_up: Sequence[str], arguments: Sequence[str], extra_bytes: int) -> subprocess.CompletedProcess[str]:
    """Run a command after another one of the same kind, with `extra_bytes` of memory more than the process then holds."""
    command = [sys.executable, "-c", _PROGRAM, str(extra_bytes), ",".join(warm_up), ",".join(arguments)]
    # freed memory goes back to the system, so that what the first command freed is not there for the second
    malloc = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    environment = {**os.environ, **malloc, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[1], env=environment
    )


def weights_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))

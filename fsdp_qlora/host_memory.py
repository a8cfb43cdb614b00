"""Host memory for what rests off the GPU: sized before it is taken, pinned exactly once, never rounded up.

torch's own pinned allocator rounds every allocation up to a power of two, which alone can double the need.
"""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from fsdp_qlora.errors import TrainingError

ALIGNMENT = 512
"""Allocations inside an arena begin at multiples of this many bytes."""

GIB = 2**30


def host_buffer(size_bytes: int, pinned: bool) -> Tensor:
    """Return uninitialised CPU memory, uint8 [size_bytes], that is released with the last tensor of it.

    Args:
        pinned: page-lock it, so that copies to and from the GPU run at full speed and beside the computation. It has pages
            of its own, as CUDA refuses to lock a page twice, and is unlocked before it is released.

    Raises:
        TrainingError: the system does not let this process lock so much.
    """
    if not pinned or size_bytes == 0:
        return torch.empty(size_bytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    array = np.frombuffer(pages, dtype=np.uint8)
    runtime, address = torch.cuda.cudart(), array.ctypes.data  # type: ignore[no-untyped-call]
    result = runtime.cudaHostRegister(address, size_bytes, 0)
    if int(result) != 0:
        raise TrainingError(
            f"{size_bytes / GIB:.1f} GiB of CPU memory cannot be page-locked (CUDA error {int(result)}); of what is"
            f" available ({available_host_bytes() / GIB:.1f} GiB) the system keeps that much back: offload less with"
            " --cpu_offload, or raise the limits that `ulimit -l` and the container set"
        )
    # The tensor keeps the array, and this the pages until they are unlocked.
    unlock = weakref.finalize(array, _unlock, address, pages)
    unlock.atexit = False  # the process's end releases everything, and CUDA may be gone by then
    return torch.from_numpy(array)


def _unlock(address: int, pages: mmap.mmap) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


class HostArena:
    """One run of CPU memory, handed out piece by piece.

    Args:
        size_bytes: sum of `padded` of all pieces.
        pinned: page-lock it (for copies to a GPU).
    """

    def __init__(self, size_bytes: int, pinned: bool) -> None:
        self._buffer = host_buffer(size_bytes, pinned)
        self._used = 0

    @staticmethod
    def padded(size_bytes: int) -> int:
        """Return what a piece of this size takes."""
        return -(-size_bytes // ALIGNMENT) * ALIGNMENT

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor inside the arena."""
        size = shape.numel() * dtype.itemsize
        piece = self._buffer[self._used : self._used + size]
        assert piece.numel() == size, f"arena of {self._buffer.numel()} bytes is full"
        self._used += self.padded(size)
        return piece.view(dtype).view(shape)


def available_host_bytes() -> int:
    """Return the bytes of RAM that processes can still take, as the kernel estimates it and the cgroups allow."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass  # not Linux: the number of free pages has to do
    return max(0, min([free, *(limit - used for limit, used in cgroup_limits())]))


def cgroup_limits(root: Path = Path("/")) -> list[tuple[int, int]]:
    """Return (limit, bytes used) of every cgroup above this process that limits memory.

    A batch system limits a job, not the machine, and its limit is in a cgroup of the job's own. Files in the page cache
    count as used there, but those not looked at lately are given back before anything is refused, so they are left out.

    Args:
        root: where /proc and /sys are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []  # not Linux
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # cgroup v2
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        found += [limit for folder in (inside, *inside.parents) if (limit := _cgroup_limit(top / folder, *names))]
    return found


def _cgroup_limit(folder: Path, limit: str, used: str, cache: str) -> tuple[int, int] | None:
    try:
        limit_bytes, used_bytes = (int((folder / name).read_text()) for name in (limit, used))
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None  # no limit here ('max'), or the folder is outside what a container sees
    if limit_bytes >= 2**60:
        return None  # how cgroup v1 says 'no limit'
    return limit_bytes, used_bytes - int(fields.get(cache, 0))

"""Host memory for what rests off the GPU: sized before it is taken, pinned exactly once, never rounded up.

torch's own pinned allocator rounds every allocation up to a power of two, which alone can double the need.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

ALIGNMENT = 512
"""Allocations inside an arena begin at multiples of this many bytes."""

GIB = 2**30


def pin(buffer: Tensor) -> None:
    """Page-lock the memory of a CPU tensor in place, so that copies to and from the GPU run at full speed and overlap.

    It stays pinned until the process ends.
    """
    size = buffer.numel() * buffer.itemsize
    if size == 0:
        return
    result = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0)  # type: ignore[no-untyped-call]
    if int(result) != 0:
        raise MemoryError(f"pinning {size / GIB:.1f} GiB failed (cudaHostRegister: {result})")


class HostArena:
    """One run of CPU memory, handed out piece by piece and never returned.

    Args:
        size_bytes: sum of `padded` of all pieces.
        pinned: page-lock it (for copies to a GPU).
    """

    def __init__(self, size_bytes: int, pinned: bool) -> None:
        self._buffer = torch.empty(size_bytes, dtype=torch.uint8)
        self._used = 0
        if pinned:
            pin(self._buffer)

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
    """Return the bytes of RAM that processes can still take, as the kernel estimates it and the cgroup allows."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass  # not Linux: the number of free pages has to do
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as current:
            free = min(free, int(limit.read()) - int(current.read()))
    except (OSError, ValueError):
        pass  # no cgroup, or 'max'
    return free

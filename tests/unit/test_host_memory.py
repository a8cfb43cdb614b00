"""Page-locked memory without a GPU: a stand-in for CUDA's runtime says what is locked when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fsdp_qlora import host_memory
from fsdp_qlora.errors import TrainingError


class Runtime:
    """Notes what is locked, and whether memory is still mapped when it is unlocked."""

    def __init__(self, result: int = 0) -> None:
        self.result = result
        self.locked: dict[int, int] = {}
        self.unmapped_too_early = False

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.locked[address] = size
        return self.result

    def cudaHostUnregister(self, address: int) -> None:
        del self.locked[address]
        ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        mapped = any(int(start, 16) <= address < int(end, 16) for start, end in ranges)
        self.unmapped_too_early |= not mapped


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


def test_memory_is_unlocked_with_its_last_tensor_and_before_it_is_released(runtime: Runtime) -> None:
    size = 300 << 20  # far more than the allocator would keep for later
    buffer = host_memory.host_buffer(size, pinned=True)
    assert runtime.locked == {buffer.data_ptr(): size}
    view = buffer[4096:8192].view(torch.float32)
    del buffer
    view.fill_(1.0)
    assert len(runtime.locked) == 1
    del view
    assert runtime.locked == {}
    assert not runtime.unmapped_too_early


def test_an_arena_hands_out_aligned_pieces_of_one_locked_buffer(runtime: Runtime) -> None:
    sizes = [100, 512, 700]
    arena = host_memory.HostArena(sum(host_memory.HostArena.padded(size) for size in sizes), pinned=True)
    pieces = [arena.take(torch.Size([size]), torch.uint8) for size in sizes]
    assert len(runtime.locked) == 1
    offsets = [piece.data_ptr() - pieces[0].data_ptr() for piece in pieces]
    assert offsets == [0, 512, 1024]


def test_memory_that_cannot_be_locked_is_an_error_with_a_remedy(runtime: Runtime) -> None:
    runtime.result = 2
    with pytest.raises(TrainingError, match=r"0\.5 GiB of CPU memory cannot be page-locked.*--cpu_offload"):
        host_memory.host_buffer(512 << 20, pinned=True)

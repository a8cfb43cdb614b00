"""4-bit weights that rest in CPU memory and visit the GPU one block ahead of the computation, where nothing is sharded.

With several shards FSDP's all-gather brings the blocks, on a stream of its own. Where a rank holds whole blocks, FSDP copies
on the stream that computes and hides nothing, and copies even what is on the GPU already; so there it is not given the 4-bit
weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fsdp_qlora.host_memory import HostArena


@dataclass
class _Slot:
    """A buffer on the device, the block whose weights are in it, and when they have arrived."""

    buffer: Tensor
    block: int | None = None
    arrived: torch.cuda.Event | None = None


class WeightStream:
    """Two buffers that take turns: a block computes from one while the next block's weights come into the other.

    A parameter is empty unless its block is in a buffer, so that a use without `arrive` fails instead of computing slowly
    or wrongly.

    Args:
        blocks: by index of a block, its parameters to stream; they are loaded into pinned CPU memory before the first
            `arrive`, and blocks may be added until then.
        device: where they are used; copies to a CPU device are made at once.
    """

    def __init__(self, blocks: dict[int, list[tuple[nn.Module, str]]], device: torch.device) -> None:
        self.device = device
        self._blocks = blocks
        self._order: list[int] = []
        self._resting: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
        self._slots: list[_Slot] = []
        self._stream: torch.cuda.Stream | None = None

    def arrive(self, index: int, backward: bool) -> None:
        """Have the weights of block `index` on the device for what is enqueued next, and send for the block after it.

        Args:
            backward: whether the blocks run from the last to the first.
        """
        if not self._slots:
            self._begin()
        current = self._fetch(index, keep=None)
        if current.arrived is not None:
            current.arrived.wait()
        following = self._order.index(index) + (-1 if backward else 1)
        if 0 <= following < len(self._order):
            self._fetch(self._order[following], keep=current)

    def _begin(self) -> None:
        """Note where the weights rest, and make the buffers."""
        size = 0
        self._order = sorted(self._blocks)
        for index, owners in self._blocks.items():
            parameters = [getattr(module, name) for module, name in owners]
            self._resting[index] = [(parameter, parameter.data) for parameter in parameters]
            size = max(size, sum(HostArena.padded(parameter.nbytes) for parameter in parameters))
            for parameter in parameters:
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.device)
        self._slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=self.device)) for _ in range(2)]
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def _fetch(self, index: int, keep: _Slot | None) -> _Slot:
        """Return the buffer with a block's weights, which may still be on their way; `keep` is in use."""
        for slot in self._slots:
            if slot.block == index:
                return slot
        slot = next(slot for slot in self._slots if slot is not keep)
        if slot.block is not None:
            for parameter, _ in self._resting[slot.block]:
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.device)
        slot.block = index
        if self._stream is None:
            self._copy(slot)
        else:
            self._stream.wait_stream(torch.cuda.current_stream())  # what was in the buffer may still be computed with
            with torch.cuda.stream(self._stream):
                self._copy(slot)
                slot.arrived = self._stream.record_event()
        return slot

    def _copy(self, slot: _Slot) -> None:
        assert slot.block is not None
        start = 0
        for parameter, resting in self._resting[slot.block]:
            piece = slot.buffer[start : start + resting.nbytes].view(resting.dtype)
            piece.copy_(resting, non_blocking=True)
            parameter.data = piece
            start += HostArena.padded(resting.nbytes)

"""Activation checkpointing of decoder blocks: keep a block's input, on the GPU or in pinned CPU memory, and run it again.

Written here because torch.utils.checkpoint keeps the inputs out of reach: they could not be moved to the CPU and back while
the GPU computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_qlora.host_memory import host_buffer
from fsdp_qlora.quant.experts import QuantizedExperts
from fsdp_qlora.quant.linear import LoRALinear
from fsdp_qlora.weight_stream import WeightStream

LEAVING = 2
"""Hidden states that may be on their way to the CPU while the next blocks are computed."""


class HiddenStore:
    """Keeps the inputs of checkpointed blocks between forward and backward.

    Args:
        offload: keep them in pinned CPU memory; the copies run beside the computation, and backward fetches the next
            block's input while it works on the current one. On CPU devices the inputs simply stay where they are.
    """

    def __init__(self, offload: bool) -> None:
        self.offload = offload
        self._kept: dict[int, Tensor] = {}
        self._buffers: dict[int, Tensor] = {}
        self._away: dict[int, Tensor] = {}
        self._fetched: dict[int, tuple[Tensor, torch.cuda.Event]] = {}
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._stream: torch.cuda.Stream | None = None

    def put(self, index: int, hidden: Tensor) -> None:
        """Keep the input of block `index`."""
        if not (self.offload and hidden.is_cuda):
            self._kept[index] = hidden
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        self._away[index] = self._room(index, hidden)
        with torch.cuda.stream(self._stream):
            self._away[index].copy_(hidden, non_blocking=True)
        self._let_go(hidden, self._stream.record_event())

    def _let_go(self, hidden: Tensor, copied: torch.cuda.Event) -> None:
        """Keep a tensor until it has been copied, and have the computation wait for the copies that are behind by more.

        Tensor.record_stream would let the CPU run ahead and pile up tensors that are not free yet.
        """
        self._leaving.append((hidden, copied))
        while len(self._leaving) > LEAVING:
            self._leaving.popleft()[1].wait()

    def _room(self, index: int, like: Tensor) -> Tensor:
        """Return pinned memory for a tensor, the same every time unless a larger one comes."""
        size = like.numel() * like.itemsize
        if index not in self._buffers or self._buffers[index].numel() < size:
            assert self._stream is not None
            self._stream.synchronize()  # it may still copy from or to the memory that is about to be released
            self._buffers[index] = host_buffer(size, pinned=True)
        return self._buffers[index][:size].view(like.dtype).view(like.shape)

    def get(self, index: int) -> Tensor:
        """Return the input of block `index` and let go of it; backward asks for the last block first."""
        if index in self._kept:
            return self._kept.pop(index)
        while self._leaving:
            self._leaving.popleft()[1].wait()
        self._fetch(index)
        hidden, arrived = self._fetched.pop(index)
        arrived.wait()
        following = max((other for other in self._away if other < index), default=None)
        if following is not None:
            self._fetch(following)
        return hidden

    def _fetch(self, index: int) -> None:
        if index in self._fetched:
            return
        assert self._stream is not None
        away = self._away.pop(index)
        hidden = torch.empty(away.shape, dtype=away.dtype, device="cuda")
        self._stream.wait_stream(torch.cuda.current_stream())  # the memory may have had another owner
        with torch.cuda.stream(self._stream):
            hidden.copy_(away, non_blocking=True)
            self._fetched[index] = (hidden, self._stream.record_event())


@contextmanager
def without_product(layers: Sequence[LoRALinear | QuantizedExperts]) -> Iterator[None]:
    """Have layers return unset outputs instead of their products: for a second run, of which backward needs no output."""
    for layer in layers:
        layer.skip_product = True
    try:
        yield
    finally:
        for layer in layers:
            layer.skip_product = False


class _Recompute(torch.autograd.Function):
    """Run a block without recording it; in backward run it again, recorded, and differentiate that."""

    @staticmethod
    def forward(ctx: Any, block: Block, kwargs: dict[str, Any], hidden: Tensor, anchor: Tensor) -> Tensor:
        ctx.block, ctx.kwargs = block, kwargs
        if block.repeat_random:
            ctx.rng_state = torch.get_rng_state(), torch.cuda.get_rng_state() if hidden.is_cuda else None
        assert block.store is not None
        block.store.put(block.index, hidden.detach())
        output: Tensor = block.block(hidden, **kwargs)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        block: Block = ctx.block
        assert block.store is not None
        block.arrive(backward=True)
        hidden = block.store.get(block.index).requires_grad_(ctx.needs_input_grad[2])
        devices = [hidden.device] if hidden.is_cuda else []
        with torch.random.fork_rng(devices, enabled=block.repeat_random):
            if block.repeat_random:
                cpu_state, cuda_state = ctx.rng_state
                torch.set_rng_state(cpu_state)
                if cuda_state is not None:
                    torch.cuda.set_rng_state(cuda_state)
            with torch.enable_grad(), without_product(block.last):
                output = block.block(hidden, **ctx.kwargs)
        torch.autograd.backward(output, grads[0])
        return None, None, hidden.grad, None


class Block(nn.Module):
    """A decoder block as an FSDP unit; with a store, only its input is kept and backward runs it again.

    Args:
        block: called as block(hidden, **kwargs) and returning a tensor; only `hidden` is differentiated.
        index: its place among the blocks.
        store: keeps the inputs, shared by all blocks; None to keep all activations instead.
        last: what gives the output that only enters the block's sum, so that the second run can do without; or None.
        repeat_random: repeat the same random numbers in the second run (needed with dropout).
        weights: brings the block's 4-bit weights from CPU memory where FSDP does not; or None.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        store: HiddenStore | None,
        last: LoRALinear | QuantizedExperts | None,
        repeat_random: bool,
        weights: WeightStream | None = None,
    ) -> None:
        super().__init__()
        self.block, self.index, self.store = block, index, store
        self.repeat_random, self.weights = repeat_random, weights
        self._trains = any(parameter.requires_grad for parameter in block.parameters())
        self.last = [last] if last is not None else []  # in a list: it is the block's submodule already

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """Map hidden states [batch, tokens, hidden] to the block's output of the same shape."""
        self.arrive(backward=False)
        needed = torch.is_grad_enabled() and (hidden.requires_grad or self._trains)
        if self.store is None or not needed:
            output: Tensor = self.block(hidden, **kwargs)
            return output
        # The first block's input needs no gradient; the anchor makes autograd come here all the same.
        anchor = torch.empty(0, device=hidden.device, requires_grad=True)
        output = _Recompute.apply(self, kwargs, hidden, anchor)  # type: ignore[no-untyped-call]
        return output

    def arrive(self, backward: bool) -> None:
        """Have the block's weights on the device; nothing to do where FSDP brings them."""
        if self.weights is not None:
            self.weights.arrive(self.index, backward)

    def __getattr__(self, name: str) -> Any:
        """Look up what transformers reads off a block (such as its attention type) on the block."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

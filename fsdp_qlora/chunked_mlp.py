"""A block's MLP on some of the tokens at a time, which makes room for long contexts: its tensors are the block's widest.

Where no gradient is wanted the chunks simply run one after the other. A checkpointed block runs again in backward, but the
output of its MLP is not needed then: it is left out, and each chunk runs, recorded, when its gradient arrives. So no product
is computed more often than without chunks; only the weights are dequantised for each of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_qlora.activation_checkpointing import without_product
from fsdp_qlora.quant.linear import LoRALinear

CHUNK_TOKENS = 8192
"""Fewest tokens of a chunk, so that its products keep the GPU busy and dequantising for each does not show."""


def num_chunks(tokens: int) -> int:
    """Return in how many parts the MLP works on so many tokens."""
    return max(1, tokens // CHUNK_TOKENS)


class ChunkedMLP(nn.Module):
    """Stands for a block's MLP in a block.

    Args:
        mlp: maps [..., hidden] to the same shape, every token for itself.
        last: its last layer, whose output only enters the block's sum; where it is told to skip its product, the block runs
            again for its gradients alone.
        compiled: compile what runs on a chunk.
    """

    def __init__(self, mlp: nn.Module, last: LoRALinear, compiled: bool) -> None:
        super().__init__()
        self.mlp = mlp
        self.last = [last]  # in lists: they are submodules already
        self._run = [torch.compile(mlp) if compiled else mlp]

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states [..., tokens, hidden] to the same shape."""
        keeps_activations = torch.is_grad_enabled() and not self.last[0].skip_product
        has_one_chunk = hidden.numel() // hidden.shape[-1] < 2 * CHUNK_TOKENS
        output: Tensor = self.mlp(hidden) if keeps_activations or has_one_chunk else self._in_chunks(hidden)
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _in_chunks(self, hidden: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            anchor = torch.empty(0, device=hidden.device, requires_grad=True)  # hidden may need no gradient
            output: Tensor = _RunInBackward.apply(self, hidden, anchor)  # type: ignore[no-untyped-call]
            return output
        output = torch.empty_like(hidden)
        for part, target in zip(_parts(hidden), _parts(output), strict=True):
            target.copy_(self.run(part))
        return output

    def run(self, part: Tensor) -> Tensor:
        """Map a chunk [tokens, hidden]."""
        output: Tensor = self._run[0](part)
        return output


def _parts(values: Tensor) -> tuple[Tensor, ...]:
    """Return the chunks of [..., tokens, hidden], each [tokens, hidden]."""
    rows = values.reshape(-1, values.shape[-1])
    return rows.tensor_split(num_chunks(len(rows)))


class _RunInBackward(torch.autograd.Function):
    """Return an unset output; in backward run the MLP chunk by chunk and differentiate it."""

    @staticmethod
    def forward(ctx: Any, chunked: ChunkedMLP, hidden: Tensor, anchor: Tensor) -> Tensor:
        ctx.chunked = chunked
        ctx.save_for_backward(hidden)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chunked: ChunkedMLP = ctx.chunked
        (hidden,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        gradient = torch.empty_like(hidden) if wanted else None
        targets = [] if gradient is None else _parts(gradient)
        for part, grad, target in itertools.zip_longest(_parts(hidden), _parts(grads[0]), targets):
            leaf = part.detach().requires_grad_(wanted)
            with torch.enable_grad(), without_product(chunked.last):
                output = chunked.run(leaf)
            if output.requires_grad:
                torch.autograd.backward(output, grad)
            if target is not None:
                assert leaf.grad is not None
                target.copy_(leaf.grad)
        return None, gradient, None

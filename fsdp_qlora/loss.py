"""Cross-entropy over the head, in chunks: full logits never exist and backward needs no head.

Each chunk's logits are made once, in forward, which yields its loss, the gradient of its hidden states and, where the head
is trained, its share of the head's gradient; backward only scales them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 128 << 20
"""Memory that one chunk's logits may take."""

SCALED_ROWS = 1024
"""Rows whose gradient is scaled at a time."""

IGNORE = -100
"""Label of positions that are not targets (PyTorch's own convention)."""


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the token losses; differentiable in the hidden states, and in the rows that the head was gathered from."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_VD: Tensor,
        labels_T: Tensor,
        softcap: float | None,
        rows: Tensor | None,
        reduce: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        size = _chunk_rows(head_VD)
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        needs_grad = ctx.needs_input_grad[0]
        grad_TD = torch.empty_like(hidden_TD) if needs_grad else None
        grad_VD = torch.zeros_like(head_VD, dtype=torch.float32) if needs_grad and rows is not None else None
        for start in range(0, hidden_TD.shape[0], size):
            chunk, labels = hidden_TD[start : start + size], labels_T[start : start + size]
            loss, grad = _cross_entropy(F.linear(chunk, head_VD), labels, softcap, needs_grad)
            total += loss
            if grad_TD is not None:
                grad_TD[start : start + size] = grad @ head_VD
            if grad_VD is not None:
                grad_VD += grad.t() @ chunk
        ctx.save_for_backward(*(grad for grad in (grad_TD, grad_VD) if grad is not None))
        ctx.reduce = reduce
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD, *of_head = ctx.saved_tensors
        scaled = torch.empty_like(grad_TD)
        # in float32, as rounding the factor to bf16 would change all gradients by up to 0.2 %; in runs, to save memory
        for start in range(0, grad_TD.shape[0], SCALED_ROWS):
            rows = slice(start, start + SCALED_ROWS)
            scaled[rows] = grad_TD[rows].float() * grads[0].float()
        # in place, as it is the largest tensor of a step
        of_rows = ctx.reduce(of_head[0].mul_(grads[0])) if of_head else None
        return scaled, None, None, None, of_rows, None


def _chunk_rows(head_VD: Tensor) -> int:
    return max(1, CHUNK_BYTES // (head_VD.itemsize * head_VD.shape[0]))


def _cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, softcap: float | None, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses, float32, and, if wanted, its gradient for the logits, which may be in their memory."""
    if logits_TV.is_cuda:
        from fsdp_qlora.loss_kernel import cross_entropy_

        return cross_entropy_(logits_TV, labels_T, softcap, needs_grad, IGNORE).sum(), logits_TV
    return cross_entropy_reference(logits_TV, labels_T, softcap, needs_grad)


def cross_entropy_reference(
    logits_TV: Tensor, labels_T: Tensor, softcap: float | None, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Do the same by PyTorch's own operators."""
    logits = logits_TV.float()
    capped = torch.tanh(logits / softcap) if softcap is not None else None
    scores = logits if capped is None or softcap is None else capped * softcap
    loss = F.cross_entropy(scores, labels_T, ignore_index=IGNORE, reduction="sum")
    if not needs_grad:
        return loss, logits_TV
    grad = torch.softmax(scores, dim=-1)
    targets = labels_T.clamp(min=0).unsqueeze(1)
    grad.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=grad.dtype))
    grad *= (labels_T != IGNORE).unsqueeze(1)
    if capped is not None:
        grad *= 1 - capped.square()
    return loss, grad.to(logits_TV.dtype)


def chunked_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    softcap: float | None = None,
    rows: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the sum of the cross-entropies of all targets, float32 scalar.

    Args:
        hidden: [..., D] final hidden states.
        head: [V, D] weight of the head, which gets no gradient itself.
        labels: int64 [...], the token predicted from each position; IGNORE where there is none.
        softcap: logits are replaced by softcap * tanh(logits / softcap) (Gemma 2).
        rows: what the head was gathered from, if it is trained.
        reduce: turns the gradient of the head, float32 [V, D], into that of the rows; called in backward.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss: Tensor = ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        flat, head, labels.reshape(-1), softcap, rows, reduce
    )
    return loss


@torch.no_grad()
def count_correct(hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor) -> Tensor:
    """Return how many targets are the most likely token, int64 scalar, in chunks like the loss.

    A soft cap changes no order among logits. The logits are made a second time, as only evaluation asks for this.
    """
    rows = _chunk_rows(head_VD)
    total = torch.zeros((), dtype=torch.int64, device=hidden_TD.device)
    for start in range(0, hidden_TD.shape[0], rows):
        best = F.linear(hidden_TD[start : start + rows], head_VD).argmax(dim=-1)
        total += (best == labels_T[start : start + rows]).sum()
    return total

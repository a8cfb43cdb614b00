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
        # in place, as it is the largest tensor of a step
        of_rows = ctx.reduce(of_head[0].mul_(grads[0])) if of_head else None
        return scaled_gradient(grad_TD, grads[0]), None, None, None, of_rows, None


def scaled_gradient(grad_TD: Tensor, factor: Tensor) -> Tensor:
    """Return the gradient times a scalar.

    In float32, as rounding the factor to bf16 would change all gradients by up to 0.2 %; in runs of rows, to save memory.
    """
    scaled = torch.empty_like(grad_TD)
    for start in range(0, grad_TD.shape[0], SCALED_ROWS):
        rows = slice(start, start + SCALED_ROWS)
        scaled[rows] = grad_TD[rows].float() * factor.float()
    return scaled


def _chunk_rows(head_VD: Tensor) -> int:
    return max(1, CHUNK_BYTES // (head_VD.itemsize * head_VD.shape[0]))


def _cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, softcap: float | None, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses, float32, and, if wanted, its gradient for the logits, which may be in their memory."""
    if logits_TV.is_cuda:
        from fsdp_qlora import loss_kernel

        statistics_3T = loss_kernel.row_statistics(logits_TV, labels_T, softcap, IGNORE, gradient=needs_grad)
        return losses_of(statistics_3T).sum(), logits_TV
    statistics_3T = statistics_reference(logits_TV, labels_T, softcap)
    grad_TV = gradient_reference(logits_TV, labels_T, statistics_3T, softcap) if needs_grad else logits_TV
    return losses_of(statistics_3T).sum(), grad_TV


def losses_of(statistics_3T: Tensor) -> Tensor:
    """Return the cross-entropies, float32 [T], from the statistics of whole rows."""
    largest_T, totals_T, targets_T = statistics_3T.unbind()
    return largest_T + totals_T.log() - targets_T


def row_statistics(logits_TV: Tensor, labels_T: Tensor, softcap: float | None) -> Tensor:
    """Return what a row's loss is made of, float32 [3, T]: its largest score, the sum of exp(score - largest), its target's
    score; 0, 1 and 0 where there is no target.

    Args:
        logits_TV: all columns, or some of them.
        labels_T: int64; IGNORE where there is no target, -1 where it is not among these columns (its score is 0 then).
    """
    if logits_TV.is_cuda:
        from fsdp_qlora import loss_kernel

        return loss_kernel.row_statistics(logits_TV, labels_T, softcap, IGNORE)
    return statistics_reference(logits_TV, labels_T, softcap)


def logits_gradient(logits_TV: Tensor, labels_T: Tensor, statistics_3T: Tensor, softcap: float | None) -> Tensor:
    """Return the gradient of the sum of the losses for the logits, which may be in their memory.

    Args:
        statistics_3T: of the whole rows, where the logits may be some of their columns.
    """
    if logits_TV.is_cuda:
        from fsdp_qlora import loss_kernel

        loss_kernel.logits_gradient_(logits_TV, labels_T, statistics_3T, softcap, IGNORE)
        return logits_TV
    return gradient_reference(logits_TV, labels_T, statistics_3T, softcap)


def statistics_reference(logits_TV: Tensor, labels_T: Tensor, softcap: float | None) -> Tensor:
    """Do `row_statistics` by PyTorch's own operators."""
    scores, _ = _scores(logits_TV, softcap)
    largest_T = scores.amax(dim=1)
    totals_T = torch.exp(scores - largest_T[:, None]).sum(dim=1)
    targets_T = scores.gather(1, labels_T.clamp(min=0)[:, None]).squeeze(1).masked_fill(labels_T < 0, 0)
    is_none = labels_T == IGNORE
    return torch.stack((largest_T.masked_fill(is_none, 0), totals_T.masked_fill(is_none, 1), targets_T))


def gradient_reference(logits_TV: Tensor, labels_T: Tensor, statistics_3T: Tensor, softcap: float | None) -> Tensor:
    """Do `logits_gradient` by PyTorch's own operators."""
    scores, slopes = _scores(logits_TV, softcap)
    largest_T, totals_T, _ = statistics_3T.unbind()
    grad = torch.exp(scores - largest_T[:, None]) / totals_T[:, None]
    grad.scatter_add_(1, labels_T.clamp(min=0)[:, None], -(labels_T >= 0).to(grad.dtype)[:, None])
    grad *= (labels_T != IGNORE)[:, None]
    return (grad if slopes is None else grad * slopes).to(logits_TV.dtype)


def _scores(logits_TV: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return the scores, float32, and their derivatives where these are not 1."""
    logits = logits_TV.float()
    if softcap is None:
        return logits, None
    capped = torch.tanh(logits / softcap)
    return capped * softcap, 1 - capped.square()


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

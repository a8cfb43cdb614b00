"""Cross-entropy over a head whose rows are shared out over a few ranks: hidden states travel, and the head does not.

For a chunk of everyone's targets each rank makes the logits of its own rows of the head. Of the others' it needs three
numbers a target: the largest score, the sum of exponentials, and the target's score, which one of the ranks has. The
gradients of the hidden states are sums over the ranks; those of a trained head are whole where its rows are.

Source: vocabulary-parallel cross-entropy, Megatron-LM (arXiv 1909.08053), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fsdp_qlora import loss
from fsdp_qlora.distributed import largest_of_ranks, reduce_scatter_single
from fsdp_qlora.loss import IGNORE, logits_gradient, losses_of, row_statistics, scaled_gradient
from fsdp_qlora.models.vocabulary import ShardedVocabulary, padded


@dataclass(frozen=True)
class _Chunk:
    """As many targets of each rank, one rank's after the other's, R in all.

    Attributes:
        own: this rank's targets among all of its own; fewer than the others' where it has no more.
        size: targets of each rank, of which those beyond its own are IGNORE.
        hidden_RD, labels_R: everyone's.
    """

    own: slice
    size: int
    hidden_RD: Tensor
    labels_R: Tensor


def _chunks(hidden_TD: Tensor, labels_T: Tensor, head: ShardedVocabulary) -> Iterator[_Chunk]:
    """Yield the targets of all ranks; neither a chunk's logits nor its hidden states take more than CHUNK_BYTES."""
    most = largest_of_ranks(len(labels_T))
    row_bytes = hidden_TD.itemsize * max(head.rows_per_shard, hidden_TD.shape[1])
    step = max(1, loss.CHUNK_BYTES // (row_bytes * head.num_shards))
    labels_NT = _of_all_shards(F.pad(labels_T, (0, most - len(labels_T)), value=IGNORE), head)
    for start in range(0, most, step):
        size = min(step, most - start)
        own = slice(min(start, len(labels_T)), min(start + size, len(labels_T)))
        hidden_RD = head.gather_pieces(padded(hidden_TD[own], size))
        yield _Chunk(own, size, hidden_RD, labels_NT[:, start : start + size].flatten())


def _own(values_R: Tensor, chunk: _Chunk, head: ShardedVocabulary) -> Tensor:
    """Return those of this rank's targets."""
    start = head.shard * chunk.size
    return values_R[start : start + chunk.own.stop - chunk.own.start]


def _labels_of_shard(labels_R: Tensor, head: ShardedVocabulary) -> Tensor:
    """Return the labels as numbers among this shard's rows; -1 for those of others."""
    is_here = (labels_R >= head.first) & (labels_R < head.stop)
    return torch.where(labels_R == IGNORE, IGNORE, torch.where(is_here, labels_R - head.first, -1))


def _of_all_shards(values: Tensor, head: ShardedVocabulary) -> Tensor:
    """Return everyone's values, of the same shape, beside each other [shards, ...]."""
    return head.gather_pieces(values[None])


def _of_whole_rows(statistics_3R: Tensor, head: ShardedVocabulary) -> Tensor:
    """Return the statistics of whole rows (`loss.row_statistics`) from those of this shard's columns."""
    largest_NR, totals_NR, targets_NR = _of_all_shards(statistics_3R, head).unbind(dim=1)
    largest_R = largest_NR.amax(dim=0)
    totals_R = (totals_NR * torch.exp(largest_NR - largest_R)).sum(dim=0)
    return torch.stack((largest_R, totals_R, targets_NR.sum(dim=0)))


def _chunk_loss(
    chunk: _Chunk,
    weight_VD: Tensor,
    head: ShardedVocabulary,
    softcap: float | None,
    grad_TD: Tensor | None,
    grad_VD: Tensor | None,
) -> Tensor:
    """Return the sum of this rank's losses; fill its hidden states' gradients, and add to that of its rows, if wanted.

    A function of its own, so that a chunk's logits are gone before the next one's are made.
    """
    labels = _labels_of_shard(chunk.labels_R, head)
    logits = F.linear(chunk.hidden_RD, weight_VD)
    statistics = _of_whole_rows(row_statistics(logits, labels, softcap), head)
    if grad_TD is not None:
        grad = logits_gradient(logits, labels, statistics, softcap)
        mine = torch.empty(chunk.size, grad_TD.shape[1], dtype=grad_TD.dtype, device=grad_TD.device)
        reduce_scatter_single(mine, grad @ weight_VD, head.group)
        grad_TD[chunk.own] = mine[: chunk.own.stop - chunk.own.start]
        if grad_VD is not None:
            grad_VD += grad.t() @ chunk.hidden_RD
    losses = losses_of(statistics) * (chunk.labels_R != IGNORE)
    return _own(losses, chunk, head).sum()


class _ParallelCrossEntropy(torch.autograd.Function):
    """Sum of this rank's token losses; differentiable in its hidden states, and in its rows of a trained head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        rows: Tensor | None,
        labels_T: Tensor,
        softcap: float | None,
        head: ShardedVocabulary,
    ) -> Tensor:
        weight_VD = head.computing_rows()
        total = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        needs_grad = ctx.needs_input_grad[0]
        grad_TD = torch.empty_like(hidden_TD) if needs_grad else None
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_grad and rows is not None else None
        for chunk in _chunks(hidden_TD, labels_T, head):
            total += _chunk_loss(chunk, weight_VD, head, softcap, grad_TD, grad_VD)
        ctx.save_for_backward(*(grad for grad in (grad_TD, grad_VD) if grad is not None))
        ctx.head = head
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_TD, *of_head = ctx.saved_tensors
        of_rows = ctx.head.sum_replicas(of_head[0].mul_(grads[0])) if of_head else None
        return scaled_gradient(grad_TD, grads[0]), of_rows, None, None, None


def parallel_cross_entropy(
    hidden_TD: Tensor, head: ShardedVocabulary, labels_T: Tensor, softcap: float | None = None
) -> dict[str, Tensor]:
    """Return {'loss': sum of the cross-entropies of this rank's targets}, float32 scalar; every rank must call this.

    Without gradients there is also 'correct': how many targets are the most likely token, int64 scalar.

    Args:
        hidden_TD: final hidden states of the targets.
        labels_T: int64, the tokens to predict; ranks may have different numbers of them.
        softcap: as in `loss.chunked_cross_entropy`.
    """
    rows = head.rows if head.is_trained else None
    total: Tensor = _ParallelCrossEntropy.apply(hidden_TD, rows, labels_T, softcap, head)  # type: ignore[no-untyped-call]
    if torch.is_grad_enabled():
        return {"loss": total}
    weight_VD = head.computing_rows()
    correct = torch.zeros((), dtype=torch.int64, device=hidden_TD.device)
    for chunk in _chunks(hidden_TD, labels_T, head):
        best = _best(F.linear(chunk.hidden_RD, weight_VD), head)
        correct += (_own(best, chunk, head) == labels_T[chunk.own]).sum()
    return {"loss": total, "correct": correct}


@torch.no_grad()
def most_likely(hidden_BD: Tensor, head: ShardedVocabulary) -> Tensor:
    """Return the most likely next tokens, int64 [B]; every rank must bring equally many hidden states."""
    best = _best(F.linear(head.gather_pieces(hidden_BD.contiguous()), head.computing_rows()), head)
    return best[head.shard * len(hidden_BD) : (head.shard + 1) * len(hidden_BD)]


def _best(logits_RV: Tensor, head: ShardedVocabulary) -> Tensor:
    """Return the number of the largest logit of each row over all shards, the first of several."""
    values, places = logits_RV.max(dim=1)
    # numbers of tokens are exact in float32
    bests = _of_all_shards(torch.stack((values.float(), (places + head.first).float())), head)
    shards = bests[:, 0].argmax(dim=0, keepdim=True)
    return bests[:, 1].gather(0, shards).squeeze(0).long()

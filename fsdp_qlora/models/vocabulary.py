"""Embedding and head, sharded by rows over the ranks, on the GPU or in CPU memory; frozen, or trained beside LoRA.

They are not FSDP units, because both can do without a gathered matrix: the embedding exchanges the few rows that a batch
needs, and a few ranks share out the logits (parallel_loss.py). Many ranks gather the head, but not again in backward, as the
gradients are made in forward (loss.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from fsdp_qlora.distributed import Ranks, all_gather_single, reduce_scatter_single, shard_rows

MOST_PARALLEL = 8
"""Shards up to which the logits are shared out; with more, the hidden states of all ranks (of 8,000 tokens
each) are more than the head."""


def shares_logits(num_rows: int, num_shards: int) -> bool:
    """Whether ranks with so many shards of a head share out the logits instead of gathering it; all must have rows."""
    return 1 < num_shards <= MOST_PARALLEL and (num_shards - 1) * -(-num_rows // num_shards) < num_rows


class ShardedVocabulary(nn.Module):
    """A matrix [num_rows, width], of which each shard holds an equal run of rows (the last may be shorter).

    Args:
        num_rows, width: shape of the whole matrix.
        dtype: what rows are looked up and gathered in; a frozen matrix is held in it, a trained one in float32.
        ranks: those that hold the shards, and where the computation is; `weight` may lie in CPU memory.
        trained: whether `weight` is a parameter to train: a DTensor placed as FSDP places its own.
        embed_scale: factor of looked-up rows (Gemma scales its embedding), or None.
        padding_idx: the row whose look-ups give no gradient, as in nn.Embedding; or None.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_rows: int,
        width: int,
        dtype: torch.dtype,
        ranks: Ranks,
        *,
        trained: bool = False,
        embed_scale: Tensor | None = None,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.num_rows, self.dtype, self.device, self.scale = num_rows, dtype, ranks.device, embed_scale
        self.padding_idx, self.group = padding_idx, ranks.shard_group
        self.shard, self.num_shards = ranks.shard, ranks.num_shards
        self.replicas = ranks.replicate_group if ranks.num_replicas > 1 else None
        self.rows_per_shard = -(-num_rows // self.num_shards)
        self.first, self.stop = shard_rows(num_rows, ranks.shard, ranks.num_shards)
        held = torch.float32 if trained else dtype
        weight = torch.empty(self.stop - self.first, width, dtype=held, device="meta")
        if trained:
            placements = [Shard(0)] if ranks.mesh.ndim == 1 else [Replicate(), Shard(0)]
            shape, stride = torch.Size((num_rows, width)), (width, 1)
            weight = DTensor.from_local(weight, ranks.mesh, placements, shape=shape, stride=stride)
        self.weight = nn.Parameter(weight, requires_grad=trained)

    @property
    def is_trained(self) -> bool:
        return self.weight.requires_grad

    @property
    def rows(self) -> Tensor:
        """This shard's rows; what is computed of them gives `weight` its gradient."""
        return self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight

    @property
    def is_parallel(self) -> bool:
        """Whether the ranks share out the logits."""
        return shares_logits(self.num_rows, self.num_shards)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows [..., width] of int64 ids [...] on the computing device.

        With several shards every rank must bring equally many ids: each looks up its own rows for all ranks, and the sum
        over the shards (one row and zeros, hence exact) goes back to who asked.
        """
        rows: Tensor = _LookUp.apply(self.rows, ids, self)  # type: ignore[no-untyped-call]
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)

    def look_up(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return the rows of ids, given this shard's."""
        return self._find(rows, ids) if self.num_shards == 1 else self._exchange(rows, ids)

    def _find(self, rows: Tensor, ids: Tensor) -> Tensor:
        found = nn.functional.embedding(ids.to(rows.device), rows)
        return found.to(self.device).to(self.dtype)

    def _exchange(self, rows: Tensor, ids: Tensor) -> Tensor:
        local = self.gather_pieces(ids.flatten()) - self.first
        held = (local >= 0) & (local < len(rows))
        if len(rows) > 0:
            found = self._find(rows, local.clamp(0, len(rows) - 1)) * held.unsqueeze(1)
        else:
            found = torch.zeros(local.numel(), rows.shape[1], dtype=self.dtype, device=self.device)
        mine = torch.empty(ids.numel(), found.shape[1], dtype=found.dtype, device=found.device)
        reduce_scatter_single(mine, found, self.group)
        return mine.view(*ids.shape, -1)

    def look_up_gradient(self, ids: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of this shard's rows, float32, from that of the rows [..., width] that all ranks looked up."""
        flat, grad = ids.flatten(), grad.reshape(-1, grad.shape[-1])
        if self.num_shards > 1:
            flat, grad = self.gather_pieces(flat), self.gather_pieces(grad.contiguous())
        count = self.stop - self.first
        held = (flat >= self.first) & (flat < self.stop)
        if self.padding_idx is not None:
            held &= flat != self.padding_idx
        local = torch.where(held, flat - self.first, count)
        # adds up in a fixed order, on GPUs too; the row after the last is left out
        rows = torch.ops.aten.embedding_dense_backward(grad.float(), local, count + 1, count, False)
        return self.sum_replicas(rows[:count])

    def gather(self) -> Tensor:
        """Return the whole matrix [num_rows, width] on the computing device; every rank must take part."""
        local = self.computing_rows()
        if self.num_shards == 1:
            return local
        return self.gather_pieces(padded(local, self.rows_per_shard))[: self.num_rows]

    def computing_rows(self) -> Tensor:
        """Return this shard's rows on the computing device in the dtype of the computation."""
        return self.rows.detach().to(self.device, non_blocking=True).to(self.dtype)

    def gathered_gradient(self, grad: Tensor) -> Tensor:
        """Return the gradient of this shard's rows from this rank's of the gathered matrix, float32 [num_rows, width]."""
        if self.num_shards > 1:
            mine = grad.new_empty(self.rows_per_shard, grad.shape[1])
            reduce_scatter_single(mine, padded(grad, self.num_shards * self.rows_per_shard), self.group)
            grad = mine[: self.stop - self.first]
        return self.sum_replicas(grad)

    def gather_pieces(self, piece: Tensor) -> Tensor:
        """Return the shards' equal pieces, one after the other."""
        whole = piece.new_empty(self.num_shards * piece.shape[0], *piece.shape[1:])
        all_gather_single(whole, piece, self.group)
        return whole

    def sum_replicas(self, grad: Tensor) -> Tensor:
        """Add up the gradients of all copies of this shard, and put the sum where the rows are."""
        grad = grad.contiguous()
        if self.replicas is not None:
            dist.all_reduce(grad, group=self.replicas)
        return grad.to(self.rows.device)


def padded(rows: Tensor, count: int) -> Tensor:
    """Return `count` rows, the last of them zeros where there are fewer."""
    if len(rows) == count:
        return rows
    result = rows.new_zeros(count, *rows.shape[1:])
    result[: len(rows)] = rows
    return result


class _LookUp(torch.autograd.Function):
    """ShardedVocabulary.look_up; every rank must take part in its backward too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor, vocabulary: ShardedVocabulary) -> Tensor:
        ctx.vocabulary = vocabulary
        ctx.save_for_backward(ids)
        return vocabulary.look_up(rows, ids)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        return ctx.vocabulary.look_up_gradient(ids, grads[0]), None, None


def trained_vocabularies(model: nn.Module) -> Iterator[tuple[str, ShardedVocabulary]]:
    """Yield name and module of what is trained whole, in transformers' model."""
    for name, module in model.named_modules():
        if isinstance(module, ShardedVocabulary) and module.is_trained:
            yield name, module

"""The frozen embedding and head, sharded by rows over the ranks, on the GPU or in CPU memory.

They are not FSDP units, because both can do with less than a gathered matrix: the embedding exchanges the few rows that a
batch needs, and the head needs no gather in backward, its input gradient being made in forward (loss.py).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fsdp_qlora.distributed import all_gather_single, reduce_scatter_single


class ShardedVocabulary(nn.Module):
    """A frozen matrix [num_rows, width], of which each shard holds an equal run of rows (the last may be shorter).

    Args:
        num_rows, width: shape of the whole matrix.
        shard, num_shards: which run this rank holds.
        group: the ranks that hold the others.
        device: where the computation is; `weight` may lie in CPU memory.
        scale: factor of looked-up rows (Gemma scales its embedding), or None.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_rows: int,
        width: int,
        dtype: torch.dtype,
        shard: int,
        group: dist.ProcessGroup,
        device: torch.device,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_rows, self.shard, self.group, self.device = num_rows, shard, group, device
        self.num_shards = group.size()
        self.rows_per_shard = -(-num_rows // self.num_shards)
        self.scale = scale
        local_rows = max(0, min(self.rows_per_shard, num_rows - shard * self.rows_per_shard))
        self.weight = nn.Parameter(torch.empty(local_rows, width, dtype=dtype, device="meta"), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows [..., width] of int64 ids [...] on the computing device.

        With several shards every rank must bring equally many ids: each looks up its own rows for all ranks, and the sum
        over the shards (one row and zeros, hence exact) goes back to who asked.
        """
        rows = self._lookup(ids) if self.num_shards == 1 else self._exchange(ids)
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)

    def _lookup(self, ids: Tensor) -> Tensor:
        found = nn.functional.embedding(ids.to(self.weight.device), self.weight)
        return found.to(self.device)

    def _exchange(self, ids: Tensor) -> Tensor:
        flat = ids.flatten()
        everyone = torch.empty(self.num_shards * flat.numel(), dtype=flat.dtype, device=flat.device)
        all_gather_single(everyone, flat, self.group)
        local = everyone - self.shard * self.rows_per_shard
        held = (local >= 0) & (local < self.weight.shape[0])
        if self.weight.shape[0] > 0:
            rows = self._lookup(local.clamp(0, self.weight.shape[0] - 1)) * held.unsqueeze(1)
        else:
            rows = torch.zeros(local.numel(), self.weight.shape[1], dtype=self.weight.dtype, device=self.device)
        mine = torch.empty(flat.numel(), rows.shape[1], dtype=rows.dtype, device=rows.device)
        reduce_scatter_single(mine, rows, self.group)
        return mine.view(*ids.shape, -1)

    def gather(self) -> Tensor:
        """Return the whole matrix [num_rows, width] on the computing device; every rank must take part."""
        local = self.weight.detach().to(self.device, non_blocking=True)
        if self.num_shards == 1:
            return local
        width = local.shape[1]
        padded = local
        if local.shape[0] < self.rows_per_shard:
            padded = local.new_zeros(self.rows_per_shard, width)
            padded[: local.shape[0]] = local
        whole = torch.empty(self.num_shards * self.rows_per_shard, width, dtype=local.dtype, device=self.device)
        all_gather_single(whole, padded, self.group)
        return whole[: self.num_rows]

"""One micro-batch through the model."""

from __future__ import annotations

import torch
from torch import Tensor

from fsdp_qlora import data
from fsdp_qlora.loss import IGNORE
from fsdp_qlora.parallel import LossModel


def forward(root: LossModel, batch: data.Batch, device: torch.device) -> dict[str, Tensor]:
    """Return what the model says of this rank's micro-batch: 'loss', and without gradients 'correct' (see LossModel)."""
    labels = batch.labels.flatten()
    positions = (labels != IGNORE).nonzero().flatten()
    tensors = (batch.input_ids, batch.position_ids, _padded(batch.cu_seqlens), positions, labels[positions])
    input_ids, position_ids, cu_seqlens, positions, ids = (tensor.to(device) for tensor in tensors)
    result: dict[str, Tensor] = root(input_ids, position_ids, cu_seqlens, input_ids.shape[1], positions, ids)
    return result


def _padded(cu_seqlens: Tensor) -> Tensor:
    """Return document boundaries with empty documents at the end, up to a power of two: few shapes, few compilations."""
    length = max(64, 1 << (len(cu_seqlens) - 1).bit_length())
    return torch.nn.functional.pad(cu_seqlens, (0, length - len(cu_seqlens)), value=int(cu_seqlens[-1]))

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
    documents = _padded(batch.cu_seqlens)
    by_row = device.type == "cuda" and one_document_a_row(documents, positions, batch.input_ids.shape[1])
    cu_seqlens = None if by_row else _to(documents, device)
    inputs = (_to(batch.input_ids, device), _to(batch.position_ids, device), cu_seqlens, batch.input_ids.shape[1])
    result: dict[str, Tensor] = root(*inputs, _to(positions, device), _to(labels[positions], device))
    return result


def one_document_a_row(cu_seqlens: Tensor, target_positions: Tensor, tokens: int) -> bool:
    """Whether the first document of each row has all of the row's targets.

    What follows it (padding, as a rule) may then see it: its own outputs enter no loss.

    Args:
        cu_seqlens, target_positions: see LossModel.forward.
        tokens: length of a row.
    """
    starts = target_positions // tokens * tokens
    ends = cu_seqlens[torch.searchsorted(cu_seqlens, starts, right=True)]
    return bool((target_positions < ends).all())


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; from pinned memory, as the CPU waits for the GPU before it copies from other memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _padded(cu_seqlens: Tensor) -> Tensor:
    """Return document boundaries with empty documents at the end, up to a power of two: few shapes, few compilations."""
    length = max(64, 1 << (len(cu_seqlens) - 1).bit_length())
    return torch.nn.functional.pad(cu_seqlens, (0, length - len(cu_seqlens)), value=int(cu_seqlens[-1]))

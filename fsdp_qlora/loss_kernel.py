"""One Triton kernel: what a row's cross-entropy is made of, and its gradient in place of the logits.

PyTorch's operators pass over the logits about ten times, mostly in float32; this reads them twice and writes them once.
`loss.statistics_reference` and `loss.gradient_reference` are the references the tests compare with.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS_PER_STEP = 8192


@triton.jit  # type: ignore[untyped-decorator]
def _write_gradient(  # type: ignore[no-untyped-def]
    row_ptr, label, largest, total, num_columns, softcap, SOFTCAP: tl.constexpr, STEP: tl.constexpr
):
    for start in range(0, num_columns, STEP):
        columns = start + tl.arange(0, STEP)
        inside = columns < num_columns
        scores = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        slope = 1.0
        if SOFTCAP:
            capped = 2 * tl.sigmoid(2 * scores / softcap) - 1
            scores = softcap * capped
            slope = 1 - capped * capped
        grad = (tl.exp(scores - largest) / total - tl.where(columns == label, 1.0, 0.0)) * slope
        tl.store(row_ptr + columns, grad.to(row_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    labels_ptr,
    statistics_ptr,
    num_rows,
    num_columns,
    softcap,
    IGNORE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATISTICS: tl.constexpr,
    GRADIENT: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * num_columns
    label = tl.load(labels_ptr + row)
    largest_ptr = statistics_ptr + row
    total_ptr = largest_ptr + num_rows
    target_ptr = total_ptr + num_rows
    if label == IGNORE:
        if STATISTICS:
            tl.store(largest_ptr, 0.0)
            tl.store(total_ptr, 1.0)
            tl.store(target_ptr, 0.0)
        if GRADIENT:
            for start in range(0, num_columns, STEP):
                columns = start + tl.arange(0, STEP)
                zeros = tl.zeros([STEP], dtype=logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + columns, zeros, mask=columns < num_columns)
    else:
        if STATISTICS:
            largest = tl.full([], float("-inf"), tl.float32)
            total = tl.full([], 0.0, tl.float32)  # of exp(score - largest)
            target = tl.full([], 0.0, tl.float32)
            for start in range(0, num_columns, STEP):
                columns = start + tl.arange(0, STEP)
                inside = columns < num_columns
                scores = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32)
                if SOFTCAP:
                    scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # softcap * tanh(scores / softcap)
                target += tl.sum(tl.where(columns == label, scores, 0.0))
                scores = tl.where(inside, scores, float("-inf"))
                larger = tl.maximum(largest, tl.max(scores))
                total = total * tl.exp(largest - larger) + tl.sum(tl.exp(scores - larger))
                largest = larger
            tl.store(largest_ptr, largest)
            tl.store(total_ptr, total)
            tl.store(target_ptr, target)
        else:
            largest = tl.load(largest_ptr)
            total = tl.load(total_ptr)
        if GRADIENT:
            _write_gradient(logits_ptr, label, largest, total, num_columns, softcap, SOFTCAP, STEP)


def row_statistics(
    logits_TV: Tensor, labels_T: Tensor, softcap: float | None, ignore: int, *, gradient: bool = False
) -> Tensor:
    """Do `loss.row_statistics`; with `gradient` also replace the logits by the gradient of the sum of the losses.

    Args:
        logits_TV: contiguous, on a CUDA device, any floating dtype.
        ignore: the label where there is no target.
    """
    statistics_3T = torch.empty(3, len(logits_TV), dtype=torch.float32, device=logits_TV.device)
    _launch(logits_TV, labels_T, statistics_3T, softcap, ignore, STATISTICS=True, GRADIENT=gradient)
    return statistics_3T


def logits_gradient_(
    logits_TV: Tensor, labels_T: Tensor, statistics_3T: Tensor, softcap: float | None, ignore: int
) -> None:
    """Do `loss.logits_gradient` in the memory of the logits."""
    _launch(logits_TV, labels_T, statistics_3T.contiguous(), softcap, ignore, STATISTICS=False, GRADIENT=True)


def _launch(
    logits_TV: Tensor, labels_T: Tensor, statistics_3T: Tensor, softcap: float | None, ignore: int, **passes: bool
) -> None:
    assert logits_TV.is_contiguous()
    num_rows, num_columns = logits_TV.shape
    _cross_entropy_kernel[(num_rows,)](
        logits_TV,
        labels_T.contiguous(),
        statistics_3T,
        num_rows,
        num_columns,
        softcap if softcap is not None else 1.0,
        IGNORE=ignore,
        SOFTCAP=softcap is not None,
        STEP=COLUMNS_PER_STEP,
        num_warps=16,
        **passes,
    )

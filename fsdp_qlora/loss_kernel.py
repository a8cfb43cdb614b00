"""One Triton kernel: a row's cross-entropy, and its gradient in place of the logits.

PyTorch's operators pass over the logits about ten times, mostly in float32; this reads them twice and writes them once.
`loss.cross_entropy_reference` is the reference the tests compare with.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS_PER_STEP = 8192


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    labels_ptr,
    losses_ptr,
    num_columns,
    softcap,
    IGNORE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NEEDS_GRAD: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * num_columns
    label = tl.load(labels_ptr + row)
    if label == IGNORE:
        tl.store(losses_ptr + row, 0.0)
        if NEEDS_GRAD:
            for start in range(0, num_columns, STEP):
                columns = start + tl.arange(0, STEP)
                zeros = tl.zeros([STEP], dtype=logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + columns, zeros, mask=columns < num_columns)
    else:
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
        log_total = largest + tl.log(total)
        tl.store(losses_ptr + row, log_total - target)
        if NEEDS_GRAD:
            for start in range(0, num_columns, STEP):
                columns = start + tl.arange(0, STEP)
                inside = columns < num_columns
                scores = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32)
                slope = 1.0
                if SOFTCAP:
                    capped = 2 * tl.sigmoid(2 * scores / softcap) - 1
                    scores = softcap * capped
                    slope = 1 - capped * capped
                grad = (tl.exp(scores - log_total) - tl.where(columns == label, 1.0, 0.0)) * slope
                tl.store(logits_ptr + columns, grad.to(logits_ptr.dtype.element_ty), mask=inside)


def cross_entropy_(logits_TV: Tensor, labels_T: Tensor, softcap: float | None, needs_grad: bool, ignore: int) -> Tensor:
    """Return the losses, float32 [T]; with `needs_grad` the logits are replaced by the gradient of their sum.

    Args:
        logits_TV: contiguous, on a CUDA device, any floating dtype.
        labels_T: int64; `ignore` where there is no target.
        softcap: the scores are softcap * tanh(logits / softcap).
    """
    assert logits_TV.is_contiguous()
    num_rows, num_columns = logits_TV.shape
    losses_T = torch.empty(num_rows, dtype=torch.float32, device=logits_TV.device)
    _cross_entropy_kernel[(num_rows,)](
        logits_TV,
        labels_T.contiguous(),
        losses_T,
        num_columns,
        softcap if softcap is not None else 1.0,
        IGNORE=ignore,
        SOFTCAP=softcap is not None,
        NEEDS_GRAD=needs_grad,
        STEP=COLUMNS_PER_STEP,
        num_warps=16,
    )
    return losses_T

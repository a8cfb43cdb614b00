"""Products of the frozen base in fp8 (e4m3): what is quantised with which scale, and the product itself.

    x W^T  is about  s_x g^-1 (q(x / s_x) q(g W)^T)        dy W  is about  s_dy g^-1 (q(dy / s_dy) q(g W))

q rounds to e4m3: three bits behind the point, normal numbers from 2^-6, 448 as the largest. Rows of x and dy (one per token)
have scales of their own: the largest magnitude becomes 448. A matrix has one gain g, a power of two, for all its weights:
e4m3 is a floating format, in which a finer gain leaves the same relative error (docs/fp8.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fsdp_qlora.errors import ConfigError
from fsdp_qlora.quant.layout import BLOCKSIZE, Layout
from fsdp_qlora.quant.nf4 import scales

E4M3 = torch.float8_e4m3fn

LARGEST = 448.0
"""The largest number of e4m3."""

ALIGNMENT = 16
"""What both widths of a matrix must be multiples of, for the GPU's fp8 products; its rows also have to be whole blocks."""

SMALLEST_ROW = 1e-30
"""Rows with no larger magnitude than this become zeros; keeps the scale of a row of zeros finite."""

CAPABILITY = (8, 9)
"""CUDA compute capability from which GPUs multiply e4m3: Ada and Hopper."""


def suits_fp8(layout: Layout) -> bool:
    """Return whether a matrix can be multiplied in fp8: it is 4-bit, and its widths are as the GPU needs them."""
    return layout.dense_dtype is None and layout.out_features % ALIGNMENT == 0 and layout.in_features % BLOCKSIZE == 0


def check_device(device: torch.device) -> None:
    """Raise ConfigError for a device without fp8 products."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY:
        return
    found = "a CPU"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    raise ConfigError(
        f"--compute_dtype=fp8 on {found}: fp8 products need a GPU of compute capability"
        f" {CAPABILITY[0]}.{CAPABILITY[1]} or newer (Ada, Hopper); leave it out"
    )


@torch.no_grad()
def gain_of(packed: Tensor, layout: Layout) -> float:
    """Return the gain of a matrix: the largest power of two with which no weight exceeds 448.

    The largest 4-bit code is 1, so the largest scale of a block is the largest magnitude there can be.

    Args:
        packed: gathered flat parameter, 1-D, storage dtype.
    """
    largest = float(scales(packed.view(torch.uint8), layout).amax().item())
    if largest <= 0:
        return 1.0
    _, exponent = math.frexp(LARGEST / largest)
    return math.ldexp(1.0, exponent - 1)


def quantize_rows(rows_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows in e4m3 [T, K], and the scales that give them back, fp32 [T, 1].

    Plain operations, so that torch.compile fuses them with what made the rows.
    """
    amax_T1 = rows_TK.abs().amax(1, keepdim=True).float().clamp(min=SMALLEST_ROW)
    return (rows_TK.float() * (LARGEST / amax_T1)).to(E4M3), amax_T1 / LARGEST


def fp8_product(rows_TK: Tensor, weight_NK: Tensor, gain: Tensor) -> Tensor:
    """Return the product [T, N] of rows and a matrix that is given transposed, in the dtype of the rows.

    On the CPU this is what the GPU computes but for the order of sums: the reference that tests compare with.

    Args:
        rows_TK: bf16 (on the CPU also others).
        weight_NK: e4m3, contiguous.
        gain: of the matrix, fp32 [1].
    """
    quantized_TK, scale_T1 = quantize_rows(rows_TK)
    scale_T1 = scale_T1 / gain
    if not rows_TK.is_cuda:
        return ((quantized_TK.float() @ weight_NK.float().t()) * scale_T1).to(rows_TK.dtype)
    ones_1N = torch.ones(1, weight_NK.shape[0], dtype=torch.float32, device=rows_TK.device)
    # the operator behind torch.nn.functional.scaled_mm, which torch.compile knows in every version that we support
    return torch._scaled_mm(
        quantized_TK,
        weight_NK.t(),
        scale_a=scale_T1,
        scale_b=ones_1N,
        out_dtype=rows_TK.dtype,
        use_fast_accum=True,
    )

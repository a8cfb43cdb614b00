"""Triton kernels: dequantise a flat 4-bit parameter, expanding double-quantised scales on the way.

bitsandbytes needs three launches and a round trip of the scales through memory for the same result. The arithmetic is
theirs in the same order, with fused multiply-add switched off, so the bytes are equal; `nf4.dequantize_reference` is the
reference the tests compare with.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsdp_qlora.quant.layout import BLOCKSIZE, NESTED_BLOCKSIZE, Layout
from fsdp_qlora.quant.nf4 import nested_code, weight_code

BYTES_PER_PROGRAM = 2048

TILE = 128
"""Rows and columns of the matrix that a program writes in fp8: runs of 128 bytes, also where it writes them transposed."""


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    codes_ptr,
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    weight_code_ptr,
    nested_code_ptr,
    out_ptr,
    num_bytes,
    num_weights,
    in_features,
    row_stride,
    DOUBLE_QUANT: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    NESTED: tl.constexpr,
    BYTES_PER_PROGRAM: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * BYTES_PER_PROGRAM + tl.arange(0, BYTES_PER_PROGRAM)
    inside = position < num_bytes
    byte = tl.load(codes_ptr + position, mask=inside, other=0).to(tl.int32)
    block = position // BLOCK_BYTES
    if DOUBLE_QUANT:
        coded = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        nested = tl.load(nested_ptr + block // NESTED, mask=inside, other=0.0)
        scale = tl.load(nested_code_ptr + coded) * nested + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    high = tl.load(weight_code_ptr + (byte >> 4)) * scale
    low = tl.load(weight_code_ptr + (byte & 15)) * scale
    pair = tl.interleave(high, low).to(out_ptr.dtype.element_ty)
    base = tl.program_id(0).to(tl.int64) * (2 * BYTES_PER_PROGRAM)
    element = base + tl.arange(0, 2 * BYTES_PER_PROGRAM)
    row = element // in_features
    tl.store(out_ptr + row * row_stride + (element - row * in_features), pair, mask=element < num_weights)


def dequantize_into(out: Tensor, packed: Tensor, layout: Layout) -> None:
    """Write the matrix of a gathered flat parameter, on a CUDA device.

    Args:
        out: [out, in], each row contiguous in itself; any floating dtype.
        packed: 1-D, any storage dtype.
    """
    flat = packed.view(torch.uint8)
    absmax, nested, offset = _statistics(flat, layout)
    _dequantize_kernel[(triton.cdiv(layout.codes.size, BYTES_PER_PROGRAM),)](
        flat,
        absmax,
        nested,
        offset,
        weight_code(layout.quant_type, packed.device),
        nested_code(packed.device),
        out,
        layout.codes.size,
        layout.num_weights,
        layout.in_features,
        out.stride(0),
        DOUBLE_QUANT=layout.double_quant,
        BLOCK_BYTES=BLOCKSIZE // 2,
        NESTED=NESTED_BLOCKSIZE,
        BYTES_PER_PROGRAM=BYTES_PER_PROGRAM,
        num_warps=8,
        enable_fp_fusion=False,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_fp8_kernel(  # type: ignore[no-untyped-def]
    codes_ptr,
    absmax_ptr,
    nested_ptr,
    offset_ptr,
    weight_code_ptr,
    nested_code_ptr,
    gain_ptr,
    out_ptr,
    out_features,
    in_features,
    DOUBLE_QUANT: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    TILE: tl.constexpr,
):
    rows = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    pairs = tl.program_id(0) * (TILE // 2) + tl.arange(0, TILE // 2)
    inside = (rows[:, None] < out_features) & (2 * pairs[None, :] < in_features)
    position = rows[:, None] * (in_features // 2) + pairs[None, :]
    byte = tl.load(codes_ptr + position, mask=inside, other=0).to(tl.int32)
    block = position // (BLOCK // 2)
    if DOUBLE_QUANT:
        coded = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        nested = tl.load(nested_ptr + block // NESTED, mask=inside, other=0.0)
        scale = tl.load(nested_code_ptr + coded) * nested + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    gain = tl.load(gain_ptr)
    high = (tl.load(weight_code_ptr + (byte >> 4)) * scale * gain).to(tl.float8e4nv)
    low = (tl.load(weight_code_ptr + (byte & 15)) * scale * gain).to(tl.float8e4nv)
    tile = tl.interleave(high, low)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    if TRANSPOSE:
        target = columns.to(tl.int64)[:, None] * out_features + rows[None, :]
        tl.store(
            out_ptr + target, tl.trans(tile), mask=(columns[:, None] < in_features) & (rows[None, :] < out_features)
        )
    else:
        target = rows[:, None] * in_features + columns[None, :]
        tl.store(out_ptr + target, tile, mask=(rows[:, None] < out_features) & (columns[None, :] < in_features))


def dequantize_fp8_into(out: Tensor, packed: Tensor, layout: Layout, gain: Tensor, transpose: bool) -> None:
    """Write the matrix of a gathered flat parameter, times its gain, in e4m3, on a CUDA device.

    Args:
        out: contiguous; [out, in], or [in, out] to write it transposed.
        packed: 1-D, any storage dtype.
        layout: of a matrix with an even number of columns.
        gain: fp32 [1], see fp8.py.
    """
    flat = packed.view(torch.uint8)
    absmax, nested, offset = _statistics(flat, layout)
    _dequantize_fp8_kernel[(triton.cdiv(layout.in_features, TILE), triton.cdiv(layout.out_features, TILE))](
        flat,
        absmax,
        nested,
        offset,
        weight_code(layout.quant_type, packed.device),
        nested_code(packed.device),
        gain,
        out,
        layout.out_features,
        layout.in_features,
        DOUBLE_QUANT=layout.double_quant,
        BLOCK=BLOCKSIZE,
        NESTED=NESTED_BLOCKSIZE,
        TRANSPOSE=transpose,
        TILE=TILE,
        num_warps=8,
        enable_fp_fusion=False,
    )


def _statistics(flat: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return scales, their scales and their offset as views of the bytes; the last two are not read without double_quant."""
    absmax = flat[layout.absmax.start : layout.absmax.stop]
    if not layout.double_quant:
        absmax = absmax.view(torch.float32)
        return absmax, absmax, absmax
    nested = flat[layout.nested_absmax.start : layout.nested_absmax.stop].view(torch.float32)
    return absmax, nested, flat[layout.offset.start : layout.offset.stop].view(torch.float32)

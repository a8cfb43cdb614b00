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

BLOCK_BYTES = BLOCKSIZE // 2

BLOCKS_PER_PROGRAM = 64

ROWS_PER_PROGRAM = 128
"""Rows of a block each that a program writes as columns: runs of 128 bytes in the transposed matrix."""


@triton.jit  # type: ignore[untyped-decorator]
def _scales(  # type: ignore[no-untyped-def]
    block,
    inside,
    flat_ptr,
    absmax_at,
    nested_at,
    offset_at,
    nested_code_ptr,
    DOUBLE_QUANT: tl.constexpr,
    NESTED: tl.constexpr,
):
    fp32_ptr = tl.pointer_type(tl.float32)
    if DOUBLE_QUANT:
        coded = tl.load(flat_ptr + absmax_at + block, mask=inside, other=0).to(tl.int32)
        nested = tl.load((flat_ptr + nested_at).to(fp32_ptr) + block // NESTED, mask=inside, other=0.0)
        return tl.load(nested_code_ptr + coded) * nested + tl.load((flat_ptr + offset_at).to(fp32_ptr))
    else:
        return tl.load((flat_ptr + absmax_at).to(fp32_ptr) + block, mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    flat_ptr,
    absmax_at,
    nested_at,
    offset_at,
    nested_code_ptr,
    weight_code_ptr,
    gain_ptr,
    out_ptr,
    num_weights,
    in_features,
    row_stride,
    DOUBLE_QUANT: tl.constexpr,
    NESTED: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block * (2 * BLOCK_BYTES) < num_weights
    scale = _scales(block, inside, flat_ptr, absmax_at, nested_at, offset_at, nested_code_ptr, DOUBLE_QUANT, NESTED)
    if HAS_GAIN:
        scale *= tl.load(gain_ptr)
    position = block[:, None] * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :]
    byte = tl.load(flat_ptr + position, mask=2 * position < num_weights, other=0).to(tl.int32)
    high = tl.load(weight_code_ptr + (byte >> 4)) * scale[:, None]
    low = tl.load(weight_code_ptr + (byte & 15)) * scale[:, None]
    pair = tl.interleave(high, low).to(out_ptr.dtype.element_ty)
    element = block[:, None] * (2 * BLOCK_BYTES) + tl.arange(0, 2 * BLOCK_BYTES)[None, :]
    target = element
    if not CONTIGUOUS:
        row = element // in_features
        target = row * row_stride + (element - row * in_features)
    tl.store(out_ptr + target, pair, mask=element < num_weights)


def dequantize_into(out: Tensor, packed: Tensor, layout: Layout, gain: Tensor | None = None) -> None:
    """Write the matrix of a gathered flat parameter, times its gain if one is given, on a CUDA device.

    Args:
        out: [out, in], each row contiguous in itself; any floating dtype.
        packed: 1-D, any storage dtype.
        gain: fp32 [1], see fp8.py.
    """
    flat = packed.view(torch.uint8)
    _dequantize_kernel[(triton.cdiv(layout.num_blocks, BLOCKS_PER_PROGRAM),)](
        *_arguments(flat, layout),
        flat if gain is None else gain,
        out,
        layout.num_weights,
        layout.in_features,
        out.stride(0),
        DOUBLE_QUANT=layout.double_quant,
        NESTED=NESTED_BLOCKSIZE,
        HAS_GAIN=gain is not None,
        CONTIGUOUS=out.is_contiguous(),
        BLOCK_BYTES=BLOCK_BYTES,
        BLOCKS=BLOCKS_PER_PROGRAM,
        num_warps=4,
        enable_fp_fusion=False,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_experts_kernel(  # type: ignore[no-untyped-def]
    flat_ptr,
    absmax_at,
    nested_at,
    offset_at,
    nested_code_ptr,
    weight_code_ptr,
    ends_ptr,
    out_ptr,
    matrix_bytes,
    num_weights,
    DOUBLE_QUANT: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    expert = tl.program_id(1)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    if start < tl.load(ends_ptr + expert):
        _dequantize_kernel(
            flat_ptr + expert.to(tl.int64) * matrix_bytes,
            absmax_at,
            nested_at,
            offset_at,
            nested_code_ptr,
            weight_code_ptr,
            flat_ptr,
            out_ptr + expert.to(tl.int64) * num_weights,
            num_weights,
            num_weights,
            num_weights,
            DOUBLE_QUANT,
            NESTED,
            False,
            True,
            BLOCK_BYTES,
            BLOCKS,
        )


def dequantize_experts_into(out: Tensor, packed: Tensor, layout: Layout, ends: Tensor) -> None:
    """Write the matrices of experts that have tokens, in one launch, on a CUDA device.

    Args:
        out: [experts, out, in], contiguous; any floating dtype. Matrices of experts without tokens are left as they are.
        packed: uint8 [experts * layout.num_bytes], the experts' own part of a gathered flat parameter.
        layout: of one of the matrices.
        ends: where the tokens of each expert end, int32 [experts].
    """
    _dequantize_experts_kernel[(triton.cdiv(layout.num_blocks, BLOCKS_PER_PROGRAM), len(ends))](
        *_arguments(packed, layout),
        ends,
        out,
        layout.num_bytes,
        layout.num_weights,
        DOUBLE_QUANT=layout.double_quant,
        NESTED=NESTED_BLOCKSIZE,
        BLOCK_BYTES=BLOCK_BYTES,
        BLOCKS=BLOCKS_PER_PROGRAM,
        num_warps=4,
        enable_fp_fusion=False,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_transposed_kernel(  # type: ignore[no-untyped-def]
    flat_ptr,
    absmax_at,
    nested_at,
    offset_at,
    nested_code_ptr,
    weight_code_ptr,
    gain_ptr,
    out_ptr,
    out_features,
    blocks_per_row,
    DOUBLE_QUANT: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < out_features
    block = row * blocks_per_row + tl.program_id(0)
    scale = _scales(block, inside, flat_ptr, absmax_at, nested_at, offset_at, nested_code_ptr, DOUBLE_QUANT, NESTED)
    scale *= tl.load(gain_ptr)
    position = block[:, None] * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)[None, :]
    # transposed while they are bytes; the two weights of a byte go to neighbouring rows
    byte = tl.trans(tl.load(flat_ptr + position, mask=inside[:, None], other=0)).to(tl.int32)
    high = tl.load(weight_code_ptr + (byte >> 4)) * scale[None, :]
    low = tl.load(weight_code_ptr + (byte & 15)) * scale[None, :]
    column = 2 * (tl.program_id(0).to(tl.int64) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES))
    target = out_ptr + column[:, None] * out_features + row[None, :]
    tl.store(target, high.to(out_ptr.dtype.element_ty), mask=inside[None, :])
    tl.store(target + out_features, low.to(out_ptr.dtype.element_ty), mask=inside[None, :])


def dequantize_transposed_into(out: Tensor, packed: Tensor, layout: Layout, gain: Tensor) -> None:
    """Write the transposed matrix of a gathered flat parameter, times its gain, on a CUDA device.

    Args:
        out: [in, out], contiguous; any floating dtype.
        packed: 1-D, any storage dtype.
        layout: of a matrix whose rows are whole blocks.
        gain: fp32 [1], see fp8.py.
    """
    assert layout.in_features % BLOCKSIZE == 0, layout
    blocks_per_row = layout.in_features // BLOCKSIZE
    _dequantize_transposed_kernel[(blocks_per_row, triton.cdiv(layout.out_features, ROWS_PER_PROGRAM))](
        *_arguments(packed.view(torch.uint8), layout),
        gain,
        out,
        layout.out_features,
        blocks_per_row,
        DOUBLE_QUANT=layout.double_quant,
        NESTED=NESTED_BLOCKSIZE,
        BLOCK_BYTES=BLOCK_BYTES,
        ROWS=ROWS_PER_PROGRAM,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _arguments(flat: Tensor, layout: Layout) -> tuple[Tensor | int, ...]:
    """Return what all kernels read first: the bytes, where their sections begin, and the tables of both codes.

    Without double_quant the scales of scales, their offset and their table are not read.
    """
    sections = layout.absmax.start, layout.nested_absmax.start, layout.offset.start
    return flat, *sections, nested_code(flat.device), weight_code(layout.quant_type, flat.device)

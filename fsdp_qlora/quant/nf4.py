"""Quantise with bitsandbytes, one run of blocks at a time, into the bytes of a flat 4-bit parameter.

Blocks of 64 weights are quantised independently of each other, so any run of whole blocks gives the bytes that
`bitsandbytes.functional.quantize_4bit` gives for the whole matrix. Only double quantisation looks at the whole matrix: it
subtracts the mean of all scales. Hence two steps: `quantize_blocks` on any run, `pack_statistics` on all scales.
"""

from __future__ import annotations

import functools

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

from fsdp_qlora.quant.layout import BLOCKSIZE, NESTED_BLOCKSIZE, Layout


@functools.cache
def nested_code(device: torch.device) -> Tensor:
    """Return bitsandbytes' 8-bit dynamic map [256] fp32, the values that double-quantised scales are coded in."""
    code: Tensor = bnb.create_dynamic_map().to(device=device, dtype=torch.float32)
    return code


@functools.cache
def weight_code(quant_type: str, device: torch.device) -> Tensor:
    """Return the 16 values [16] fp32 that the 4-bit codes stand for."""
    code: Tensor = bnb.get_4bit_type(quant_type, device=device)
    return code


def quantize_blocks(weights: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Quantise a run of whole blocks.

    Args:
        weights: 1-D bf16, fp16 or fp32; starts at a multiple of 64 weights of its matrix, and only the run that ends the
            matrix may end inside a block.
        quant_type: 'nf4' or 'fp4'.

    Returns:
        Codes, uint8 [ceil(numel / 2)], first weight in the high half of a byte; scales, fp32 [ceil(numel / 64)].

    Source: bitsandbytes.functional.quantize_4bit, whose bytes these are.
    """
    codes, state = bnb.quantize_4bit(weights, blocksize=BLOCKSIZE, quant_type=quant_type)
    return codes.view(-1), state.absmax


def nest(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise all scales of a matrix, fp32 [num_blocks].

    Returns:
        Codes, uint8 [num_blocks]; nested scales, fp32 [ceil(num_blocks / 256)]; the mean that was subtracted, fp32 [].
    """
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCKSIZE)
    return codes, state.absmax, offset


def pack_statistics(absmax: Tensor, layout: Layout) -> Tensor:
    """Return the bytes of the statistics sections.

    Args:
        absmax: all scales of the matrix, fp32 [num_blocks].
        layout: the matrix's layout.

    Returns:
        uint8 [num_bytes - absmax.start]: what stands in the flat parameter from the absmax section to its end.
    """
    base = layout.absmax.start
    tail = torch.zeros(layout.num_bytes - base, dtype=torch.uint8, device=absmax.device)
    if not layout.double_quant:
        tail[: layout.absmax.size] = absmax.view(torch.uint8)
        return tail
    codes, nested_absmax, offset = nest(absmax)
    for section, values in (
        (layout.absmax, codes),
        (layout.nested_absmax, nested_absmax),
        (layout.offset, offset.reshape(1)),
    ):
        tail[section.start - base : section.stop - base] = values.view(torch.uint8)
    return tail


def dense_bytes(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights that are not quantised as bytes, uint8 1-D."""
    return weights.reshape(-1).to(dtype).view(torch.uint8)


def dense_matrix(packed: Tensor, layout: Layout) -> Tensor:
    """Return a matrix that is not quantised as a view [out, in] of its gathered flat parameter."""
    assert layout.dense_dtype is not None
    return packed.view(layout.dense_dtype)[: layout.num_weights].view(layout.out_features, layout.in_features)


def quantize_matrix(weight: Tensor, layout: Layout) -> Tensor:
    """Return a whole matrix [out, in] as the bytes of its flat parameter, uint8 [num_bytes]."""
    if layout.dense_dtype is not None:
        return F.pad(dense_bytes(weight, layout.dense_dtype), (0, layout.num_bytes - layout.codes.stop))
    codes, absmax = quantize_blocks(weight.reshape(-1), layout.quant_type)
    flat = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=weight.device)
    flat[: layout.codes.stop] = codes
    flat[layout.absmax.start :] = pack_statistics(absmax, layout)
    return flat


def scales(packed: Tensor, layout: Layout) -> Tensor:
    """Return the scale of each block, fp32 [num_blocks], from the bytes of a gathered flat parameter.

    Args:
        packed: uint8 [>= num_bytes].
    """
    absmax = packed[layout.absmax.start : layout.absmax.stop]
    if not layout.double_quant:
        return absmax.view(torch.float32)
    nested = packed[layout.nested_absmax.start : layout.nested_absmax.stop].view(torch.float32)
    offset = packed[layout.offset.start : layout.offset.stop].view(torch.float32)
    code = nested_code(packed.device)
    values: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(absmax, nested, code, NESTED_BLOCKSIZE, torch.float32)
    return values + offset


def dequantize_reference(packed: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """Return the matrix [out, in] in `dtype` by bitsandbytes' own operators, on any device.

    Args:
        packed: gathered flat parameter, any storage dtype, 1-D.
    """
    if layout.dense_dtype is not None:
        return dense_matrix(packed, layout).to(dtype)
    flat = packed.view(torch.uint8)
    codes = flat[: layout.codes.stop].view(-1, 1)
    # as one run: given the matrix's shape, their CPU kernel begins a block in every row, which is wrong unless 64 divides it
    run: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes, scales(flat, layout), BLOCKSIZE, layout.quant_type, (layout.num_weights,), dtype
    )
    return run.view(layout.out_features, layout.in_features)

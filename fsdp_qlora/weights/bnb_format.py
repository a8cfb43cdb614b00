"""A quantised matrix as the tensors that bitsandbytes saves and transformers loads."""

from __future__ import annotations

from collections.abc import Iterable

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from fsdp_qlora.quant.layout import BLOCKSIZE, NESTED_BLOCKSIZE, Layout
from fsdp_qlora.quant.nf4 import nest, nested_code, quantize_blocks, weight_code
from fsdp_qlora.weights.source import entry_name
from fsdp_qlora.weights.writer import Sink, Slot


def slots(name: str, layout: Layout) -> tuple[Slot, ...]:
    """Return the tensors that stand for the matrix `name` ('....weight') [out, in]."""
    always = (
        Slot(name, torch.uint8, (layout.codes.size, 1)),
        Slot(name + ".quant_map", torch.float32, (16,)),
        Slot(entry_name(name, layout.quant_type), torch.uint8, None),
    )
    if not layout.double_quant:
        return (*always, Slot(name + ".absmax", torch.float32, (layout.num_blocks,)))
    return (
        *always,
        Slot(name + ".absmax", torch.uint8, (layout.num_blocks,)),
        Slot(name + ".nested_absmax", torch.float32, (layout.nested_absmax.size // 4,)),
        Slot(name + ".nested_quant_map", torch.float32, (256,)),
    )


def describe(absmax: Tensor, layout: Layout, dtype: torch.dtype) -> bnb.QuantState:
    """Return bitsandbytes' description of a matrix.

    Args:
        absmax: all its scales, fp32 [num_blocks].
        dtype: what the matrix was before, and is dequantised to by default.
    """
    offset = state2 = None
    if layout.double_quant:
        absmax, nested_absmax, offset = nest(absmax)
        code = nested_code(absmax.device)
        state2 = bnb.QuantState(nested_absmax, code=code, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32)
    return bnb.QuantState(
        absmax,
        shape=torch.Size((layout.out_features, layout.in_features)),
        code=weight_code(layout.quant_type, absmax.device),
        blocksize=BLOCKSIZE,
        quant_type=layout.quant_type,
        dtype=dtype,
        offset=offset,
        state2=state2,
    )


def write_quantized(name: str, layout: Layout, runs: Iterable[Tensor], sink: Sink) -> None:
    """Quantise a matrix that arrives in runs of whole blocks (1-D; only the last may end inside a block)."""
    scales = []
    position, dtype = 0, torch.float32
    for run in runs:
        codes, absmax = quantize_blocks(run, layout.quant_type)
        sink(name, codes.cpu().view(-1, 1), position)
        position, dtype = position + codes.numel(), run.dtype
        scales.append(absmax)
    state = describe(torch.cat(scales), layout, dtype)
    for key, part in state.as_dict(packed=True).items():
        sink(f"{name}.{key}", part.cpu(), 0)

"""Dequantise a flat 4-bit parameter: one operator for every device, opaque to torch.compile.

The operators are defined by schemas: what torch.library.custom_op wraps around a function takes 10 us of the CPU a call, of
which a step has hundreds.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fsdp_qlora.quant.fp8 import E4M3
from fsdp_qlora.quant.grouped import Group
from fsdp_qlora.quant.layout import Layout
from fsdp_qlora.quant.nf4 import dense_matrix, dequantize_reference


def _dequantize(
    packed: Tensor, layout: Layout, dtype: torch.dtype, beside: Tensor | None, below: Tensor | None
) -> Tensor:
    num_rows = layout.out_features + (0 if below is None else below.shape[0])
    num_columns = layout.in_features + (0 if beside is None else beside.shape[1])
    out = torch.empty(num_rows, num_columns, dtype=dtype, device=packed.device)
    matrix = out[: layout.out_features, : layout.in_features]
    if packed.is_cuda:
        from fsdp_qlora.quant.kernels import dequantize_into

        dequantize_into(matrix, packed, layout)
    else:
        matrix.copy_(dequantize_reference(packed, layout, dtype))
    if beside is not None:
        out[:, layout.in_features :] = beside
    if below is not None:
        out[layout.out_features :] = below
    return out


_layout = functools.cache(Layout)

torch.library.define(
    "fsdp_qlora::dequantize",
    "(Tensor packed, int out_features, int in_features, str quant_type, bool double_quant, ScalarType dtype, str use,"
    " Tensor? beside, Tensor? below) -> Tensor",
)


@torch.library.impl("fsdp_qlora::dequantize", "default")
def _(
    packed: Tensor,
    out_features: int,
    in_features: int,
    quant_type: str,
    double_quant: bool,
    dtype: torch.dtype,
    use: str,
    beside: Tensor | None,
    below: Tensor | None,
) -> Tensor:
    return _dequantize(packed, _layout(out_features, in_features, quant_type, double_quant), dtype, beside, below)


@torch.library.register_fake("fsdp_qlora::dequantize")  # type: ignore[untyped-decorator]
def _(
    packed: Tensor,
    out_features: int,
    in_features: int,
    quant_type: str,
    double_quant: bool,
    dtype: torch.dtype,
    use: str,
    beside: Tensor | None,
    below: Tensor | None,
) -> Tensor:
    num_rows = out_features + (0 if below is None else below.shape[0])
    num_columns = in_features + (0 if beside is None else beside.shape[1])
    return packed.new_empty((num_rows, num_columns), dtype=dtype)


def dequantize(
    packed: Tensor,
    layout: Layout,
    dtype: torch.dtype,
    use: str,
    *,
    beside: Tensor | None = None,
    below: Tensor | None = None,
) -> Tensor:
    """Return the matrix [out, in] in `dtype`, with more columns or rows if given.

    Args:
        packed: gathered flat parameter, 1-D, storage dtype.
        layout: its layout.
        use: 'forward' or 'backward'. torch.compile merges equal calls; were the two uses equal calls, it would keep the
            dequantised matrix from forward to backward.
        beside: [out, r], columns to put to the right of the matrix.
        below: [r, in], rows to put under it.
    """
    if layout.dense_dtype is not None and beside is None and below is None:
        return dense_matrix(packed, layout).to(dtype)  # a view where the dtype is the same
    if not torch.compiler.is_compiling():
        return _dequantize(packed, layout, dtype, beside, below)
    result: Tensor = torch.ops.fsdp_qlora.dequantize(
        packed,
        layout.out_features,
        layout.in_features,
        layout.quant_type,
        layout.double_quant,
        dtype,
        use,
        beside,
        below,
    )
    return result


def dequantize_experts(packed: Tensor, layout: Layout, group: Group, dtype: torch.dtype) -> Tensor:
    """Return the matrices of a group's experts [experts, out, in] in `dtype`; those of experts without tokens are unset.

    Outside of torch.compile only.

    Args:
        packed: gathered flat parameter of all experts, 1-D, storage dtype.
        layout: its layout.
    """
    experts, num_bytes = group.experts, layout.num_bytes
    flat = packed.view(torch.uint8)[experts.start * num_bytes : experts.stop * num_bytes]
    shape = layout.out_features, layout.in_features
    if layout.dense_dtype is not None:  # a view where the dtype is the same
        rows = flat.view(layout.dense_dtype).view(len(group.counts), -1)[:, : layout.num_weights]
        return rows.view(-1, *shape).to(dtype)
    out = torch.empty(len(group.counts), *shape, dtype=dtype, device=packed.device)
    if packed.is_cuda:
        from fsdp_qlora.quant.kernels import dequantize_experts_into

        dequantize_experts_into(out, flat, layout, group.ends)
    else:
        for expert, _ in group.hit():
            place = expert - group.first
            out[place] = dequantize_reference(flat[place * num_bytes : (place + 1) * num_bytes], layout, dtype)
    return out


def _dequantize_fp8(packed: Tensor, layout: Layout, gain: Tensor, transpose: bool) -> Tensor:
    shape = (layout.in_features, layout.out_features) if transpose else (layout.out_features, layout.in_features)
    out = torch.empty(shape, dtype=E4M3, device=packed.device)
    if packed.is_cuda:
        from fsdp_qlora.quant.kernels import dequantize_into, dequantize_transposed_into

        (dequantize_transposed_into if transpose else dequantize_into)(out, packed, layout, gain)
    else:
        matrix = dequantize_reference(packed, layout, torch.float32) * gain
        out.copy_(matrix.t() if transpose else matrix)
    return out


torch.library.define(
    "fsdp_qlora::dequantize_fp8",
    "(Tensor packed, Tensor gain, int out_features, int in_features, str quant_type, bool double_quant, bool transpose)"
    " -> Tensor",
)


@torch.library.impl("fsdp_qlora::dequantize_fp8", "default")
def _(
    packed: Tensor,
    gain: Tensor,
    out_features: int,
    in_features: int,
    quant_type: str,
    double_quant: bool,
    transpose: bool,
) -> Tensor:
    return _dequantize_fp8(packed, _layout(out_features, in_features, quant_type, double_quant), gain, transpose)


@torch.library.register_fake("fsdp_qlora::dequantize_fp8")  # type: ignore[untyped-decorator]
def _(
    packed: Tensor,
    gain: Tensor,
    out_features: int,
    in_features: int,
    quant_type: str,
    double_quant: bool,
    transpose: bool,
) -> Tensor:
    return packed.new_empty((in_features, out_features) if transpose else (out_features, in_features), dtype=E4M3)


def dequantize_fp8(packed: Tensor, layout: Layout, gain: Tensor, *, transpose: bool) -> Tensor:
    """Return a 4-bit matrix times its gain in e4m3, [out, in] for forward, or transposed [in, out] for backward.

    Args:
        packed: gathered flat parameter, 1-D, storage dtype.
        gain: of the matrix, fp32 [1], see fp8.py.
    """
    if not torch.compiler.is_compiling():
        return _dequantize_fp8(packed, layout, gain, transpose)
    shape = layout.out_features, layout.in_features
    result: Tensor = torch.ops.fsdp_qlora.dequantize_fp8(
        packed, gain, *shape, layout.quant_type, layout.double_quant, transpose
    )
    return result

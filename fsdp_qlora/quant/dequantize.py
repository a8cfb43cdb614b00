"""Dequantise a flat 4-bit parameter: one operator for every device, opaque to torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor

from fsdp_qlora.quant.layout import Layout
from fsdp_qlora.quant.nf4 import dequantize_reference


def _dequantize(packed: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    if packed.is_cuda:
        from fsdp_qlora.quant.kernels import dequantize as triton_dequantize

        return triton_dequantize(packed, layout, dtype)
    return dequantize_reference(packed, layout, dtype)


@torch.library.custom_op("fsdp_qlora::dequantize", mutates_args=())
def _dequantize_op(
    packed: Tensor,
    out_features: int,
    in_features: int,
    quant_type: str,
    double_quant: bool,
    dtype: torch.dtype,
    use: str,
) -> Tensor:
    return _dequantize(packed, Layout(out_features, in_features, quant_type, double_quant), dtype)


@_dequantize_op.register_fake
def _(
    packed: Tensor,
    out_features: int,
    in_features: int,
    quant_type: str,
    double_quant: bool,
    dtype: torch.dtype,
    use: str,
) -> Tensor:
    return packed.new_empty((out_features, in_features), dtype=dtype)


def dequantize(packed: Tensor, layout: Layout, dtype: torch.dtype, use: str) -> Tensor:
    """Return the matrix [out, in] in `dtype`.

    Args:
        packed: gathered flat parameter, 1-D, storage dtype.
        layout: its layout.
        use: 'forward' or 'backward'. torch.compile merges equal calls; were the two uses equal calls, it would keep the
            dequantised matrix from forward to backward.
    """
    if not torch.compiler.is_compiling():
        return _dequantize(packed, layout, dtype)
    result: Tensor = _dequantize_op(
        packed, layout.out_features, layout.in_features, layout.quant_type, layout.double_quant, dtype, use
    )
    return result

"""Importing this makes bitsandbytes' 4-bit layers compute rightly on the CPU, for comparisons at every width.

Its CPU kernels (0.50.2) begin a block of 64 weights in every row of a matrix, which is wrong unless 64 divides the width;
the one that dequantises is right for a matrix given as one run. The widths of real models are multiples of 64, those of
tiny ones are not.
"""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from torch import Tensor

_original, _original_product = bnb.dequantize_4bit, bitsandbytes.matmul_4bit


def _dequantize_4bit(packed: Tensor, quant_state: Any = None, *arguments: Any, **named: Any) -> Tensor:
    if quant_state is None or packed.is_cuda:
        return _original(packed, quant_state, *arguments, **named)
    run = copy.copy(quant_state)
    run.shape = torch.Size([quant_state.shape.numel()])
    whole = _original(packed, run, *arguments, **named).view(quant_state.shape)
    return whole.t() if packed.shape[0] == 1 else whole


def _matmul_4bit(x: Tensor, packed: Tensor, quant_state: Any, out: None = None, bias: Tensor | None = None) -> Tensor:
    if x.is_cuda:
        return _original_product(x, packed, quant_state, out, bias)
    return torch.nn.functional.linear(x, _dequantize_4bit(packed.view(-1, 1), quant_state).to(x.dtype), bias)


bnb.dequantize_4bit, bitsandbytes.matmul_4bit = _dequantize_4bit, _matmul_4bit

"""Swap the linear layers of the decoder blocks for 4-bit ones and add LoRA to those that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fsdp_qlora.models.skeleton import Skeleton
from fsdp_qlora.quant.layout import Layout
from fsdp_qlora.quant.linear import LoRALinear
from fsdp_qlora.quant.lora import LoraSettings as LoraSettings
from fsdp_qlora.quant.lora import adapted_layers


@dataclass(frozen=True)
class QuantSettings:
    """How the base is quantised and stored."""

    quant_type: str = "nf4"
    double_quant: bool = True
    storage: str = "float32"
    num_shards: int = 1


def block_linears(skeleton: Skeleton) -> list[tuple[str, nn.Linear]]:
    """Return (name in the model, layer) of every linear layer of the decoder blocks."""
    named = skeleton.model.named_modules()
    return [(name, m) for name, m in named if isinstance(m, nn.Linear) and name.startswith("model.layers.")]


def quantize_and_adapt(skeleton: Skeleton, quant: QuantSettings, lora: LoraSettings | None, dtype: torch.dtype) -> None:
    """Replace every linear layer of the decoder blocks by a LoRALinear on the meta device, in place.

    Args:
        skeleton: the model, on the meta device.
        quant: form of the 4-bit base.
        lora: the adapters; None for none.
        dtype: dtype of the computation.

    Raises:
        ModelError: a LoRA target, block or pattern that matches no layer.
    """
    linears = block_linears(skeleton)
    adapted = adapted_layers([name for name, _ in linears], lora) if lora is not None else set()
    layouts: dict[Layout, Layout] = {}  # one object for equal layouts, so that compiled code is shared between blocks
    for name, linear in linears:
        parent_name, _, leaf = name.rpartition(".")
        layout = Layout(
            linear.out_features,
            linear.in_features,
            quant.quant_type,
            quant.double_quant,
            quant.storage,
            quant.num_shards,
        )
        replacement = LoRALinear(
            name,
            layouts.setdefault(layout, layout),
            bias=linear.bias is not None,
            dtype=dtype,
            rank=lora.rank_of(name) if lora is not None and name in adapted else 0,
            scaling=lora.scaling_of(name) if lora is not None else 1.0,
            dropout=lora.dropout if lora is not None else 0.0,
            use_dora=lora is not None and lora.use_dora,
        )
        setattr(skeleton.model.get_submodule(parent_name), leaf, replacement)


def lora_linears(model: nn.Module) -> Iterator[LoRALinear]:
    """Yield the 4-bit layers of a model in the model's order."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            yield module

"""Swap the linear layers of the decoder blocks for 4-bit ones and add LoRA to those that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fsdp_qlora.errors import ModelError
from fsdp_qlora.models.skeleton import Skeleton
from fsdp_qlora.quant.layout import Layout
from fsdp_qlora.quant.linear import LoRALinear


@dataclass(frozen=True)
class LoraSettings:
    """LoRA as PEFT's LoraConfig names it. `target_modules` is 'all-linear' or comma-separated layer names."""

    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: str = "all-linear"

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


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


def target_names(available: list[str], target_modules: str) -> set[str]:
    """Return the last parts of the layer names that get LoRA; ModelError if one of them matches nothing."""
    if target_modules == "all-linear":
        return set(available)
    wanted = {name.strip() for name in target_modules.split(",") if name.strip()}
    unknown = sorted(wanted - set(available))
    if unknown or not wanted:
        raise ModelError(
            f"lora_target_modules '{target_modules}': no linear layer is named {', '.join(unknown) or '(empty)'};"
            f" this model has {', '.join(available)}, or use all-linear"
        )
    return wanted


def quantize_and_adapt(skeleton: Skeleton, quant: QuantSettings, lora: LoraSettings | None, dtype: torch.dtype) -> None:
    """Replace every linear layer of the decoder blocks by a LoRALinear on the meta device, in place.

    Args:
        skeleton: the model, on the meta device.
        quant: form of the 4-bit base.
        lora: the adapters; None for none.
        dtype: dtype of the computation.

    Raises:
        ModelError: a LoRA target that matches no layer.
    """
    linears = block_linears(skeleton)
    available = list(dict.fromkeys(name.rpartition(".")[2] for name, _ in linears))
    targets = target_names(available, lora.target_modules) if lora is not None else set()
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
            rank=lora.rank if lora is not None and leaf in targets else 0,
            scaling=lora.scaling if lora is not None else 1.0,
            dropout=lora.dropout if lora is not None else 0.0,
        )
        setattr(skeleton.model.get_submodule(parent_name), leaf, replacement)


def lora_linears(model: nn.Module) -> Iterator[LoRALinear]:
    """Yield the 4-bit layers of a model in the model's order."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            yield module

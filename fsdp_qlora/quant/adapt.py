"""Swap the linear layers of the decoder blocks for 4-bit ones and add LoRA to those that are trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_qlora.errors import ModelError
from fsdp_qlora.models.skeleton import Skeleton
from fsdp_qlora.quant.expert_lora import EXPERT_PARAMETERS, ExpertLora
from fsdp_qlora.quant.experts import PARTS, ExpertStack, QuantizedExperts
from fsdp_qlora.quant.fp8 import ALIGNMENT, suits_fp8
from fsdp_qlora.quant.layout import BLOCKSIZE, Layout
from fsdp_qlora.quant.linear import LoRALinear
from fsdp_qlora.quant.lora import LoraSettings as LoraSettings
from fsdp_qlora.quant.lora import adapted_layers


@dataclass(frozen=True)
class QuantSettings:
    """How the base is quantised and stored.

    Attributes:
        quant_type: 'nf4' or 'fp4'; 'none' for the dtype of the computation; or one of layout.DENSE_DTYPES.
        fp8: whether the linear layers multiply with it in fp8, where their shapes allow it. Experts do not.
    """

    quant_type: str = "nf4"
    double_quant: bool = True
    storage: str = "float32"
    num_shards: int = 1
    fp8: bool = False

    @property
    def is_4bit(self) -> bool:
        return self.quant_type in ("nf4", "fp4")

    def held(self, dtype: torch.dtype) -> QuantSettings:
        """Return the form in which a base that computes in `dtype` is held: 'none' is no form."""
        if self.is_4bit:
            return self
        held = str(dtype).removeprefix("torch.") if self.quant_type == "none" else self.quant_type
        return replace(self, quant_type=held, double_quant=False)


def block_linears(skeleton: Skeleton) -> list[tuple[str, nn.Linear]]:
    """Return (name in the model, layer) of every linear layer of the decoder blocks."""
    named = skeleton.model.named_modules()
    return [(name, m) for name, m in named if isinstance(m, nn.Linear) and name.startswith("model.layers.")]


def block_experts(skeleton: Skeleton) -> list[tuple[str, nn.Module]]:
    """Return (name in the model, module) of what holds the experts of each block as stacks [experts, out, in].

    Raises:
        ModelError: blocks with and without experts, or a router whose noise backward could not repeat.
    """
    found = []
    for name, module in skeleton.model.named_modules():
        stacks: list[Any] = [getattr(module, part, None) for part in EXPERT_PARAMETERS]
        if all(isinstance(stack, Tensor) and stack.dim() == 3 for stack in stacks):
            found.append((name, module))
    if found and len(found) != len(skeleton.blocks):
        raise ModelError(
            f"{len(found)} of {len(skeleton.blocks)} decoder blocks have experts; only models in which all or none have"
            " are supported"
        )
    if found and getattr(skeleton.config, "router_jitter_noise", None):
        raise ModelError("router_jitter_noise in config.json is not supported; set it to 0")
    return found


def expert_matrices(skeleton: Skeleton) -> dict[str, tuple[int, int]]:
    """Return the shape [out, in] of every expert's matrices by their names, one a checkpoint tensor each."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in block_experts(skeleton):
        num_experts, hidden, inner = _expert_shape(module)
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        for part, shape in zip(PARTS, shapes, strict=True):
            found |= {f"{name}.{expert}.{part}.weight": shape for expert in range(num_experts)}
    return found


def _expert_shape(module: nn.Module) -> tuple[int, int, int]:
    """Return the number of experts, and hidden and inner width."""
    assert isinstance(module.down_proj, Tensor)
    num_experts, hidden, inner = module.down_proj.shape
    return num_experts, hidden, inner


def expert_parameters(skeleton: Skeleton) -> list[str]:
    """Return the names of transformers' parameters that hold the matrices of all experts of a block."""
    return [f"{name}.{part}" for name, _ in block_experts(skeleton) for part in EXPERT_PARAMETERS]


def tensor_names(skeleton: Skeleton) -> set[str]:
    """Return the names of all tensors that a checkpoint of the model must hold."""
    own = set(skeleton.model.state_dict()) - ({"lm_head.weight"} if skeleton.tied else set())
    return own - set(expert_parameters(skeleton)) | set(expert_matrices(skeleton))


def quantize_and_adapt(skeleton: Skeleton, quant: QuantSettings, lora: LoraSettings | None, dtype: torch.dtype) -> None:
    """Replace every linear layer of the decoder blocks by a LoRALinear on the meta device, and experts by 4-bit ones.

    Args:
        skeleton: the model, on the meta device.
        quant: form of the 4-bit base.
        lora: the adapters; None for none.
        dtype: dtype of the computation.

    Raises:
        ModelError: a LoRA target, block or pattern that matches no layer; or no layer can compute in fp8.
    """
    quant = quant.held(dtype)
    linears = block_linears(skeleton)
    adapted = set()
    if lora is not None:
        adapted = adapted_layers([name for name, _ in linears], lora, expert_parameters(skeleton))
    _quantize_experts(skeleton, quant, lora, adapted)
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
            fp8=quant.fp8 and suits_fp8(layout),
        )
        setattr(skeleton.model.get_submodule(parent_name), leaf, replacement)
    if quant.fp8 and not any(linear.fp8 for linear in lora_linears(skeleton.model)):
        raise ModelError(
            f"compute_dtype fp8: needs 4-bit linear layers whose inputs are a multiple of {BLOCKSIZE} wide and whose outputs"
            f" of {ALIGNMENT}, and this model, held as {quant.quant_type}, has none; leave it out"
        )


def _quantize_experts(
    skeleton: Skeleton, quant: QuantSettings, lora: LoraSettings | None, adapted: Collection[str]
) -> None:
    for name, module in block_experts(skeleton):
        num_experts, hidden, inner = _expert_shape(module)
        wide = Layout(
            inner,
            hidden,
            quant.quant_type,
            quant.double_quant,
            quant.storage,
            quant.num_shards,
            num_matrices=num_experts,
        )
        narrow = replace(wide, out_features=hidden, in_features=inner)
        gate_up, down = (
            _expert_lora(f"{name}.{part}", getattr(module, part).shape, lora, adapted) for part in EXPERT_PARAMETERS
        )
        parent_name, _, leaf = name.rpartition(".")
        assert callable(module.act_fn)
        experts = QuantizedExperts(name, (wide, wide, narrow), module.act_fn, (gate_up, down))
        setattr(skeleton.model.get_submodule(parent_name), leaf, experts)


def _expert_lora(
    name: str, shape: torch.Size, lora: LoraSettings | None, adapted: Collection[str]
) -> ExpertLora | None:
    """Return LoRA for a parameter of this shape [experts, out, in]; None if it gets none."""
    if lora is None or name not in adapted:
        return None
    num_experts, out_features, in_features = shape
    return ExpertLora(name, num_experts, in_features, out_features, lora.rank_of(name), lora.scaling_of(name))


def packed_layers(model: nn.Module) -> Iterator[LoRALinear | ExpertStack]:
    """Yield all that holds 4-bit weights, in the model's order."""
    for module in model.modules():
        if isinstance(module, LoRALinear | ExpertStack):
            yield module


def lora_linears(model: nn.Module) -> Iterator[LoRALinear]:
    """Yield the 4-bit layers of a model in the model's order."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            yield module


def lora_layers(model: nn.Module) -> Iterator[LoRALinear | ExpertLora]:
    """Yield what has LoRA, in the model's order."""
    for module in model.modules():
        if isinstance(module, ExpertLora) or (isinstance(module, LoRALinear) and module.lora_A is not None):
            yield module

"""What PEFT's files say: the names of an adapter's tensors, which here are '<layer name>.<part>', and its LoraConfig.

PEFT wraps a module once for each of its target_parameters, the first one innermost, and names the tensors after the
wrappers: of experts with LoRA on both parameters, those of gate_up_proj are in experts.base_layer and those of down_proj in
experts; with LoRA on one of the two, its tensors are in experts, and only adapter_config.json says which one it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from fsdp_qlora.quant.expert_lora import EXPERT_PARAMETERS
from fsdp_qlora.quant.lora import VOCABULARY, LoraSettings, block_of, is_target_parameter

PREFIX = "base_model.model."

_EXPERTS = re.compile(r"(?P<experts>.*\.experts)(?P<inner>\.base_layer)?\.(?P<part>lora_[AB])")
_INNER, _OUTER = EXPERT_PARAMETERS


def peft_layer(prefix: str, layer: str) -> str:
    """Return the name of a layer in the model that PEFT applies an adapter to.

    Args:
        prefix: the family's `adapter_prefix`.
    """
    return prefix + layer.removeprefix("model.") if layer.startswith("model.") else layer


def is_expert_parameter(name: str) -> bool:
    """Return whether a name is that of a parameter that holds the matrices of all experts of a layer."""
    return name.endswith(tuple(f".experts.{parameter}" for parameter in EXPERT_PARAMETERS))


def file_name(prefix: str, layer: str, part: str, adapted: Collection[str]) -> str:
    """Return the name of a tensor in PEFT's file.

    Args:
        prefix: the family's `adapter_prefix`.
        layer: the linear layer or the parameter of experts that the tensor belongs to.
        part: such as lora_A.
        adapted: all parameters of experts that have LoRA.
    """
    wrapper = peft_layer(prefix, layer)
    experts, _, parameter = layer.rpartition(".")
    if layer in adapted:
        nested = parameter == _INNER and f"{experts}.{_OUTER}" in adapted
        wrapper = peft_layer(prefix, experts) + (".base_layer" if nested else "")
    suffix = "" if part == "lora_magnitude_vector" else ".weight"
    return f"{PREFIX}{wrapper}.{part}{suffix}"


def whole_names(prefix: str, module: str, tied: bool) -> tuple[str, ...]:
    """Return the names in PEFT's file of a matrix that is trained whole: one for each module that has it.

    Args:
        prefix: the family's `adapter_prefix`.
        module: one of VOCABULARY's values.
        tied: whether the model's head is its embedding.
    """
    modules = (module, VOCABULARY["lm_head"]) if tied else (module,)
    return tuple(f"{PREFIX}{peft_layer(prefix, name)}.weight" for name in modules)


def whole_config(modules: Sequence[str], tied: bool) -> dict[str, Any]:
    """Return what PEFT's LoraConfig says of modules that are trained whole, given as for `whole_names`."""
    if not modules:
        return {}
    return {
        "modules_to_save": [name.rpartition(".")[2] for name in modules],
        **({"ensure_weight_tying": True} if tied else {}),
    }


def matrix_names(names: Collection[str], target_parameters: Iterable[str] | None) -> dict[str, str]:
    """Return the tensors' names in an adapter's file by '<layer name>.<part>', with a part of ADAPTER_PARTS.

    A module that was trained whole has no part: its name is in VOCABULARY's values.

    Args:
        target_parameters: as adapter_config.json has them.
    """
    plain = {_plain(name): name for name in names}
    return {_of_parameter(name, plain, list(target_parameters or ())): found for name, found in plain.items()}


def _plain(name: str) -> str:
    return name.removeprefix(PREFIX).replace("model.language_model.", "model.", 1).removesuffix(".weight")


def _of_parameter(name: str, names: Collection[str], targets: Collection[str]) -> str:
    """Return the name with the parameter in it, for tensors of experts; others as they are."""
    match = _EXPERTS.fullmatch(name)
    if match is None:
        return name
    experts, part = match["experts"], match["part"]
    if match["inner"] or f"{experts}.base_layer.{part}" in names:
        return f"{experts}.{_INNER if match['inner'] else _OUTER}.{part}"
    found = [parameter for parameter in EXPERT_PARAMETERS if is_target_parameter(f"{experts}.{parameter}", targets)]
    return f"{experts}.{found[0]}.{part}" if len(found) == 1 else name


def layer_config(
    lora: LoraSettings,
    base_model: str,
    prefix: str,
    adapted: Collection[str],
    every: Collection[str],
    experts: Collection[str] = (),
) -> dict[str, Any]:
    """Return PEFT's LoraConfig as a dict.

    Args:
        prefix: the family's `adapter_prefix`.
        adapted: names of the layers that have LoRA, out of those of `every` linear layer.
        experts: names of the parameters of experts that have LoRA.
    """
    names = sorted([*adapted, *experts])
    ranks = {peft_layer(prefix, name): lora.rank_of(name) for name in names}
    alphas = {peft_layer(prefix, name): lora.alpha_of(name) for name in names}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": _target_modules(prefix, adapted, every),
        **({"target_parameters": _target_parameters(prefix, experts, every)} if experts else {}),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != lora.rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != lora.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _target_modules(prefix: str, adapted: Collection[str], every: Collection[str]) -> list[str] | str:
    """Return what makes PEFT adapt these layers and no others: last parts of names where they tell enough."""
    leaves = sorted({name.rpartition(".")[2] for name in adapted})
    if set(adapted) != {name for name in every if name.rpartition(".")[2] in leaves}:
        return sorted(peft_layer(prefix, layer) for layer in adapted)
    if prefix != "model.":  # other parts of the model have layers of the same names
        return rf"{re.escape(prefix)}layers\..*\.({'|'.join(leaves)})"
    return leaves


def _target_parameters(prefix: str, experts: Collection[str], every: Collection[str]) -> list[str]:
    """Return the same for parameters of experts: without the number of the block where all blocks have them."""
    ends = {name.split(".", 3)[3] for name in experts}
    num_blocks = len({block_of(name) for name in every})
    return sorted(ends if len(experts) == len(ends) * num_blocks else [peft_layer(prefix, name) for name in experts])

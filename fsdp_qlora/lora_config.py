"""Settings of LoRA and its relatives, in the same form as config.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from fsdp_qlora.quant.lora import ALL_LINEAR, LoraSettings, is_names, is_targets, parse_layers, parse_patterns
from fsdp_qlora.settings import Check, Rule


@dataclass(frozen=True)
class MethodSettings:
    """What is trained beside the frozen base, and how it begins."""

    # --- LoRA ---
    lora_rank: int = 64
    """Rank of the LoRA matrices."""

    lora_alpha: float = 16.0
    """LoRA scale: updates are multiplied by lora_alpha / lora_rank."""

    lora_dropout: float = 0.0
    """Dropout on the input of the LoRA branch; 0 is fastest."""

    lora_target_modules: str = ALL_LINEAR
    """'all-linear' (every linear layer of the decoder blocks), comma-separated names such as q_proj,v_proj, or a regular
    expression for whole names such as model.layers.0.self_attn.q_proj."""

    lora_init: Literal["default", "gaussian"] = "default"
    """Initial values of lora_A: default (Kaiming-uniform, as PEFT's) or gaussian (deviation 1 / rank); lora_B starts at
    0."""

    use_rslora: bool = False
    """Rank-stabilised LoRA: multiply updates by lora_alpha / sqrt(lora_rank)."""

    use_dora: bool = False
    """DoRA: train the lengths of the rows of each matrix apart from their directions. Slower, and keeps more activations."""

    layers_to_transform: str | None = None
    """Decoder blocks that get LoRA, such as 0-15 or 0,4,8-11, counted from 0; default: all."""

    rank_pattern: str | None = None
    """Other ranks for some layers: names or regular expressions with a rank each, such as q_proj=8,down_proj=32."""

    alpha_pattern: str | None = None
    """Other lora_alpha for some layers, in the same form."""

    loraplus_lr_ratio: float = 1.0
    """LoRA+: learning rate of lora_B (and DoRA's lengths), as a multiple of --lr; 1: the same for all."""

    adapter: str | None = None
    """Start from the matrices of this PEFT adapter or run folder; its own rank, alpha, targets and kind of LoRA count."""


DECIDED_BY_ADAPTER = (
    "lora_rank",
    "lora_alpha",
    "lora_target_modules",
    "lora_init",
    "use_rslora",
    "use_dora",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
)
"""Settings that must be left out beside --adapter."""

METHOD_SETTINGS = (*DECIDED_BY_ADAPTER, "adapter")
"""Settings that decide which matrices there are and what they compute."""


def lora_settings(config: MethodSettings) -> LoraSettings:
    """Return the settings of new adapters."""
    return LoraSettings(
        config.lora_rank,
        config.lora_alpha,
        config.lora_dropout,
        config.lora_target_modules,
        config.lora_init,
        config.use_rslora,
        config.use_dora,
        None if config.layers_to_transform is None else parse_layers(config.layers_to_transform),
        parse_patterns(config.rank_pattern or ""),
        parse_patterns(config.alpha_pattern or ""),
    )


def _parses(parse: Callable[[str], Any]) -> Callable[[str], bool]:
    def holds(text: str) -> bool:
        try:
            return bool(parse(text))
        except ValueError:
            return False

    return holds


def _is_ranks(text: str) -> bool:
    return all(value >= 1 and value.is_integer() for _, value in parse_patterns(text))


METHOD_RULES: dict[str, Rule] = {
    "lora_rank": Rule(lambda value: value >= 1, "at least 1"),
    "lora_alpha": Rule(lambda value: value > 0, "above 0"),
    "lora_dropout": Rule(lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "lora_target_modules": Rule(
        is_targets,
        "'all-linear', module names separated by commas, such as q_proj,v_proj, or a regular expression for whole names",
    ),
    "layers_to_transform": Rule(_parses(parse_layers), "block numbers and ranges separated by commas, such as 0-15,20"),
    "rank_pattern": Rule(
        lambda value: _parses(parse_patterns)(value) and _is_ranks(value),
        "pattern=rank pairs separated by commas, such as q_proj=8,down_proj=32, with ranks of at least 1",
    ),
    "alpha_pattern": Rule(
        lambda value: _parses(parse_patterns)(value) and all(alpha > 0 for _, alpha in parse_patterns(value)),
        "pattern=alpha pairs separated by commas, such as q_proj=8,down_proj=32, with values above 0",
    ),
    "loraplus_lr_ratio": Rule(lambda value: value > 0, "above 0"),
}


def _adapter_and_its_settings(config: MethodSettings) -> str | None:
    if config.adapter is None:
        return None
    defaults = {field.name: field.default for field in fields(MethodSettings)}
    given = [name for name in DECIDED_BY_ADAPTER if getattr(config, name) != defaults[name]]
    if given:
        written = " ".join(f"--{name}={getattr(config, name)}" for name in given)
        return f"--adapter={config.adapter} with {written}: the adapter's own config decides; leave it out"
    return None


def _layers_of_a_regex(config: MethodSettings) -> str | None:
    if config.layers_to_transform is not None and not is_names(config.lora_target_modules):
        return (
            f"--layers_to_transform={config.layers_to_transform} with the regular expression"
            f" --lora_target_modules={config.lora_target_modules}: put the blocks into the expression, or use names"
        )
    return None


METHOD_CHECKS: tuple[Check, ...] = (
    Check(("adapter", *DECIDED_BY_ADAPTER), _adapter_and_its_settings),
    Check(("layers_to_transform", "lora_target_modules"), _layers_of_a_regex),
)

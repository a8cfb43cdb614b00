"""Settings of LoRA and its relatives, in the same form as config.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from fsdp_qlora.quant.lora import (
    ALL_LINEAR,
    LoraSettings,
    is_names,
    is_targets,
    parse_layers,
    parse_modules,
    parse_names,
    parse_patterns,
    refused_with_experts,
)
from fsdp_qlora.settings import Check, Rule, show


@dataclass(frozen=True)
class LoraMatrices:
    """Which matrices LoRA has."""

    # --- LoRA ---
    lora_rank: int = 64
    """Rank of the LoRA matrices."""

    lora_target_modules: str = ALL_LINEAR
    """'all-linear' (every linear layer of the decoder blocks), comma-separated names such as q_proj,v_proj, or a regular
    expression for whole names such as model.layers.0.self_attn.q_proj."""

    layers_to_transform: str | None = None
    """Decoder blocks that get LoRA, such as 0-15 or 0,4,8-11, counted from 0; default: all."""

    rank_pattern: str | None = None
    """Other ranks for some layers: names or regular expressions with a rank each, such as q_proj=8,down_proj=32."""


@dataclass(frozen=True)
class LoraShape(LoraMatrices):
    """Which matrices LoRA has, and how they count."""

    # --- LoRA ---
    lora_alpha: float = 16.0
    """LoRA scale: updates are multiplied by lora_alpha / lora_rank."""

    use_rslora: bool = False
    """Rank-stabilised LoRA: multiply updates by lora_alpha / sqrt(lora_rank)."""

    alpha_pattern: str | None = None
    """Other lora_alpha for some layers, in the form of rank_pattern."""


@dataclass(frozen=True)
class WholeModules:
    """What is trained in full beside LoRA."""

    # --- LoRA ---
    modules_to_save: str | None = None
    """Modules trained whole beside LoRA and saved with it: embed_tokens, lm_head, or both with a comma between; default:
    none. Held in float32, with gradient and optimizer state, sharded over the ranks."""


@dataclass(frozen=True)
class TrainedSettings(WholeModules, LoraMatrices):
    """What decides, with the size of the matrices, how much memory training takes."""

    # --- LoRA ---
    lora_dropout: float = 0.0
    """Dropout on the input of the LoRA branch; 0 is fastest."""

    use_dora: bool = False
    """DoRA: train the lengths of the rows of each matrix apart from their directions. Slower, and keeps more activations."""

    lora_target_parameters: str | None = None
    """LoRA on the experts of a mixture of experts too: 'experts' for all their matrices, or comma-separated names of PEFT's
    target_parameters, such as mlp.experts.gate_up_proj,mlp.experts.down_proj; default: none. Each expert has matrices of
    lora_rank of its own."""


@dataclass(frozen=True)
class MethodSettings(TrainedSettings, LoraShape):
    """What is trained beside the frozen base, and how it begins."""

    # --- LoRA ---
    lora_init: Literal["default", "gaussian"] = "default"
    """Initial values of lora_A: default (Kaiming-uniform, as PEFT's) or gaussian (deviation 1 / rank); lora_B starts at
    0. For PiSSA and LoftQ see the command initialize."""

    loraplus_lr_ratio: float = 1.0
    """LoRA+: learning rate of lora_B (and DoRA's lengths), as a multiple of --lr; 1: the same for all."""

    adapter: str | None = None
    """Start from the matrices of this PEFT adapter or run folder; its own rank, alpha, targets and kind of LoRA count."""


@dataclass(frozen=True, kw_only=True)
class InitializeConfig(WholeModules, LoraShape):
    """Settings of making the adapter that a training starts from out of the base's matrices."""

    # --- input and output ---
    model: str
    """Alias, hub id (owner/name) or local folder with safetensors weights in 16 or 32 bits."""

    output_dir: str
    """Folder for the new adapter and, with pissa, the base it belongs to; empty or absent."""

    revision: str | None = None
    """Branch, tag or commit of a hub model; default: the main branch."""

    overwrite: bool = False
    """Replace what is in --output_dir."""

    max_shard_size: str = "5GB"
    """Size at which a new weight file is begun, in KB, MB or GB."""

    # --- method ---
    method: Literal["pissa", "loftq"] = "pissa"
    """pissa: train the largest singular directions, on a base that lacks them; loftq: begin with the best correction of
    the 4-bit error, on the base as it is (one step of LoftQ)."""

    iterations: int = 16
    """Iterations of the randomised singular value decomposition; 0: the exact one, which takes minutes for a large
    matrix."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code of the base in training."""

    double_quant: bool = True
    """Whether training quantises the block scales too."""

    seed: int = 42
    """Seed of the randomised decomposition."""

    # --- computation ---
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: on the GPU if there is one."""

    debug: bool = False
    """Show Python tracebacks of errors."""


DECIDED_BY_ADAPTER = (
    "lora_rank",
    "lora_alpha",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_init",
    "use_rslora",
    "use_dora",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)
"""Settings that must be left out beside --adapter."""

METHOD_SETTINGS = ("train_type", *DECIDED_BY_ADAPTER, "adapter")
"""Settings that decide which matrices there are and what they compute."""

FOR_LORA = (
    *DECIDED_BY_ADAPTER,
    "adapter",
    "lora_dropout",
    "loraplus_lr_ratio",
    "double_quant",
    "quant_storage",
    "compute_dtype",
)
"""Settings that mean nothing in full fine-tuning."""


def lora_settings(config: LoraMatrices) -> LoraSettings:
    """Return the settings of new adapters; what a command does not ask for keeps its default."""
    lora = LoraSettings(
        config.lora_rank,
        LoraShape.lora_alpha,
        target_modules=config.lora_target_modules,
        layers=None if config.layers_to_transform is None else parse_layers(config.layers_to_transform),
        rank_pattern=parse_patterns(config.rank_pattern or ""),
    )
    if isinstance(config, LoraShape):
        alphas = parse_patterns(config.alpha_pattern or "")
        lora = replace(lora, alpha=config.lora_alpha, use_rslora=config.use_rslora, alpha_pattern=alphas)
    if isinstance(config, WholeModules) and config.modules_to_save is not None:
        lora = replace(lora, modules_to_save=parse_modules(config.modules_to_save))
    if isinstance(config, TrainedSettings):
        experts = parse_names(config.lora_target_parameters) if config.lora_target_parameters is not None else ()
        lora = replace(
            lora,
            dropout=config.lora_dropout,
            use_dora=config.use_dora,
            target_parameters=experts,
        )
    if isinstance(config, MethodSettings):
        lora = replace(lora, init=config.lora_init)
    return lora


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
    "lora_target_parameters": Rule(
        _parses(parse_names), "'experts', or names of parameters separated by commas, such as mlp.experts.down_proj"
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
    "modules_to_save": Rule(_parses(parse_modules), "embed_tokens, lm_head, or both separated by a comma"),
    "iterations": Rule(lambda value: value >= 0, "at least 0"),
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


def _layers_of_a_regex(config: LoraMatrices) -> str | None:
    if config.layers_to_transform is not None and not is_names(config.lora_target_modules):
        return (
            f"--layers_to_transform={config.layers_to_transform} with the regular expression"
            f" --lora_target_modules={config.lora_target_modules}: put the blocks into the expression, or use names"
        )
    return None


def _full_beside_lora(config: Any) -> str | None:
    if config.train_type != "full":
        return None
    given = [
        field for field in fields(config) if field.name in FOR_LORA and getattr(config, field.name) != field.default
    ]
    names = [*(field.name for field in given), *(["quant_type"] if config.base_form != "none" else [])]
    if not names:
        return None
    written = " ".join(f"--{name}={show(getattr(config, name))}" for name in names)
    return (
        f"--train_type=full with {written}: all parameters are trained in float32, without LoRA and without a quantised"
        " base; leave it out, or use --train_type=lora"
    )


def _fp8_of_no_bf16(config: Any) -> str | None:
    if config.compute_dtype == "fp8" and config.precision == "fp32":
        return "--compute_dtype=fp8 with --precision=fp32: GPUs give fp8 products in bf16; use --precision=bf16"
    return None


def _kind_of_experts(config: TrainedSettings) -> str | None:
    if config.lora_target_parameters is None:
        return None
    refusal = refused_with_experts(config.lora_dropout, config.use_dora)
    return None if refusal is None else f"--lora_target_parameters={config.lora_target_parameters} with {refusal}"


SHAPE_CHECKS: tuple[Check, ...] = (Check(("layers_to_transform", "lora_target_modules"), _layers_of_a_regex),)

TRAINED_CHECKS: tuple[Check, ...] = (
    Check(("lora_target_parameters", "lora_dropout", "use_dora"), _kind_of_experts),
    Check(("train_type", "quant_type"), _full_beside_lora),
    Check(("compute_dtype", "precision"), _fp8_of_no_bf16),
    *SHAPE_CHECKS,
)

METHOD_CHECKS: tuple[Check, ...] = (Check(("adapter", *DECIDED_BY_ADAPTER), _adapter_and_its_settings), *TRAINED_CHECKS)

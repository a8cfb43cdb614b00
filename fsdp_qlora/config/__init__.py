"""Every setting, written once: the command line, its help, the README table and run.json are made from it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, TypeVar, overload

from fsdp_qlora import settings
from fsdp_qlora.config.command import DataConfig as DataConfig
from fsdp_qlora.config.command import DoctorConfig as DoctorConfig
from fsdp_qlora.config.command import EvaluateConfig as EvaluateConfig
from fsdp_qlora.config.command import GenerateConfig as GenerateConfig
from fsdp_qlora.config.command import PlanConfig as PlanConfig
from fsdp_qlora.config.command import ReportConfig as ReportConfig
from fsdp_qlora.config.data import BaseSettings, DataSettings, is_named_datasets
from fsdp_qlora.config.export import MergeConfig as MergeConfig
from fsdp_qlora.config.export import PushConfig as PushConfig
from fsdp_qlora.config.export import QuantizeConfig as QuantizeConfig
from fsdp_qlora.config.export import is_size
from fsdp_qlora.config.lora import METHOD_CHECKS, METHOD_RULES, SHAPE_CHECKS, TRAINED_CHECKS, MethodSettings
from fsdp_qlora.config.lora import InitializeConfig as InitializeConfig
from fsdp_qlora.config.other_names import OTHER_NAMES
from fsdp_qlora.settings import Check, Rule, Scalar

T = TypeVar("T")


@dataclass(frozen=True)
class TrainConfig(BaseSettings, MethodSettings, DataSettings):
    """Settings of one fine-tuning run. The text under each field is its documentation everywhere."""

    # --- base weights ---
    quant_storage: Literal["float32", "uint8", "bfloat16", "float16"] = "float32"
    """dtype under which FSDP holds the packed bytes; float32 is exact everywhere, uint8 needs torch >= 2.12."""

    verify_weights: bool = True
    """Check at the start that every block's gathered bytes are those that were loaded; stops on a mismatch."""

    # --- distribution and memory ---
    sharding: Literal["full", "hybrid", "none"] = "full"
    """full: the base is sharded over all ranks; hybrid: over the ranks of each node, so that only LoRA's gradients cross
    between nodes; none: every rank holds all of it (data parallel), faster if it fits."""

    loading: Literal["read", "broadcast"] = "read"
    """read: every copy of the base is read from the checkpoint, by the ranks that hold it; broadcast: only one, and sent to
    the others, for slow shared disks. With --sharding hybrid the first node reads, with none rank 0."""

    cpu_offload: str = "auto"
    """Blocks whose 4-bit weights rest in pinned CPU memory: auto (as few as needed), none, a number, or all (then
    embedding, head and LoRA too)."""

    activation_checkpointing: str = "auto"
    """Blocks of which only the input is kept, and which are computed again in backward: auto (as few as needed), none,
    a number, or full."""

    activation_offload: bool = False
    """Keep the inputs of checkpointed blocks in pinned CPU memory; false: only if --activation_checkpointing auto has to."""

    gpu_memory: str | None = None
    """GiB a rank may take of its GPU, for the autos: one number, or one per rank; default: what is free."""

    cpu_memory: float | None = None
    """GiB of RAM that the ranks of a machine may take together, for the autos; default: what is available."""

    compile: Literal["auto", "off"] = "auto"
    """torch.compile each decoder block; auto: on GPUs. The first step takes up to a minute more, the others a fifth less."""

    timeout_s: int = 1800
    """Seconds without progress (a download, a block loaded, a step) after which the run stops and says which rank hangs."""

    step_timeout_s: int | None = None
    """The same once training has begun, for one step, evaluation batch or save; default: --timeout_s."""

    download_timeout_s: int = 21600
    """Seconds that ranks wait for the model's download, by one process of each node, or of all that share HF_HOME."""

    # --- training ---
    batch_size: int = 1
    """Sequences per GPU and micro-batch."""

    gradient_accumulation_steps: int = 4
    """Micro-batches per optimizer step; one step sees batch_size x accumulation x ranks sequences."""

    num_epochs: int = 1
    """Passes over the training data; --max_steps, if given, decides instead."""

    max_steps: int = -1
    """Optimizer steps; -1: as many as num_epochs gives."""

    lr: float = 2e-4
    """Peak learning rate of AdamW; full fine-tuning takes a tenth of LoRA's or less."""

    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or falling to 0 linearly or along a cosine."""

    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises from 0."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay of all that is trained."""

    adam_beta1: float = 0.9
    """AdamW's decay of the first moment."""

    adam_beta2: float = 0.999
    """AdamW's decay of the second moment."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""

    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss of mixture-of-experts models; default: as the model's config.json says, which mostly
    is 0 (a router_aux_loss_coef there counts only with output_router_logits)."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """dtype of the computation; auto: bf16 on GPUs, fp32 on CPUs. What is trained is always held in float32, with its
    gradients and the optimizer's state."""

    # --- evaluation and output ---
    eval_steps: int = 0
    """Evaluate every N optimizer steps, besides before the first and after the last; 0: only those two."""

    early_stopping_patience: int = 0
    """Stop after so many evaluations in a row without a lower loss than before; 0: never."""

    keep_best: bool = False
    """Keep the adapter (or model) of the evaluation with the lowest loss, in the folder best of --output_dir."""

    sample_prompts: str | None = None
    """Text file with one prompt a line; the model's answers are shown and logged at every evaluation."""

    max_new_tokens: int = 64
    """Tokens of such an answer at most."""

    logging_steps: int = 1
    """Write metrics every N optimizer steps."""

    output_dir: str = "runs/default"
    """Folder for adapter or model, checkpoints, metrics.jsonl, run.json and exit.json; for a run already in it see
    --resume."""

    overwrite: bool = False
    """Start over in an --output_dir that holds an earlier run, and delete its results and checkpoints."""

    save_steps: int = 100
    """Save a checkpoint every N optimizer steps, besides at the end and when a signal stops the run; 0: only those."""

    save_total_limit: int = 2
    """Checkpoints that are kept, the newest ones; at least 2, so that a damaged one costs little."""

    resume: str = "auto"
    """auto: go on from the newest intact checkpoint in --output_dir, if any; none: never; or the path of a checkpoint
    (step-000100) or of another run's folder, to start from while --output_dir has no checkpoint of its own."""

    log_to: str = "none"
    """Trackers besides metrics.jsonl: none, or wandb and tensorboard separated by commas. One that fails never stops the
    run."""

    run_name: str | None = None
    """Name of the run in the tracker; default: the last part of --output_dir."""

    profile: bool = False
    """Write a trace of the 4th to 6th step of every rank, profile-rank-N.json.gz in --output_dir, for trace viewers."""

    memory_snapshot: bool = False
    """Write the GPU memory's history over the first 6 steps, or up to an error, memory-rank-N.pickle in --output_dir, for
    PyTorch's viewer."""

    debug: bool = False
    """Show Python tracebacks of errors."""


def to_dict(config: DataSettings | GenerateConfig | PlanConfig) -> dict[str, Scalar]:
    """Return the settings as plain values, in the order of their definition."""
    return dataclasses.asdict(config)


@overload
def parse(overrides: Mapping[str, object], config_file: str | None = None) -> TrainConfig: ...
@overload
def parse(overrides: Mapping[str, object], config_file: str | None, cls: type[T]) -> T: ...
def parse(overrides: Mapping[str, object], config_file: str | None = None, cls: type[Any] = TrainConfig) -> Any:
    """Make settings from defaults, then a flat YAML file, then overrides, which may be raw command-line strings.

    Raises:
        ConfigError: every problem found, one a line, each with value, rule and remedy.
    """
    return settings.parse(cls, overrides, config_file, RULES, CHECKS.get(cls, ()), OTHER_NAMES)


def _at_least(limit: int) -> Rule:
    return Rule(lambda value: value >= limit, f"at least {limit}")


def _above(limit: int) -> Rule:
    return Rule(lambda value: value > limit, f"above {limit}")


def _number_or(*words: str) -> Rule:
    return Rule(lambda value: value in words or value.isdecimal(), f"{', '.join(words)} or a number of blocks")


def _is_sizes(text: str) -> bool:
    return all(re.fullmatch(r"\s*\d+(\.\d+)?\s*", size) and float(size) > 0 for size in text.split(","))


def _is_safe_path(path: str) -> bool:
    return path.isprintable() and all(len(os.fsencode(part)) <= 255 for part in PurePath(path).parts)


TRACKERS = ("wandb", "tensorboard")
"""What --log_to may name; metrics.py has the class of each."""


def _is_trackers(text: str) -> bool:
    return text == "none" or all(name.strip() in TRACKERS for name in text.split(","))


_HUB_ID = Rule(lambda value: re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", value) is not None, "owner/name")
_SHARE = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")

RULES: dict[str, Rule] = {
    "dataset_weights": Rule(_is_sizes, "a number above 0 for each dataset, separated by commas"),
    "eval_dataset": Rule(
        is_named_datasets, "one dataset, or name=dataset pairs with different names and commas between"
    ),
    "context_length": _at_least(8),
    "eval_split": _SHARE,
    **METHOD_RULES,
    "router_aux_loss_coef": _at_least(0),
    "cpu_offload": _number_or("auto", "none", "all"),
    "activation_checkpointing": _number_or("auto", "none", "full"),
    "gpu_memory": Rule(_is_sizes, "a number of GiB above 0, or several separated by commas"),
    "cpu_memory": _above(0),
    "gpus": _at_least(1),
    "nodes": _at_least(1),
    "gpu_tflops": _above(0),
    "host_bandwidth": _above(0),
    "link_bandwidth": _above(0),
    "node_bandwidth": _above(0),
    "timeout_s": _at_least(1),
    "step_timeout_s": _at_least(1),
    "download_timeout_s": _at_least(1),
    "batch_size": _at_least(1),
    "gradient_accumulation_steps": _at_least(1),
    "num_epochs": _at_least(1),
    "max_steps": Rule(lambda value: value == -1 or value >= 1, "-1 (no limit) or at least 1"),
    "lr": _above(0),
    "warmup_ratio": Rule(lambda value: 0 <= value <= 1, "from 0 to 1"),
    "weight_decay": _at_least(0),
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "max_grad_norm": _at_least(0),
    "seed": Rule(lambda value: 0 <= value < 2**32, "from 0 to 4294967295"),
    "eval_steps": _at_least(0),
    "save_steps": _at_least(0),
    "save_total_limit": _at_least(2),
    "early_stopping_patience": _at_least(0),
    "logging_steps": _at_least(1),
    "output_dir": Rule(
        _is_safe_path, "a path without line breaks whose parts have at most 255 bytes; choose a shorter name"
    ),
    "log_to": Rule(_is_trackers, f"none, or some of {', '.join(TRACKERS)} separated by commas"),
    "repo": _HUB_ID,
    "base_model": _HUB_ID,
    "max_shard_size": Rule(is_size, "a number with KB, MB or GB, such as 5GB"),
    "max_new_tokens": _at_least(1),
    "offload_blocks": _at_least(0),
    "num_samples": _at_least(0),
    "temperature": _at_least(0),
}
"""What a value must be; a name means the same in every command."""


def _offload_without_shards(config: TrainConfig | PlanConfig) -> str | None:
    if config.sharding == "none" and config.cpu_offload not in ("auto", "none", "0"):
        return (
            f"--sharding=none with --cpu_offload={config.cpu_offload}: every rank would hold its own copy in CPU memory;"
            " use --sharding=full"
        )
    return None


def _broadcast_without_copies(config: TrainConfig) -> str | None:
    if config.loading == "broadcast" and config.sharding == "full":
        return "--loading=broadcast with --sharding=full: there is one copy of the base, read once; use --loading=read"
    return None


def _offload_of_nothing(config: TrainConfig | PlanConfig) -> str | None:
    if config.activation_offload and config.activation_checkpointing in ("none", "0"):
        return (
            f"--activation_offload with --activation_checkpointing={config.activation_checkpointing}: only inputs of"
            " checkpointed blocks can rest on the CPU; use --activation_checkpointing=full"
        )
    return None


def _sizes_of_gpus(config: PlanConfig) -> str | None:
    num_sizes = len(config.gpu_memory.split(","))
    if num_sizes not in (1, config.gpus):
        return f"--gpu_memory={config.gpu_memory}: {num_sizes} sizes for --gpus={config.gpus}; give one, or one per GPU"
    return None


def _evaluation_without_rows(config: TrainConfig) -> str | None:
    if config.eval_steps and not config.eval_split and config.eval_dataset is None:
        return (
            f"--eval_steps={config.eval_steps} with --eval_split=0: no rows to evaluate on; "
            "give --eval_dataset or an --eval_split above 0"
        )
    return None


def _overwrite_what_is_resumed(config: TrainConfig) -> str | None:
    if config.overwrite and config.resume not in ("auto", "none"):
        return f"--overwrite with --resume={config.resume}: starts over or goes on, not both; leave one of them out"
    return None


def _best_of_no_evaluations(config: TrainConfig) -> str | None:
    given = f"--early_stopping_patience={config.early_stopping_patience}" if config.early_stopping_patience else ""
    given = given or ("--keep_best" if config.keep_best else "")
    if given and not config.eval_steps:
        return f"{given} without --eval_steps: there are no evaluations in between; give --eval_steps"
    return None


def _uint8_on_old_torch(config: TrainConfig) -> str | None:
    installed = importlib.metadata.version("torch")  # not torch.__version__: importing torch takes seconds
    major, minor = (int(part) for part in installed.split(".")[:2])
    if config.quant_storage == "uint8" and (major, minor) < (2, 12):
        return (
            f"--quant_storage=uint8: torch {installed} refuses to shard integer parameters; "
            "use --quant_storage=float32 or torch 2.12 or newer"
        )
    return None


def _weights_of_datasets(config: DataSettings) -> str | None:
    num_datasets = len(config.dataset.split(","))
    if config.dataset_weights is not None and len(config.dataset_weights.split(",")) != num_datasets:
        return f"--dataset_weights={config.dataset_weights} for {num_datasets} datasets; give one number for each"
    return None


def _no_model(config: EvaluateConfig | GenerateConfig) -> str | None:
    if config.adapter is None and config.model is None:
        return "neither --adapter nor --model is given; name a training run, or a model"
    return None


def _answers_of_nothing(config: EvaluateConfig) -> str | None:
    if config.save_answers is not None and not config.exact_match:
        return f"--save_answers={config.save_answers} without --exact_match: there are no answers; add --exact_match"
    return None


CHECKS: dict[type, tuple[Check, ...]] = {
    DataConfig: (Check(("dataset", "dataset_weights"), _weights_of_datasets),),
    EvaluateConfig: (
        Check(("adapter", "model"), _no_model),
        Check(("save_answers", "exact_match"), _answers_of_nothing),
    ),
    GenerateConfig: (Check(("adapter", "model"), _no_model),),
    InitializeConfig: SHAPE_CHECKS,
    TrainConfig: (
        *METHOD_CHECKS,
        Check(("dataset", "dataset_weights"), _weights_of_datasets),
        Check(("sharding", "loading"), _broadcast_without_copies),
        Check(("sharding", "cpu_offload"), _offload_without_shards),
        Check(("activation_offload", "activation_checkpointing"), _offload_of_nothing),
        Check(("eval_steps", "eval_split", "eval_dataset"), _evaluation_without_rows),
        Check(("early_stopping_patience", "keep_best", "eval_steps"), _best_of_no_evaluations),
        Check(("quant_storage",), _uint8_on_old_torch),
        Check(("overwrite", "resume"), _overwrite_what_is_resumed),
    ),
    PlanConfig: (
        *TRAINED_CHECKS,
        Check(("sharding", "cpu_offload"), _offload_without_shards),
        Check(("activation_offload", "activation_checkpointing"), _offload_of_nothing),
        Check(("gpu_memory", "gpus"), _sizes_of_gpus),
    ),
}
"""Combinations that cannot work, of each command's settings."""

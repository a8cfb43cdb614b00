"""Adapters in PEFT's format: gathered from all ranks, checked, written; and read again."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from fsdp_qlora.distributed import Ranks, agree_on_errors
from fsdp_qlora.errors import CheckpointError, ModelError
from fsdp_qlora.files import FileRecord, write_new, write_tensors
from fsdp_qlora.output_files import CONFIG_FILE, WEIGHTS_FILE, find_adapter
from fsdp_qlora.parallel import LossModel
from fsdp_qlora.quant.adapt import LoraSettings, lora_linears
from fsdp_qlora.quant.linear import LoRALinear

PREFIX = "base_model.model."

UNSUPPORTED = (
    "use_dora",
    "use_rslora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "alora_invocation_tokens",
)
"""Fields of PEFT's LoraConfig that change what an adapter computes, or which of its matrices count."""


def full_tensor(parameter: Tensor, device: torch.device) -> Tensor:
    """Return a whole parameter on the CPU; every rank must take part."""
    value = parameter.detach()
    if isinstance(value, DTensor):
        moved = value.to(device)
        assert isinstance(moved, DTensor)
        value = moved.full_tensor()
    return value.to("cpu", copy=True)  # a copy also where it already is there: training goes on while it is written


def gather_adapter(root: LossModel, ranks: Ranks) -> dict[str, Tensor]:
    """Return the LoRA matrices by PEFT's names, float32 on the CPU: lora_A [r, in], lora_B [out, r].

    Raises:
        CheckpointError: a matrix has not its full shape, or holds NaN.
    """
    return dict(adapter_matrices(root, ranks))


def adapter_matrices(root: LossModel, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Gather one matrix after the other, as `gather_adapter` returns them; every rank must take all."""
    for linear in lora_linears(root):
        if linear.lora_A is None or linear.lora_B is None:
            continue
        rank = linear.lora_A.shape[0]
        for part, parameter, shape in (
            ("lora_A", linear.lora_A, (rank, linear.in_features)),
            ("lora_B", linear.lora_B, (linear.out_features, rank)),
        ):
            value = full_tensor(parameter, ranks.device)
            name = f"{PREFIX}{root.adapter_prefix}{linear.name.removeprefix('model.')}.{part}.weight"
            if value.shape != shape or not bool(value.isfinite().all()):
                raise CheckpointError(
                    f"'{name}' has shape {list(value.shape)} (expected {list(shape)}) or is not finite"
                )
            yield name, value.contiguous()


def adapter_config(root: LossModel, lora: LoraSettings, base_model: str) -> dict[str, Any]:
    """Return PEFT's LoraConfig for the adapter as a dict."""
    names = sorted({linear.name.rpartition(".")[2] for linear in lora_linears(root) if linear.lora_A is not None})
    targets: list[str] | str = names
    if root.adapter_prefix != "model.":  # other parts of the model have layers of the same names
        targets = rf"{re.escape(root.adapter_prefix)}layers\..*\.({'|'.join(names)})"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, FileRecord]:
    """Write an adapter's two files into an existing folder and return what they must hold, by name."""
    text = json.dumps(config, indent=2) + "\n"
    return {
        WEIGHTS_FILE: write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"}),
        CONFIG_FILE: write_new(folder / CONFIG_FILE, [text.encode()]),
    }


def save_adapter(root: LossModel, lora: LoraSettings, base_model: str, folder: Path, ranks: Ranks) -> None:
    """Write the adapter in PEFT's format. Every rank must call this; rank 0 writes.

    Raises:
        CheckpointError, on every rank: incomplete matrices, or a folder that cannot be written.
    """
    tensors = {name: value for name, value in adapter_matrices(root, ranks) if ranks.is_main}
    with agree_on_errors(ranks, "saving the adapter"):
        if not ranks.is_main:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder.with_name(f"{folder.name}.partial")
            partial.mkdir(exist_ok=True)
            for name in write_adapter(partial, tensors, adapter_config(root, lora, base_model)):
                (partial / name).replace(folder / name)
            partial.rmdir()
        except OSError as error:
            raise CheckpointError(
                f"{folder}: the adapter cannot be written ({error.strerror}); free space or choose another --output_dir"
            ) from error


def read_adapter_config(folder: Path, applied: Collection[str] = ()) -> dict[str, Any]:
    """Return an adapter's config.

    Args:
        applied: fields of UNSUPPORTED that the caller applies.

    Raises:
        CheckpointError: files missing or unreadable, or a kind of adapter that the caller does not apply.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{folder}: no {missing[0]}; --adapter names a PEFT adapter folder")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: the adapter is unreadable ({error}); save or copy it again") from error
    unsupported = [key for key in UNSUPPORTED if config.get(key) and key not in applied]
    if config.get("peft_type") != "LORA" or unsupported or rank < 1 or alpha <= 0:
        raise CheckpointError(
            f"{folder}: only plain LoRA adapters are read; this one uses {unsupported or config.get('peft_type')}"
        )
    return config


def matrix_name(name: str) -> str:
    """Return '<layer name>.lora_A' or '.lora_B' for a tensor of an adapter file."""
    return name.removeprefix(PREFIX).replace("model.language_model.", "model.", 1).removesuffix(".weight")


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter with what is needed to put it on its base."""

    folder: Path
    base: str
    """Alias, hub id or folder of the base model."""

    lora: LoraSettings
    matrices: dict[str, Tensor]


def open_adapter(folder: Path, base: str | None) -> TrainedAdapter:
    """Return the adapter of a PEFT folder or of a run's --output_dir.

    Args:
        base: the base model to use; None: the one that the adapter names.

    Raises:
        CheckpointError: as `read_adapter`.
        ModelError: no base is known.
    """
    folder = find_adapter(folder)
    config, matrices = read_adapter(folder)
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{folder}: the adapter does not name its base model; give it with --model")
    targets = sorted({name.split(".")[-2] for name in matrices})
    lora = LoraSettings(int(config["r"]), float(config["lora_alpha"]), target_modules=",".join(targets))
    return TrainedAdapter(folder, base, lora, matrices)


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter's config and its matrices by '<layer name>.lora_A' / '.lora_B', float32.

    Raises:
        CheckpointError: files missing or unreadable, or a kind of adapter that this program does not apply.
    """
    config = read_adapter_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the adapter is unreadable ({error}); save or copy it again") from error
    return config, {matrix_name(name): value.float() for name, value in tensors.items()}


def check_adapter(matrices: Mapping[str, Tensor], linears: list[LoRALinear]) -> None:
    """Raise CheckpointError unless the matrices are exactly those of the layers, with their shapes."""
    expected = {}
    for linear in linears:
        for part in ("lora_A", "lora_B"):
            parameter = getattr(linear, part)
            if parameter is not None:
                expected[f"{linear.name}.{part}"] = tuple(parameter.shape)
    found = {name: tuple(value.shape) for name, value in matrices.items()}
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"adapter matrix '{name}' has shape {found.get(name, 'none')}; this base expects"
                f" {expected.get(name, 'none')}: the adapter belongs to another base model"
            )

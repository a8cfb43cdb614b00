"""Adapters in PEFT's format: gathered from all ranks, checked, written; and read again."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from fsdp_qlora.distributed import Ranks, agree_on_errors, all_gather_single
from fsdp_qlora.errors import CheckpointError, ModelError
from fsdp_qlora.files import FileRecord, write_new, write_tensors
from fsdp_qlora.models.vocabulary import trained_vocabularies
from fsdp_qlora.output_files import CONFIG_FILE, WEIGHTS_FILE, find_adapter, read_record
from fsdp_qlora.parallel import LossModel
from fsdp_qlora.peft_format import (
    PREFIX,
    file_name,
    is_expert_parameter,
    layer_config,
    matrix_names,
    whole_config,
    whole_names,
)
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, lora_layers, lora_linears
from fsdp_qlora.quant.expert_lora import ExpertLora
from fsdp_qlora.quant.linear import LoRALinear
from fsdp_qlora.quant.lora import VOCABULARY, pattern_value, whole_modules

STEP = "optimizer_step"
"""Where the file of the matrices says after which step they were saved."""

UNSUPPORTED = ("lora_bias", "alora_invocation_tokens", "layer_replication", "trainable_token_indices", "use_qalora")
"""Fields of PEFT's LoraConfig that change what an adapter computes, or which of its matrices count."""


def gather(parameter: Tensor, device: torch.device) -> Tensor:
    """Return a whole parameter, on the device if it is sharded; every rank must take part.

    DTensor.full_tensor does this too, but crashes where ranks share a GPU through gloo (torch 2.11).
    """
    value = parameter.detach()
    if not isinstance(value, DTensor):
        return value
    assert value.placements[-1] == Shard(0), value.placements
    group = value.device_mesh.get_group(value.device_mesh.ndim - 1)
    num_rows, held = value.shape[0], value.to_local()
    rows_each = -(-num_rows // group.size())  # the last ranks may hold fewer, or none
    padded = held.new_zeros((rows_each, *held.shape[1:]), device=device)
    padded[: held.shape[0]] = held
    whole = padded.new_empty((rows_each * group.size(), *held.shape[1:]))
    all_gather_single(whole, padded, group)
    return whole[:num_rows]


def full_tensor(parameter: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a whole parameter on the CPU, where it stays as it is; every rank must take part."""
    return gather(parameter, device).to("cpu", copy=True)


def gather_adapter(root: LossModel, ranks: Ranks) -> dict[str, Tensor]:
    """Return what is trained by PEFT's names, float32 on the CPU: lora_A [r, in], lora_B [out, r], with DoRA
    lora_magnitude_vector [out], and the modules_to_save.

    Raises:
        CheckpointError: a matrix has not its full shape, or holds NaN.
    """
    return dict(adapter_matrices(root, ranks))


def adapter_matrices(root: LossModel, ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Gather one matrix after the other, as `gather_adapter` returns them; every rank must take all."""
    prefix, layers = root.adapter_prefix, list(lora_layers(root))
    experts = {layer.name for layer in layers if isinstance(layer, ExpertLora)}
    for layer in layers:
        for part, parameter in layer.adapter():
            value = full_tensor(parameter, ranks.device)
            name = file_name(prefix, layer.name, part, experts)
            yield name, _checked(name, value, layer.adapter_shape(part))
    for whole, module in trained_vocabularies(root.model):
        value = full_tensor(module.weight, ranks.device)
        for name in whole_names(prefix, whole, root.tied):
            yield name, _checked(name, value, (module.num_rows, value.shape[1]))


def _checked(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if value.shape != shape or not bool(value.isfinite().all()):
        raise CheckpointError(f"'{name}' has shape {list(value.shape)} (expected {list(shape)}) or is not finite")
    return value.contiguous()


def adapter_config(root: LossModel, lora: LoraSettings, base_model: str) -> dict[str, Any]:
    """Return PEFT's LoraConfig for the adapter of a model as a dict."""
    adapted, every = {layer.name for layer in lora_layers(root)}, [linear.name for linear in lora_linears(root)]
    experts = adapted.difference(every)
    config = layer_config(lora, base_model, root.adapter_prefix, adapted - experts, every, experts)
    return config | whole_config(whole_modules(lora, root.tied), root.tied)


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], step: int | None = None
) -> dict[str, FileRecord]:
    """Write an adapter's two files into an existing folder and return what they must hold, by name.

    Args:
        step: noted beside the matrices, for `trained_step`.
    """
    text = json.dumps(config, indent=2) + "\n"
    metadata = {"format": "pt"} if step is None else {"format": "pt", STEP: str(step)}
    return {
        WEIGHTS_FILE: write_tensors(folder / WEIGHTS_FILE, tensors, metadata),
        CONFIG_FILE: write_new(folder / CONFIG_FILE, [text.encode()]),
    }


def trained_step(folder: Path) -> int | None:
    """Return the optimizer step whose adapter or model a folder holds; None if there is none, or it does not say."""
    path = min(folder.glob("model*.safetensors"), default=folder / WEIGHTS_FILE)
    try:
        with safe_open(path, framework="pt") as file:
            step = (file.metadata() or {}).get(STEP)
    except (OSError, SafetensorError):
        return None
    return None if step is None else int(step)


def save_adapter(
    root: LossModel, lora: LoraSettings, base_model: str, folder: Path, ranks: Ranks, step: int | None = None
) -> None:
    """Write the adapter in PEFT's format. Every rank must call this; rank 0 writes.

    Args:
        step: as for `write_adapter`.

    Raises:
        CheckpointError, on every rank: incomplete matrices, or a folder that cannot be written.
    """
    tensors = {name: value for name, value in adapter_matrices(root, ranks) if ranks.is_main}
    with agree_on_errors(ranks, "saving the adapter"):
        if ranks.is_main:
            replace_adapter(folder, tensors, adapter_config(root, lora, base_model), step)


def replace_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], step: int | None = None
) -> None:
    """Write an adapter's files beside the folder and put them into it once they are whole.

    Args:
        step: as for `write_adapter`.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(exist_ok=True)
        for name in write_adapter(partial, tensors, config, step):
            (partial / name).replace(folder / name)
        partial.rmdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the adapter cannot be written ({error.strerror}); free space or choose another --output_dir"
        ) from error


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return an adapter's config.

    Raises:
        CheckpointError: files missing or unreadable, or a kind of adapter that this program does not apply.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).exists()]
    if missing:
        saved = sorted((folder / "checkpoints").glob("step-*/adapter"))
        other = f", or {saved[-1]}, the newest one of this unfinished run" if saved else ""
        what = f"no {missing[0]}" if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: {what}; give the --output_dir of a training run or a PEFT adapter's{other}")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        alphas = [value for _, value in pattern_pairs(config, "alpha_pattern")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: the adapter is unreadable ({error}); save or copy it again") from error
    unsupported = [key for key in UNSUPPORTED if config.get(key)]
    others = {name.rpartition(".")[2] for name in config.get("modules_to_save") or []} - VOCABULARY.keys()
    unsupported += [f"modules_to_save {name}" for name in sorted(others)]
    if config.get("peft_type") != "LORA" or unsupported or rank < 1 or min([alpha, *alphas]) <= 0:
        raise CheckpointError(
            f"{folder}: only LoRA adapters with rank and alpha above 0 are read; this one uses"
            f" {unsupported or config.get('peft_type')}"
        )
    return config


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter with what is needed to put it on its base."""

    folder: Path
    base: str
    """Alias, hub id or folder of the base model."""

    named_base: str | None
    """The one that its config names."""

    revision: str | None
    """Branch, tag or commit of the base, if it is a hub model; None: the main branch."""

    lora: LoraSettings
    matrices: dict[str, Tensor]

    @property
    def quant(self) -> QuantSettings:
        """The form of the base in training, as the run's record says; the default without one."""
        base = read_record(self.folder).get("base", {})
        return QuantSettings(base.get("quant_type", "nf4"), base.get("double_quant", True))


def open_adapter(folder: Path, base: str | None, revision: str | None = None) -> TrainedAdapter:
    """Return the adapter of a PEFT folder or of a run's --output_dir.

    Args:
        base, revision: as `base_of`.

    Raises:
        CheckpointError: as `read_adapter`.
        ModelError: no base is known.
    """
    folder = find_adapter(folder)
    config = read_adapter_config(folder)
    matrices, names = _read_matrices(folder, config)
    base, revision = base_of(folder, base, revision)
    named = config.get("base_model_name_or_path")
    return TrainedAdapter(folder, base, named, revision, _settings_of(config, matrices, names), matrices)


def base_of(folder: Path, base: str | None, revision: str | None) -> tuple[str, str | None]:
    """Return the base model to use with an adapter, and its revision.

    Args:
        folder: the adapter's own.
        base: the one asked for; None: the one that the adapter names.
        revision: the one asked for; None: that of the run that trained the adapter, unless another base is asked for.

    Raises:
        CheckpointError: as `read_adapter_config`.
        ModelError: no base is known.
    """
    found = base or read_adapter_config(folder).get("base_model_name_or_path")
    if not found:
        raise ModelError(f"{folder}: the adapter does not name its base model; give it with --model")
    if base is None and revision is None:
        revision = read_record(folder).get("config", {}).get("revision")
    return found, revision


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an adapter's config and its matrices by '<layer name>.<part>' (see `matrix_names`), float32.

    Raises:
        CheckpointError: files missing or unreadable, or a kind of adapter that this program does not apply.
    """
    config = read_adapter_config(folder)
    return config, _read_matrices(folder, config)[0]


def _read_matrices(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the matrices, and their names in the file, both by '<layer name>.<part>'."""
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
        names = matrix_names(tensors, config.get("target_parameters"))
        return {name: tensors[own].float() for name, own in names.items()}, names
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the adapter is unreadable ({error}); save or copy it again") from error


def _settings_of(config: Mapping[str, Any], matrices: Mapping[str, Tensor], names: Mapping[str, str]) -> LoraSettings:
    """Return the settings that make exactly the layers of an adapter's file, each with its own rank and alpha.

    PEFT's patterns are for names in the model it applies an adapter to, which the file has, so they are resolved here.

    Args:
        names: those in the file, by those of the matrices.
    """
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    rank_pairs, alpha_pairs = (pattern_pairs(config, kind) for kind in ("rank_pattern", "alpha_pattern"))
    ranks, alphas, experts = {}, {}, []
    for name in matrices:
        layer, _, part = name.rpartition(".")
        if part != "lora_A":
            continue
        in_peft, ranks[layer] = names[name].removeprefix(PREFIX).removesuffix(".lora_A.weight"), len(matrices[name])
        if is_expert_parameter(layer):  # lora_A holds the rank once for each expert
            in_peft, ranks[layer] = layer, int(pattern_value(rank_pairs, layer, rank))
            experts.append(layer)
        alphas[layer] = pattern_value(alpha_pairs, in_peft, alpha)
    return LoraSettings(
        rank,
        alpha,
        target_modules=",".join(sorted(set(ranks).difference(experts))),
        target_parameters=tuple(sorted(experts)),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        rank_pattern=tuple((re.escape(layer), own) for layer, own in ranks.items() if own != rank),
        alpha_pattern=tuple((re.escape(layer), own) for layer, own in alphas.items() if own != alpha),
        **saved_modules(config),
    )


def pattern_pairs(config: Mapping[str, Any], kind: str) -> list[tuple[str, float]]:
    """Return the pairs of pattern and value of an adapter's config.

    Args:
        kind: rank_pattern or alpha_pattern.
    """
    return [(pattern, float(value)) for pattern, value in (config.get(kind) or {}).items()]


def saved_modules(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an adapter's config says of modules that were trained whole, as arguments of LoraSettings."""
    names = {name.rpartition(".")[2] for name in config.get("modules_to_save") or []}
    return {
        "modules_to_save": tuple(sorted(names)),
        "ensure_weight_tying": bool(config.get("ensure_weight_tying")),
    }


def check_layers(matrices: Mapping[str, Tensor], layers: Collection[str]) -> None:
    """Raise CheckpointError unless every matrix belongs to one of the layers, given by their names."""
    for name, value in matrices.items():
        if name not in VOCABULARY.values() and name.rpartition(".")[0] not in layers:
            raise CheckpointError(_misfit(name, tuple(value.shape), None))


def _misfit(name: str, found: tuple[int, ...] | None, expected: tuple[int, ...] | None) -> str:
    return (
        f"adapter matrix '{name}' has shape {found or 'none'}; this base expects {expected or 'none'}: the adapter"
        " belongs to another base model"
    )


def check_adapter(
    matrices: Mapping[str, Tensor], layers: Iterable[LoRALinear | ExpertLora], whole: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless the matrices are exactly those of the layers, with their shapes.

    Args:
        whole: shapes of the modules that are trained whole, by name.
    """
    expected = {f"{layer.name}.{part}": layer.adapter_shape(part) for layer in layers for part, _ in layer.adapter()}
    expected |= whole
    found = {name: tuple(value.shape) for name, value in matrices.items()}
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) != found.get(name):
            raise CheckpointError(_misfit(name, found.get(name), expected.get(name)))

"""What the commands that write a model share: a checkpoint to read, and the folder of a new one that stands on its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.config.export import size_in_bytes
from fsdp_qlora.errors import CheckpointError, ConfigError, WeightsError
from fsdp_qlora.files import write_file
from fsdp_qlora.models.families import Family
from fsdp_qlora.models.skeleton import Skeleton, build_skeleton
from fsdp_qlora.output_files import SIDE_FILES, STATE_FILE
from fsdp_qlora.quant.adapt import QuantSettings, block_linears, expert_matrices, tensor_names
from fsdp_qlora.quant.layout import Layout
from fsdp_qlora.weights.bnb_format import slots, write_quantized
from fsdp_qlora.weights.index import TensorEntry, read_index
from fsdp_qlora.weights.loader import check_matrix
from fsdp_qlora.weights.reader import Reader
from fsdp_qlora.weights.source import (
    check_complete,
    check_shape,
    is_quantized,
    model_names,
    require_finite,
)
from fsdp_qlora.weights.writer import Part, Sink, Slot, Written, begin, complete, write_shards

_NOT_COPIED = ("config.json", "adapter_config.json", "run.json", STATE_FILE)

RUN_WEIGHTS = 1 << 22
"""Weights that are read at a time, a multiple of the quantisation's blocks."""


@dataclass
class Source:
    """A base checkpoint.

    Attributes:
        skeleton: its model without weights.
        raw: reads tensors by their names in the checkpoint.
        named: reads those of the language model by their names in transformers' model.
        linears: name ('....weight') and shape [out, in] of each matrix of the decoder blocks, experts' too.
    """

    folder: Path
    skeleton: Skeleton
    raw: Reader
    named: Reader
    linears: dict[str, tuple[int, int]]

    @property
    def family(self) -> Family:
        return self.skeleton.family

    @property
    def is_quantized(self) -> bool:
        return any(is_quantized(self.named.tensors, name) for name in self.linears)

    def checkpoint_name(self, name: str) -> str:
        """Return the name in the checkpoint of a tensor of the model."""
        return self.named.entry(name).name

    def layout(self, name: str, quant: QuantSettings) -> Layout:
        return Layout(*self.linears[name], quant.quant_type, quant.double_quant)

    def check(self, quant: QuantSettings) -> None:
        """Raise WeightsError unless each tensor has the model's shape, and the given form if it is quantised."""
        for name in self.linears:
            check_matrix(self.named, name, self.layout(name, quant))
        parameters = dict(self.skeleton.model.named_parameters())
        for name in tensor_names(self.skeleton) - set(self.linears):
            if name in parameters:  # buffers and tied weights are not
                check_shape(self.named, name, tuple(parameters[name].shape))

    def identity(self) -> list[list[Any]]:
        """Return name, size and time of change of each weight file."""
        files = sorted({entry.file for entry in self.raw.tensors.values()})
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def runs(self, entry: TensorEntry) -> Iterator[tuple[int, Tensor]]:
        """Yield (first element, 1-D run) of a tensor, with finite values where they are floats."""
        total = entry.size_bytes // entry.dtype.itemsize
        for start in range(0, total, RUN_WEIGHTS):
            run = self.raw.read(entry.name, start, min(start + RUN_WEIGHTS, total))
            if run.dtype.is_floating_point:
                require_finite(run, self.raw, entry.name)
            yield start, run


@contextmanager
def open_source(folder: Path, skeleton: Skeleton | None = None) -> Iterator[Source]:
    """Open a checkpoint of a supported family whose tensors are those of the model.

    Args:
        skeleton: the model without weights, if another checkpoint of it is open already.

    Raises:
        ModelError, WeightsError: as build_model.
    """
    skeleton = skeleton or build_skeleton(folder, torch.float32, "eager")
    tensors = read_index(folder)
    named = model_names(tensors, skeleton.family)
    check_complete(named, tensor_names(skeleton), skeleton.tied)
    linears = {name + ".weight": (linear.out_features, linear.in_features) for name, linear in block_linears(skeleton)}
    linears |= expert_matrices(skeleton)
    with Reader(tensors) as raw, Reader(named) as by_name:
        yield Source(folder, skeleton, raw, by_name, linears)


@contextmanager
def open_unquantized(folder: Path, quant: QuantSettings) -> Iterator[Source]:
    """Open a checkpoint as open_source does; WeightsError if it is quantised already, or cannot be quantised like that."""
    with open_source(folder) as source:
        if source.is_quantized:
            raise WeightsError(f"{folder}: is quantised already; give the model in 16 or 32 bits")
        source.check(quant)
        yield source


def copy(source: Source, entry: TensorEntry, dtype: torch.dtype | None = None) -> Part:
    """Return the part that copies a tensor, with floats cast to `dtype`."""
    kept = entry.dtype if dtype is None or not entry.dtype.is_floating_point else dtype

    def make(sink: Sink) -> None:
        for start, run in source.runs(entry):
            sink(entry.name, run.to(kept), start)

    return Part((Slot(entry.name, kept, entry.shape),), make)


def quantized(source: Source, entry: TensorEntry, name: str, quant: QuantSettings, device: torch.device) -> Part:
    """Return the part that quantises a matrix; `name` is its name in the model."""
    layout = source.layout(name, quant)

    def make(sink: Sink) -> None:
        write_quantized(entry.name, layout, (run.to(device) for _, run in source.runs(entry)), sink)

    return Part(slots(entry.name, layout), make)


def in_file_order(tensors: Mapping[str, TensorEntry]) -> list[TensorEntry]:
    """Return the tensors as they lie on the disk."""
    return sorted(tensors.values(), key=lambda entry: (entry.file, entry.start))


@dataclass(frozen=True)
class Target:
    """Where a checkpoint goes.

    Attributes:
        identity: what its content depends on, JSON: a killed run of the same identity is finished.
        max_shard_size: as 5GB.
        overwrite: replace what is there.
        metadata: noted in the header of every weight file.
    """

    folder: Path
    identity: Mapping[str, Any]
    max_shard_size: str
    overwrite: bool
    metadata: Mapping[str, str] = field(default_factory=dict)


def write_checkpoint(
    target: Target,
    parts: Sequence[Part],
    config: Mapping[str, Any],
    side_files: Mapping[str, Path],
    say: Callable[[str], None],
) -> Written:
    """Write a checkpoint folder, or finish one that was begun.

    Args:
        config: content of config.json.
        side_files: files to copy, by their names in the folder.
        say: receives lines of progress.

    Raises:
        ConfigError: the folder holds something else.
        CheckpointError: it cannot be written.
    """
    folder = target.folder
    try:
        kept = begin(folder, target.identity, target.overwrite)
        free, wanted = shutil.disk_usage(folder).free, sum(part.size_bytes for part in parts) - kept
        if free < wanted:
            raise CheckpointError(
                f"{folder}: {wanted / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free; free space or"
                " choose another --output_dir"
            )
        size = size_in_bytes(target.max_shard_size)
        written = write_shards(folder, parts, size, target.identity, say, target.metadata)
        for name, path in side_files.items():
            write_file(folder / name, path.read_bytes())
        complete(folder, config)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the checkpoint cannot be written ({error.strerror}); free space or choose another --output_dir,"
            " and repeat the command: finished files are kept"
        ) from error
    return written


def side_files(*folders: Path) -> dict[str, Path]:
    """Return tokenizer, generation and licence files by name; of equal names the later folder's."""
    return {
        path.name: path
        for folder in folders
        for pattern in SIDE_FILES
        for path in sorted(folder.glob(pattern))
        if path.name not in _NOT_COPIED and not path.name.endswith(".index.json")
    }


def quantized_config(config: dict[str, Any], quant: QuantSettings, family: Family) -> dict[str, Any]:
    """Return config.json's content for a checkpoint whose decoder blocks are quantised, as transformers writes it."""
    from transformers import BitsAndBytesConfig

    dtype = dtype_of(config)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.quant_type,
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=_not_quantized(family),
    )
    return {**config, "quantization_config": settings.to_dict()}


def dense_config(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json's content for a checkpoint in one dtype, nothing of which is quantised."""
    result = {key: value for key, value in config.items() if key != "quantization_config"}
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    result[key] = str(dtype).removeprefix("torch.")
    for part, value in result.items():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            result[part] = dense_config(value, dtype)
    return result


def _not_quantized(family: Family) -> list[str] | None:
    """Return the modules that transformers must not quantise; None: its own default, which is the head."""
    others = sorted({prefix.removeprefix("model.").rstrip(".") for prefix in family.other_prefixes})
    return ["lm_head", *others, *(f"model.{name}" for name in others)] if others else None


def dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that config.json names, float32 if none."""
    named = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype")
    return getattr(torch, named or "float32")  # type: ignore[no-any-return]


def check_output(output_dir: str, overwrite: bool, *inputs: Path) -> None:
    """Refuse an output folder that can never be used, before a model is fetched; what depends on it is checked later.

    Raises:
        ConfigError: it is one of the folders that are read, or holds what no killed run of such a command left.
    """
    output = check_folders(output_dir, *inputs)
    if output.is_dir() and any(output.iterdir()) and not overwrite and not (output / STATE_FILE).exists():
        raise ConfigError(
            f"--output_dir={output} is not empty; choose another, or replace its content with --overwrite"
        )


def check_folders(output_dir: str, *inputs: Path) -> Path:
    """Return the output folder; ConfigError if it is one of those that are read."""
    output = Path(output_dir).expanduser()
    for folder in inputs:
        if output.resolve() == folder.resolve():
            raise ConfigError(f"--output_dir={output_dir} is the folder that is read; choose another")
    return output

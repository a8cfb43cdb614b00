"""The matrices of a base, as trained on or as they were before, and with an adapter added: one at a time, in float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.adapters import pattern_pairs, read_adapter_config, saved_modules
from fsdp_qlora.errors import CheckpointError, WeightsError
from fsdp_qlora.export.standalone import Source
from fsdp_qlora.output_files import WEIGHTS_FILE
from fsdp_qlora.peft_format import matrix_names
from fsdp_qlora.quant.adapt import QuantSettings, expert_parameters
from fsdp_qlora.quant.expert_lora import factors_of_matrix, parameter_of
from fsdp_qlora.quant.linear import ADAPTER_PARTS
from fsdp_qlora.quant.lora import VOCABULARY, LoraSettings, pattern_value, whole_modules
from fsdp_qlora.quant.nf4 import dequantize_reference, quantize_matrix
from fsdp_qlora.weights.fingerprint import fingerprint
from fsdp_qlora.weights.index import read_header
from fsdp_qlora.weights.reader import Reader
from fsdp_qlora.weights.source import copy_quantized, is_quantized, require_finite


@dataclass(frozen=True)
class Lora:
    """The update of one matrix: scaling * B @ A, with A [r, in] and B [out, r] in float32.

    Attributes:
        magnitudes: lengths of the rows of the updated matrix, fp32 [out], with DoRA.
    """

    A: Tensor
    B: Tensor
    scaling: float
    magnitudes: Tensor | None = None

    def factors(self, updated: Tensor) -> Tensor | None:
        """Return by what the rows of weight + update [out, in] are multiplied, [out]; None without DoRA."""
        if self.magnitudes is None:
            return None
        # a row of zeros stays one, as in training
        lengths: Tensor = torch.linalg.vector_norm(updated, dim=1).clamp(min=torch.finfo(torch.float32).tiny ** 0.5)
        return self.magnitudes / lengths

    def add_to(self, weight: Tensor) -> Tensor:
        """Return an updated matrix [out, in], float32, in the memory of the given one."""
        weight.addmm_(self.B, self.A, alpha=self.scaling)
        factors = self.factors(weight)
        return weight if factors is None else weight.mul_(factors.unsqueeze(1))


class Adapter:
    """A PEFT LoRA adapter whose matrices are read when they are wanted.

    Attributes:
        config: adapter_config.json.
        whole: names ('....weight') of the tensors that it replaces, those of modules_to_save.
    """

    def __init__(self, config: Mapping[str, Any], reader: Reader, source: Source) -> None:
        self.config, self.reader = config, reader
        self._prefix = source.family.adapter_prefix
        self._tensors = matrix_names(reader.tensors, config.get("target_parameters"))
        # transformers' parameters of experts [experts, out, in], by name
        self._stacks = {
            name: tuple(source.skeleton.model.get_parameter(name).shape) for name in expert_parameters(source.skeleton)
        }
        self._read = functools.lru_cache(maxsize=4)(self._read_anew)  # those of experts serve many matrices
        lora = LoraSettings(int(config["r"]), float(config["lora_alpha"]), **saved_modules(config))
        modules = whole_modules(lora, source.skeleton.tied)
        self.whole = tuple(f"{name}.weight" for name in modules)
        if modules and source.skeleton.tied:  # PEFT stores the one matrix a second time
            self._tensors.pop(VOCABULARY["lm_head"], None)
        self._check(source)

    def _check(self, source: Source) -> None:
        """Raise CheckpointError unless the matrices are complete and fit layers of the base."""
        found = {name: self.reader.entry(tensor).shape for name, tensor in self._tensors.items()}
        for name in self.whole:
            shape = tuple(source.skeleton.model.get_parameter(name).shape)
            if found.pop(name.removesuffix(".weight"), None) != shape:
                raise CheckpointError(
                    f"adapter: modules_to_save names '{name}', which is not there in the base's shape {list(shape)}: the"
                    " adapter belongs to another model"
                )
        for name, shape in found.items():
            layer, _, part = name.rpartition(".")
            rows = found.get(f"{layer}.lora_A", (0,))[0]
            if all(f"{layer}.{other}" in found for other in self._parts) and shape == self._shapes(
                source, layer, rows
            ).get(part):
                continue
            raise CheckpointError(
                f"adapter matrix '{name}' of shape {list(shape)} has no place in this base: the adapter belongs to"
                " another model"
            )

    def _shapes(self, source: Source, layer: str, rows: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's tensors by part, for a lora_A of so many rows; none if there is no such layer."""
        num_experts, *matrix = self._stacks.get(layer, (1, *source.linears.get(f"{layer}.weight", ())))
        if not matrix or rows == 0 or rows % num_experts != 0:
            return {}
        out_features, in_features = matrix
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (rows, in_features), "lora_B": (out_features, rows)}
        if self.config.get("use_dora"):
            shapes["lora_magnitude_vector"] = (out_features,)
        return shapes

    @property
    def _parts(self) -> tuple[str, ...]:
        """What each updated matrix must have."""
        return ADAPTER_PARTS if self.config.get("use_dora") else ADAPTER_PARTS[:2]

    def identity(self) -> list[Any]:
        """Return what tells this adapter from another."""
        files = {entry.file for entry in self.reader.tensors.values()}
        return [dict(self.config), *([file.stat().st_size, file.stat().st_mtime_ns] for file in files)]

    def adapts(self, name: str) -> bool:
        """Return whether the matrix `name` ('....weight') has an update."""
        return f"{parameter_of(name.removesuffix('.weight'))[0]}.lora_A" in self._tensors

    def elements(self, name: str, start: int, stop: int) -> Tensor:
        """Return some elements [stop - start] of a tensor of `whole`, as the file has them."""
        entry = self.reader.entry(self._tensors[name.removesuffix(".weight")])
        values = self.reader.read(entry.name, start, stop)
        require_finite(values, self.reader, entry.name)
        return values

    def lora(self, name: str, device: torch.device) -> Lora | None:
        """Return the update of a matrix; None if it has none."""
        if not self.adapts(name):
            return None
        matrix = name.removesuffix(".weight")
        layer, _ = parameter_of(matrix)
        lora_A, lora_B, *magnitudes = (self._read(f"{layer}.{part}") for part in self._parts)
        if layer in self._stacks:
            lora_A, lora_B = factors_of_matrix(matrix, lora_A, lora_B, self._stacks[layer][0])
        return Lora(
            lora_A.to(device), lora_B.to(device), self._scaling(layer, len(lora_A)), *(m.to(device) for m in magnitudes)
        )

    def _read_anew(self, name: str) -> Tensor:
        entry = self.reader.entry(self._tensors[name])
        values = self.reader.read(entry.name).view(entry.shape).float()
        require_finite(values, self.reader, entry.name)
        return values

    def _scaling(self, layer: str, rank: int) -> float:
        """Return PEFT's factor; a pattern is the end of a layer's name, or a regular expression for it."""
        layer = self._prefix + layer.removeprefix("model.")
        alpha = pattern_value(pattern_pairs(self.config, "alpha_pattern"), layer, float(self.config["lora_alpha"]))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@contextmanager
def stream_adapter(folder: Path, source: Source) -> Iterator[Adapter]:
    """Open an adapter for a base.

    Raises:
        CheckpointError: it is unreadable, of a kind that is not merged, or belongs to another base.
        ModelError: its modules_to_save are not tied as the base's are.
    """
    config = read_adapter_config(folder)
    try:
        tensors = read_header(folder / WEIGHTS_FILE)
    except WeightsError as error:
        raise CheckpointError(f"{folder}: the adapter is unreadable ({error})") from error
    with Reader(tensors) as reader:
        yield Adapter(config, reader, source)


class Weights:
    """The matrices of a base.

    Args:
        quant: the 4-bit form of the base in training.
        device: where matrices are computed and returned.

    Attributes:
        fingerprints: checksum of the 4-bit bytes of each matrix that was dequantised, by name.
    """

    def __init__(self, source: Source, quant: QuantSettings, device: torch.device) -> None:
        self.source, self.quant, self.device = source, quant, device
        self.fingerprints: dict[str, int] = {}

    def original(self, name: str) -> Tensor:
        """Return a matrix [out, in] as the checkpoint has it; one that is quantised there is dequantised."""
        reader = self.source.named
        if is_quantized(reader.tensors, name):
            return self.dequantized(name)
        entry = reader.entry(name)
        weight = reader.read(name)
        require_finite(weight, reader, name)
        return weight.to(self.device).view(entry.shape).float()

    def dequantized(self, name: str) -> Tensor:
        """Return a matrix [out, in] with the values that training computed with."""
        reader, layout = self.source.named, self.source.layout(name, self.quant)
        if is_quantized(reader.tensors, name):
            packed = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=self.device)
            copy_quantized(reader, name, layout, packed)
        else:
            weight = reader.read(name)
            require_finite(weight, reader, name)
            packed = quantize_matrix(weight.to(self.device).view(reader.entry(name).shape), layout)
        self.fingerprints[name] = int(fingerprint(packed).item())
        return dequantize_reference(packed, layout, torch.float32)

    def base(self, name: str, kind: str) -> Tensor:
        """Return `dequantized` or `original`."""
        return self.dequantized(name) if kind == "dequantized" else self.original(name)

    def merged(self, name: str, kind: str, adapter: Adapter) -> Tensor:
        """Return a matrix of the base with its update added."""
        weight = self.base(name, kind)
        lora = adapter.lora(name, self.device)
        return weight if lora is None else lora.add_to(weight)

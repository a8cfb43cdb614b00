"""Make the adapter that a training starts from out of the base's own matrices: PiSSA and LoftQ, one matrix at a time.

PiSSA trains the largest singular directions of each matrix and freezes what is left, so it makes another base, too: a
checkpoint of the residuals. LoftQ leaves the base alone; its adapter begins as the best correction of the 4-bit error.
"""

from __future__ import annotations

import json
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fsdp_qlora.adapters import replace_adapter
from fsdp_qlora.config import InitializeConfig
from fsdp_qlora.config.lora import lora_settings
from fsdp_qlora.distributed import pick_device
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.export.merged_weights import Weights
from fsdp_qlora.export.standalone import (
    Source,
    Target,
    check_folders,
    copy,
    in_file_order,
    open_unquantized,
    side_files,
    write_checkpoint,
)
from fsdp_qlora.models.hub import resolve
from fsdp_qlora.peft_format import file_name, layer_config, whole_config, whole_names
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, block_linears
from fsdp_qlora.quant.lora import adapted_layers, whole_modules
from fsdp_qlora.quant.nf4 import dequantize_reference, quantize_matrix
from fsdp_qlora.weights.index import TensorEntry
from fsdp_qlora.weights.writer import Part, Sink, Slot

ADAPTER = "adapter"


def low_rank_factors(matrix: Tensor, rank: int, scaling: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Return A [rank, in] and B [out, rank] whose scaling * B @ A is the best approximation of a matrix [out, in].

    Args:
        matrix: float32.
        iterations: of the randomised decomposition, which draws from torch's generator; 0 for the exact one.

    Source: PEFT's pissa_init and loftq_init, which share out the singular values evenly.
    """
    if iterations:
        left, values, right = torch.svd_lowrank(matrix, rank, niter=iterations)
    else:
        left, values, rows = torch.linalg.svd(matrix, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], rows[:rank].t()
    roots = (values / scaling).sqrt()
    return (right * roots).t().contiguous(), (left * roots).contiguous()


@dataclass
class Initialization:
    """A new adapter in the making.

    Attributes:
        adapted: the layers that get one.
        quant: the 4-bit form that training will give the base.
        matrices: what is made, by PEFT's names.
        errors: sums over the matrices of the squared 4-bit error, plain and with the adapter.
    """

    source: Source
    weights: Weights
    lora: LoraSettings
    adapted: set[str]
    quant: QuantSettings
    config: InitializeConfig
    matrices: dict[str, Tensor] = field(default_factory=dict)
    errors: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def make(self, layer: str) -> Tensor:
        """Make the adapter of a layer; return the matrix [out, in] that its base must be, float32."""
        name, scaling = f"{layer}.weight", self.lora.scaling_of(layer)
        weight, layout = self.weights.original(name), self.source.layout(name, self.quant)
        torch.manual_seed(zlib.crc32(f"{self.config.seed} {layer}".encode()))  # whatever the order of the matrices

        def in_4bit(matrix: Tensor) -> Tensor:
            return dequantize_reference(quantize_matrix(matrix, layout), layout, torch.float32)

        plain_error = weight - in_4bit(weight)
        target = weight if self.config.method == "pissa" else plain_error
        factors = low_rank_factors(target, self.lora.rank_of(layer), scaling, self.config.iterations)
        base = weight
        if self.config.method == "pissa":
            base = (weight - scaling * factors[1] @ factors[0]).to(self.source.named.entry(name).dtype).float()
        left = weight - in_4bit(base) - scaling * factors[1] @ factors[0]
        for index, error in enumerate((plain_error, left)):
            self.errors[index] += float(error.square().sum())
        for part, values in zip(("lora_A", "lora_B"), factors, strict=True):
            self.matrices[file_name(self.source.family.adapter_prefix, layer, part, ())] = values.cpu()
        return base

    def take(self, module: str) -> None:
        """Have the adapter hold a module that is trained whole, with the values of the base."""
        value = self.weights.original(f"{module}.weight").cpu()
        names = whole_names(self.source.family.adapter_prefix, module, self.source.skeleton.tied)
        self.matrices |= dict.fromkeys(names, value)

    def parts(self) -> list[Part]:
        """Return what PiSSA's base consists of; each residual is made when it is written."""
        layers = {self.source.checkpoint_name(f"{layer}.weight"): layer for layer in self.adapted}
        return [
            self._residual(entry, layers[entry.name]) if entry.name in layers else copy(self.source, entry)
            for entry in in_file_order(self.source.raw.tensors)
        ]

    def _residual(self, entry: TensorEntry, layer: str) -> Part:
        def write(sink: Sink) -> None:
            sink(entry.name, self.make(layer).to(entry.dtype).cpu(), 0)

        return Part((Slot(entry.name, entry.dtype, entry.shape),), write)


def run(config: InitializeConfig) -> None:
    """Make adapter and base as `config` says; the command line's `initialize`."""
    started = time.monotonic()
    device = pick_device(config.device)
    folder = resolve(config.model, config.revision)
    output = check_folders(config.output_dir, folder)
    quant = QuantSettings(config.quant_type, config.double_quant)
    with open_unquantized(folder, quant) as source:
        lora = lora_settings(config)
        layers = [name for name, _ in block_linears(source.skeleton)]
        adapted = adapted_layers(layers, lora)
        _check_ranks(source, lora, adapted)
        whole = whole_modules(lora, source.skeleton.tied)
        work = Initialization(source, Weights(source, quant, device), lora, adapted, quant, config)
        if config.method == "pissa":
            _write_base(work, output)
        elif (output / ADAPTER).exists() and not config.overwrite:
            raise ConfigError(f"--output_dir={output} holds an adapter; choose another, or replace it with --overwrite")
        else:
            for done, layer in enumerate(layer for layer in layers if layer in adapted):
                work.make(layer)
                if (done + 1) % 50 == 0:
                    _say(f"{done + 1} of {len(adapted)} matrices")
        for module in whole:
            work.take(module)
        base = str(output.resolve()) if config.method == "pissa" else config.model
        peft_config = layer_config(lora, base, source.family.adapter_prefix, adapted, layers)
        replace_adapter(output / ADAPTER, work.matrices, peft_config | whole_config(whole, source.skeleton.tied))
    plain, left = work.errors
    model = config.output_dir if config.method == "pissa" else config.model
    print(
        f"done: {' + '.join([f'{len(adapted)} matrices', *(name.rpartition('.')[2] for name in whole)])},"
        f" {time.monotonic() - started:.0f} s; the squared 4-bit error is"
        f" {left / plain:.1%} of what it is without the adapter\n"
        f"train with: --model {model} --adapter {config.output_dir}",
        flush=True,
    )


def _say(line: str) -> None:
    print(f"initialize: {line}", flush=True)


def _check_ranks(source: Source, lora: LoraSettings, adapted: set[str]) -> None:
    for layer in sorted(adapted):
        shape = source.linears[f"{layer}.weight"]
        largest = min(shape)
        if lora.rank_of(layer) > largest:
            raise ConfigError(
                f"rank {lora.rank_of(layer)} of {layer}: a matrix of {shape[0]} x {shape[1]} has rank"
                f" {largest} at most; lower --lora_rank or --rank_pattern"
            )


def _write_base(work: Initialization, output: Path) -> None:
    source, config = work.source, work.config
    # never the same: the adapter of matrices that a killed run has written is lost, so it cannot be finished
    identity = {"command": "initialize", "started": time.time_ns()}
    base_config = json.loads((source.folder / "config.json").read_text())
    target = Target(output, identity, config.max_shard_size, config.overwrite)
    write_checkpoint(target, work.parts(), base_config, side_files(source.folder), _say)

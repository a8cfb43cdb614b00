"""Make a checkpoint that stands on its own from a base and an adapter, in the memory of a few matrices.

The adapter was trained beside the base as quantised and dequantised, so that is what it is added to by default; the weights
before quantisation differ from those by an error that the adapter may have learned to make up for.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.adapters import base_of
from fsdp_qlora.build import load_tokenizer
from fsdp_qlora.config import MergeConfig
from fsdp_qlora.distributed import pick_device
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.export.merge_error import LogitError, Variant, compare, logits, table, tokenize
from fsdp_qlora.export.merged_weights import Adapter, Lora, Weights, stream_adapter
from fsdp_qlora.export.standalone import (
    RUN_WEIGHTS,
    Source,
    Target,
    check_folders,
    check_output,
    copy,
    dense_config,
    dtype_of,
    in_file_order,
    open_source,
    quantized,
    quantized_config,
    side_files,
    write_checkpoint,
)
from fsdp_qlora.models.hub import resolve
from fsdp_qlora.output_files import find_adapter, read_record
from fsdp_qlora.quant.adapt import QuantSettings, block_experts
from fsdp_qlora.quant.lora import VOCABULARY
from fsdp_qlora.quant.nf4 import dequantize_reference, quantize_matrix
from fsdp_qlora.record import write_record
from fsdp_qlora.weights.bnb_format import slots, write_quantized
from fsdp_qlora.weights.index import TensorEntry
from fsdp_qlora.weights.source import detect_quantization, is_quantized, matrix_of
from fsdp_qlora.weights.writer import Part, Sink, Slot

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Merge:
    """A base, an adapter, and the form in which they are put together.

    Attributes:
        kind: what the adapter is added to, `dequantized` or `original`.
        dtype: of the result's tensors that are not quantised.
        in_4bit: quantise the merged matrices.
    """

    source: Source
    weights: Weights
    adapter: Adapter
    kind: str
    dtype: torch.dtype
    in_4bit: bool

    def becomes_quantized(self, name: str) -> bool:
        """Return whether a matrix of the result is quantised: a quantised base may hold some that are not."""
        tensors = self.source.named.tensors
        return self.in_4bit and (not self.source.is_quantized or is_quantized(tensors, name))

    def matrix(self, name: str) -> Tensor:
        """Return a matrix of the result [out, in] before it is quantised."""
        # what has no update keeps its 4-bit codes, which another round of quantisation could change
        kind = "original" if self.becomes_quantized(name) and not self.adapter.adapts(name) else self.kind
        return self.weights.merged(name, kind, self.adapter).to(self.dtype)

    def values(self, name: str) -> Tensor:
        """Return a matrix of the result [out, in] in float32, as it computes."""
        if not self.becomes_quantized(name):
            return self.matrix(name).float()
        if not self.adapter.adapts(name):
            return self.weights.dequantized(name)
        layout = self.source.layout(name, self.weights.quant)
        return dequantize_reference(quantize_matrix(self.matrix(name), layout), layout, torch.float32)

    def parts(self) -> Iterator[Part]:
        """Yield what is to be written."""
        matrices = {self.source.checkpoint_name(name): name for name in self.source.linears}
        replaced = self._replaced()
        for entry in in_file_order(self.source.raw.tensors):
            name = matrices.get(matrix_of(entry.name))
            if entry.name in replaced:
                yield self._whole(entry, replaced[entry.name])
            elif name is None:
                yield copy(self.source, entry, None if self.in_4bit else self.dtype)
            elif self.becomes_quantized(name) and not self.adapter.adapts(name):
                if is_quantized(self.source.named.tensors, name):
                    yield copy(self.source, entry)
                else:
                    yield quantized(self.source, entry, name, self.weights.quant, self.weights.device)
            elif entry.name in matrices:
                yield self._part(entry.name, name)

    def _replaced(self) -> dict[str, str]:
        """Return, by their names in the checkpoint, the tensors that the adapter has of its own, with its names."""
        found = {self.source.checkpoint_name(name): name for name in self.adapter.whole}
        head = f"{VOCABULARY['lm_head']}.weight"
        if found and self.source.skeleton.tied and head in self.source.named.tensors:  # a second copy of the one matrix
            found[self.source.checkpoint_name(head)] = self.adapter.whole[0]
        return found

    def _whole(self, entry: TensorEntry, name: str) -> Part:
        """Return the part that writes the adapter's own tensor in the place of the base's."""
        dtype, size = entry.dtype if self.in_4bit else self.dtype, math.prod(entry.shape)

        def make(sink: Sink) -> None:
            for start in range(0, size, RUN_WEIGHTS):
                sink(entry.name, self.adapter.elements(name, start, min(start + RUN_WEIGHTS, size)).to(dtype), start)

        return Part((Slot(entry.name, dtype, entry.shape),), make)

    def _part(self, checkpoint_name: str, name: str) -> Part:
        layout = self.source.layout(name, self.weights.quant)
        if self.becomes_quantized(name):

            def quantize(sink: Sink) -> None:
                write_quantized(checkpoint_name, layout, torch.split(self.matrix(name).view(-1), RUN_WEIGHTS), sink)

            return Part(slots(checkpoint_name, layout), quantize)

        def make(sink: Sink) -> None:
            sink(checkpoint_name, self.matrix(name).cpu(), 0)

        return Part((Slot(checkpoint_name, self.dtype, (layout.out_features, layout.in_features)),), make)


def run(config: MergeConfig) -> None:
    """Merge as `config` says; the command line's `merge`."""
    started = time.monotonic()
    device = pick_device(config.device)
    folder = find_adapter(Path(config.adapter))
    record = read_record(folder)
    base, revision = base_of(folder, config.model, config.revision)
    check_output(config.output_dir, config.overwrite, folder, Path(base).expanduser())
    base_folder = resolve(base, revision)
    output = check_folders(config.output_dir, base_folder, folder)
    tokenizer_folder = folder if (folder / "tokenizer_config.json").exists() else base_folder
    prompts = tokenize(load_tokenizer(tokenizer_folder)) if config.measure else None
    with open_source(base_folder) as source, stream_adapter(folder, source) as adapter:
        merge = _plan(config, source, adapter, record, device)
        _write(config, merge, output, folder)
        details = {
            "base": base if not Path(base).is_dir() else Path(base).name,
            "merge_base": config.merge_base,
            "output": config.output,
            "quant_type": merge.weights.quant.quant_type,
            "double_quant": merge.weights.quant.double_quant,
        }
        write_record(output, {**record, "merge": details})
        if prompts is not None:
            errors = _measure(merge, output, prompts)
            _say_fingerprint(merge, record)
            write_record(output, {**record, "merge": {**details, "logit_errors": errors}})
    print(f"done: {time.monotonic() - started:.0f} s\nmodel: {output}", flush=True)


def _say(line: str) -> None:
    print(f"merge: {line}", flush=True)


def _plan(config: MergeConfig, source: Source, adapter: Adapter, record: dict[str, Any], device: torch.device) -> Merge:
    """Check that base, adapter and settings go together.

    Raises:
        ConfigError: a setting that does not fit the base.
        WeightsError: a base whose tensors are not those of its model.
    """
    trained = record.get("base", {})
    quant = QuantSettings(trained.get("quant_type", "nf4"), trained.get("double_quant", True))
    if config.quant_type != "auto":
        quant = replace(quant, quant_type=config.quant_type)
    if config.double_quant is not None:
        quant = replace(quant, double_quant=config.double_quant)
    quant = quant.held(torch.float32)  # where nothing was quantised there are no scales either
    found = detect_quantization(source.named, source.linears, quant)
    if found != quant and (config.quant_type != "auto" or config.double_quant is not None):
        raise ConfigError(
            f"--quant_type and --double_quant: {source.folder} is quantised already, as {found.quant_type}, double"
            f" quantisation {found.double_quant}; leave the settings out"
        )
    if config.output == "4bit" and not found.is_4bit:
        raise ConfigError(
            f"--output=4bit: the base was not quantised in training, but held in {found.quant_type}; merge with"
            " --output=bf16 and run `fsdp-qlora quantize` on the result"
        )
    if config.merge_base == "original" and source.is_quantized:
        raise ConfigError(
            f"--merge_base=original: {source.folder} is quantised already; give the model in 16 bits with --model, or"
            " use --merge_base=dequantized"
        )
    source.check(found)
    base_dtype = dtype_of(json.loads((source.folder / "config.json").read_text()))
    dtype = DTYPES.get(config.output, base_dtype)
    replaced = "".join(f", {name} replaced" for name in adapter.whole)
    _say(
        f"base {source.folder.name} ({found.quant_type} in training, double quantisation {found.double_quant}),"
        f" {sum(map(adapter.adapts, source.linears))} of {len(source.linears)} matrices adapted{replaced}"
    )
    return Merge(source, Weights(source, found, device), adapter, config.merge_base, dtype, config.output == "4bit")


def _write(config: MergeConfig, merge: Merge, output: Path, adapter_folder: Path) -> None:
    source, quant = merge.source, merge.weights.quant
    base_config = json.loads((source.folder / "config.json").read_text())
    if not merge.in_4bit:
        new_config = dense_config(base_config, merge.dtype)
    else:
        new_config = base_config if source.is_quantized else quantized_config(base_config, quant, source.family)
    identity = {
        "command": "merge",
        "source": source.identity(),
        "adapter": merge.adapter.identity(),
        "merge_base": config.merge_base,
        "output": config.output,
        "quant_type": quant.quant_type,
        "double_quant": quant.double_quant,
        "max_shard_size": config.max_shard_size,
    }
    target = Target(output, identity, config.max_shard_size, config.overwrite)
    write_checkpoint(target, list(merge.parts()), new_config, side_files(source.folder, adapter_folder), _say)


def _measure(merge: Merge, output: Path, prompts: tuple[Tensor, Tensor]) -> dict[str, dict[str, float]]:
    """Print and return the distance from base + adapter of the result on the disk, and of what else could have been."""
    source, weights, device = merge.source, merge.weights, merge.weights.device
    cast = torch.float32 if merge.in_4bit else merge.dtype
    results: dict[str, LogitError] = {}
    with open_source(output, source.skeleton) as written:

        def compute(variant: Variant) -> tuple[Tensor, Tensor]:
            _say(f"computing {variant.title}")
            return logits(source.skeleton, variant, *prompts, device)

        def update(name: str) -> Lora | None:
            return merge.adapter.lora(name, device)

        replaced = {name: functools.partial(merge.adapter.elements, name) for name in merge.adapter.whole}
        reference, unadapted = compute(
            Variant("base + adapter", weights.dequantized, source.named, update, replaced=replaced)
        )
        result = Weights(written, weights.quant, device)
        variants = [Variant(f"{merge.kind} (written)", result.original, written.named)]
        if not source.is_quantized:
            other = replace(merge, kind="original" if merge.kind == "dequantized" else "dequantized")
            variants.append(Variant(other.kind, other.values, source.named, dtype=cast, replaced=replaced))
        for variant in variants:
            results[variant.title] = compare(reference, compute(variant)[0])
        results["no adapter"] = compare(reference, unadapted)
    count = int(prompts[1].sum())
    _say(f"logits of {count} tokens against base + adapter, float32 arithmetic, by what the adapter was added to:")
    print("\n".join(table(list(results.items()))), flush=True)
    if results[variants[0].title].divergence > results["no adapter"].divergence / 2:
        _say(
            "warning: the result is hardly nearer to base + adapter than the base alone: what the adapter learned is lost in"
            " rounding or in the other base's values; use --output bf16 or fp32 with --merge_base dequantized"
        )
    return {title: asdict(error) for title, error in results.items()}


def _say_fingerprint(merge: Merge, record: dict[str, Any]) -> None:
    """Say whether the base is, byte for byte, the one of the training run."""
    trained = record.get("base", {}).get("fingerprint")
    if block_experts(merge.source.skeleton):  # training sums up all experts of a layer, not matrix by matrix
        return
    values = [merge.weights.fingerprints[name] for name in merge.source.linears]
    found = f"{sum(value * (2 * position + 1) for position, value in enumerate(values)) % 2**64:016x}"
    if trained == found:
        _say(f"the base is the one of the training run, byte for byte ({found})")
    elif trained is not None:
        _say(
            f"warning: this base's 4-bit bytes ({found}) are not those of the training run ({trained}): another model,"
            " or the same one quantised on another kind of device"
        )

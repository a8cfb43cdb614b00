"""Which checkpoint tensors feed which parameters of the model, in 16 or 32 bits or already quantised."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.errors import WeightsError
from fsdp_qlora.models.families import Family
from fsdp_qlora.quant.adapt import QuantSettings
from fsdp_qlora.quant.layout import BLOCKSIZE, NESTED_BLOCKSIZE, Layout, Section
from fsdp_qlora.quant.nf4 import nested_code, weight_code
from fsdp_qlora.weights.index import TensorEntry
from fsdp_qlora.weights.reader import Reader

STATE_KEY = ".quant_state.bitsandbytes__"
STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
CPU = torch.device("cpu")

BLOCK_BYTES = BLOCKSIZE // 2
"""Bytes of the codes of a block."""


def model_names(tensors: Mapping[str, TensorEntry], family: Family) -> dict[str, TensorEntry]:
    """Return the checkpoint's tensors by their names in transformers' text model; drops what that does not need."""
    named = {}
    for name, entry in tensors.items():
        if name.startswith(family.other_prefixes) or name.endswith("rotary_emb.inv_freq"):
            continue
        for prefix, replacement in family.text_prefixes:
            if name.startswith(prefix):
                name = replacement + name.removeprefix(prefix)
                break
        for part, replacement in family.renamed:
            name = name.replace(part, replacement)
        named[name] = entry
    return named


def is_quantized(tensors: Mapping[str, TensorEntry], name: str) -> bool:
    """Return whether the checkpoint holds the matrix `name` ('....weight') in bitsandbytes' 4-bit form."""
    return name + ".absmax" in tensors


@dataclass(frozen=True)
class QuantState:
    """What bitsandbytes writes beside a quantised matrix."""

    quant_type: str
    double_quant: bool
    shape: tuple[int, ...]
    offset: float


def read_quant_state(reader: Reader, name: str) -> QuantState:
    """Read and check the description of a quantised matrix; WeightsError if it is of a form not supported."""
    kinds = [kind for kind in ("nf4", "fp4") if name + STATE_KEY + kind in reader.tensors]
    if not kinds:
        raise WeightsError(f"{reader.entry(name).file}: '{name}' has scales but no {STATE_KEY}nf4 or fp4 entry")
    entry = reader.entry(name + STATE_KEY + kinds[0])
    try:
        state: dict[str, Any] = json.loads(bytes(reader.read(entry_name(name, kinds[0])).tolist()))
        shape = tuple(int(size) for size in state["shape"])
        found = (int(state["blocksize"]), int(state.get("nested_blocksize", NESTED_BLOCKSIZE)))
        offset = float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise WeightsError(
            f"{entry.file}: '{entry.name}' is unreadable ({type(error).__name__}: {error}); download the file again"
        ) from error
    if not math.isfinite(offset):
        raise WeightsError(f"{entry.file}: '{entry.name}' holds the offset {offset}; download the file again")
    if found != (BLOCKSIZE, NESTED_BLOCKSIZE):
        raise WeightsError(
            f"{entry.file}: '{name}' uses block sizes {found}; only {BLOCKSIZE} and {NESTED_BLOCKSIZE} are supported:"
            " quantise from the 16-bit model instead"
        )
    return QuantState(kinds[0], name + ".nested_absmax" in reader.tensors, shape, offset)


def matrix_of(name: str) -> str:
    """Return the matrix that a tensor of a quantised one belongs to; other names stay as they are."""
    matrix = name.split(STATE_KEY)[0]
    for suffix in STATISTICS:
        matrix = matrix.removesuffix(suffix)
    return matrix


def entry_name(name: str, kind: str) -> str:
    """Return the name of the tensor that describes a quantised matrix."""
    return name + STATE_KEY + kind


def detect_quantization(reader: Reader, matrices: Iterable[str], wanted: QuantSettings) -> QuantSettings:
    """Return the form to hold the base in: a quantised checkpoint's own, else what is wanted."""
    for name in matrices:
        if is_quantized(reader.tensors, name):
            state = read_quant_state(reader, name)
            return replace(wanted, quant_type=state.quant_type, double_quant=state.double_quant)
    return wanted


def check_quantized(reader: Reader, name: str, layout: Layout) -> None:
    """Raise WeightsError unless a quantised matrix is of the form `layout` expects."""
    state = read_quant_state(reader, name)
    entry = reader.entry(name)
    expected = ((layout.out_features, layout.in_features), layout.quant_type, layout.double_quant)
    if (state.shape, state.quant_type, state.double_quant) != expected:
        raise WeightsError(
            f"{entry.file}: '{name}' is {state.quant_type} {list(state.shape)}, double quantisation {state.double_quant};"
            f" expected {layout.quant_type} {list(expected[0])}, {layout.double_quant}"
        )
    parts = [(name, torch.uint8, layout.codes.size)]
    maps = [(name + ".quant_map", weight_code(layout.quant_type, CPU))]
    if layout.double_quant:
        parts += [(name + ".absmax", torch.uint8, layout.absmax.size)]
        parts += [(name + ".nested_absmax", torch.float32, layout.nested_absmax.size)]
        maps += [(name + ".nested_quant_map", nested_code(CPU))]
    else:
        parts += [(name + ".absmax", torch.float32, layout.absmax.size)]
    for part, dtype, size in parts:
        found = reader.entry(part)
        if (found.dtype, found.size_bytes) != (dtype, size):
            raise WeightsError(
                f"{found.file}: '{part}' has {found.size_bytes} bytes of {found.dtype} instead of {size} of {dtype}"
            )
    for part, code in maps:
        found_code = reader.read(part).float()
        # made by arithmetic, whose last bit may differ between versions
        if found_code.shape != code.shape or not torch.allclose(found_code, code, rtol=1e-5, atol=0):
            raise WeightsError(f"{reader.entry(part).file}: '{part}' is not bitsandbytes' own code; quantise it again")


def flat_sections(tensors: Mapping[str, TensorEntry], name: str, layout: Layout) -> dict[str, Section]:
    """Return the section of its flat parameter that each tensor of a matrix fills, or is quantised into."""
    sections = {name: layout.codes}
    if is_quantized(tensors, name):
        sections[name + ".absmax"] = layout.absmax
        if layout.double_quant:
            sections[name + ".nested_absmax"] = layout.nested_absmax
    return sections


def flat_sources(
    tensors: Mapping[str, TensorEntry], name: str, layout: Layout, start: int, stop: int
) -> Iterator[tuple[str, int, int]]:
    """Yield (tensor, first, last) for the elements [first, last) that bytes [start, stop) of a flat parameter are made of.

    Where they are quantised from wider weights, these are whole blocks.
    """
    for tensor, section in flat_sections(tensors, name, layout).items():
        begin, end = max(start, section.start) - section.start, min(stop, section.stop) - section.start
        if begin >= end:
            continue
        if is_quantized(tensors, name):
            itemsize = tensors[tensor].dtype.itemsize
            yield tensor, begin // itemsize, end // itemsize
        elif layout.dense_dtype is not None:
            yield tensor, begin // layout.dense_dtype.itemsize, end // layout.dense_dtype.itemsize
        else:
            last = min(-(-end // BLOCK_BYTES) * BLOCKSIZE, layout.num_weights)
            yield tensor, begin // BLOCK_BYTES * BLOCKSIZE, last


def check_shape(reader: Reader, name: str, shape: tuple[int, ...]) -> None:
    """Raise WeightsError unless the checkpoint's tensor is a float one of the expected shape."""
    entry = reader.entry(name)
    if entry.shape != shape:
        raise WeightsError(f"{entry.file}: '{name}' has shape {list(entry.shape)}; the model expects {list(shape)}")
    if entry.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise WeightsError(f"{entry.file}: '{name}' has dtype {entry.dtype}; expected bfloat16, float16 or float32")


def check_complete(tensors: Mapping[str, TensorEntry], expected: set[str], tied: bool) -> None:
    """Raise WeightsError if the checkpoint lacks a tensor of the model or holds one the model does not know."""
    folder = next(iter(tensors.values())).file.parent if tensors else "the checkpoint"
    missing = sorted(expected - set(tensors))
    if missing:
        raise WeightsError(
            f"{folder}: tensor '{missing[0]}' is missing ({len(missing)} in all); finish or repeat the download"
        )
    for name, entry in tensors.items():
        if matrix_of(name) not in expected and not (tied and name == "lm_head.weight"):
            raise WeightsError(
                f"{entry.file}: tensor '{name}' is not part of this model; config.json and weights do not belong together"
            )


def require_finite(values: Tensor, reader: Reader, name: str) -> None:
    """Raise WeightsError if any value is NaN or infinite."""
    # both extremes are NaN if any value is; on CPUs this takes a fortieth of isfinite's time for 16-bit values
    if values.numel() and not all(bool(extreme.isfinite()) for extreme in values.aminmax()):
        raise WeightsError(f"{reader.entry(name).file}: '{name}' holds NaN or infinite values; download the file again")


def copy_quantized(reader: Reader, name: str, layout: Layout, flat: Tensor, start: int = 0) -> None:
    """Fill `flat`, zeros, with the bytes from `start` on of the flat parameter of a matrix that is already quantised.

    Raises:
        WeightsError: scales that are not finite, or a file that cannot be read.
    """
    state = read_quant_state(reader, name)
    sections = flat_sections(reader.tensors, name, layout)
    for tensor, first, last in flat_sources(reader.tensors, name, layout, start, start + flat.numel()):
        dtype = reader.entry(tensor).dtype
        position = sections[tensor].start + first * dtype.itemsize
        piece = flat[position - start : position - start + (last - first) * dtype.itemsize]
        reader.read_into(piece, tensor, first * dtype.itemsize)
        if dtype == torch.float32:
            require_finite(piece.view(dtype), reader, tensor)
    if layout.double_quant:
        offset = torch.tensor([state.offset], dtype=torch.float32, device=flat.device)
        place(flat, start, layout.offset.start, offset.view(torch.uint8))


def place(flat: Tensor, start: int, position: int, data: Tensor) -> None:
    """Write the part of `data` (which belongs at byte `position`) that falls into flat, whose first byte is `start`."""
    begin, end = max(start, position), min(start + flat.numel(), position + data.numel())
    if begin < end:
        flat[begin - start : end - start] = data[begin - position : end - position]

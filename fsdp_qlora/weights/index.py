"""What a safetensors checkpoint holds, checked before anything is read or allocated."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.errors import WeightsError

MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `start` is the byte offset inside its file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size_bytes: int


def _unique_keys(path: Path) -> Any:
    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [key for key, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise WeightsError(f"{path}: '{twice}' is listed twice; download the file again")
        return result

    return check


def _parse_json(text: bytes, path: Path, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text, object_pairs_hook=_unique_keys(path))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: {what} is not valid JSON ({error}); download the file again") from error
    if not isinstance(parsed, dict):
        raise WeightsError(f"{path}: {what} is not a JSON object; download the file again")
    return parsed


def _entry(path: Path, name: str, info: Any, data_start: int, data_size: int) -> TensorEntry:
    try:
        dtype = DTYPES[info["dtype"]]
        shape = tuple(int(size) for size in info["shape"])
        begin, end = (int(offset) for offset in info["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise WeightsError(f"{path}: tensor '{name}' has an unreadable header entry {info!r}") from error
    size = dtype.itemsize
    for dimension in shape:
        size *= dimension
    if min((*shape, begin), default=0) < 0 or end - begin != size or end > data_size:
        raise WeightsError(
            f"{path}: tensor '{name}' with shape {list(shape)} claims bytes {begin} to {end} of {data_size};"
            " the file is damaged or cut short: download it again"
        )
    return TensorEntry(name, path, dtype, shape, data_start + begin, size)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of one safetensors file by name; WeightsError if header or sizes are wrong."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if size < 8 or header_size > min(MAX_HEADER_BYTES, size - 8):
                raise WeightsError(
                    f"{path}: header of {header_size} bytes in a file of {size}; the file is damaged or cut short,"
                    " or not a safetensors file: download it again"
                )
            header = _parse_json(file.read(header_size), path, "the header")
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); download the model again") from error
    header.pop("__metadata__", None)
    data_start = 8 + header_size
    entries = {name: _entry(path, name, info, data_start, size - data_start) for name, info in header.items()}
    _check_coverage(path, entries, data_start, size)
    return entries


def _check_coverage(path: Path, entries: Mapping[str, TensorEntry], start: int, stop: int) -> None:
    """Raise WeightsError unless the tensors fill bytes [start, stop) of the file, each byte once."""
    position = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.size_bytes)):
        if entry.start != position:
            raise WeightsError(
                f"{path}: tensor '{entry.name}' begins at byte {entry.start - start} of the data instead of"
                f" {position - start}; the file is damaged: download it again"
            )
        position += entry.size_bytes
    if position != stop:
        raise WeightsError(
            f"{path}: {stop - position} bytes after the last tensor; the file is damaged: download it again"
        )


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Return the checkpoint's files with the tensors the index promises in each (None: no index)."""
    index_path = folder / "model.safetensors.index.json"
    if not index_path.exists():
        single = folder / "model.safetensors"
        if single.exists():
            return {single: None}
        raise WeightsError(
            f"{folder}: neither model.safetensors nor model.safetensors.index.json; only safetensors weights are read"
            " (pickle files such as .bin or .pt are refused: convert them with save_pretrained)"
        )
    try:
        text = index_path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{index_path}: cannot be read ({error.strerror}); download the model again") from error
    weight_map = _parse_json(text, index_path, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index_path}: no weight_map; download the file again")
    files: dict[Path, set[str] | None] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(
                f"{index_path}: tensor '{tensor}' is said to be in {name!r}; only plain names of .safetensors files in"
                " the same folder are followed"
            )
        promised = files.setdefault(folder / name, set())
        assert promised is not None
        promised.add(tensor)
    # unlike Path.exists, this is False for a name that no file can have
    missing = sorted(path.name for path in files if not os.path.exists(path))
    if missing:
        raise WeightsError(f"{folder}: {', '.join(missing)} named by the index is missing; finish the download")
    return files


def read_index(folder: Path) -> Mapping[str, TensorEntry]:
    """Return every tensor of a checkpoint folder by its name there.

    Raises:
        WeightsError: missing files, an index that leaves the folder or disagrees with the files, damaged headers, duplicate
            names, pickle weights.
    """
    tensors: dict[str, TensorEntry] = {}
    for path, promised in _files(folder).items():
        entries = read_header(path)
        lacking = sorted(promised - set(entries)) if promised is not None else []
        if lacking:
            raise WeightsError(f"{path}: tensor '{lacking[0]}' is promised by the index and not in the file")
        twice = sorted(set(entries) & set(tensors))
        if twice:
            raise WeightsError(f"{path}: tensor '{twice[0]}' is in {tensors[twice[0]].file.name} too")
        tensors.update(entries)
    return tensors

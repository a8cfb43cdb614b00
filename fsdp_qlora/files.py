"""Files that survive a crash: written beside their name, stored on disk before they get it, checked by their sha256."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CHUNK_BYTES = 8 << 20

_DTYPES = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64"}
"""dtypes that `write_tensors` writes, by safetensors' names."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must hold."""

    size: int
    sha256: str


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves either the old or the new one; mode as the umask says."""
    partial = path.with_name(f"{path.name}.partial")
    write_new(partial, [data])
    partial.replace(path)
    fsync_folder(path.parent)


def write_new(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file piece by piece and wait until the disk has it; return what was to be written."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            for start in range(0, len(view), CHUNK_BYTES):
                file.write(view[start : start + CHUNK_BYTES])
            digest.update(view)
            size += len(view)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileRecord:
    """Write CPU tensors as a safetensors file.

    safetensors' own `save` makes a second copy of everything in memory; its `save_file` writes mode 0600 and does not wait
    for the disk.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in tensors.items():
        assert tensor.device.type == "cpu", name
        assert tensor.is_contiguous(), name
        end = position + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    contents = (tensor.flatten().numpy().data for tensor in tensors.values() if tensor.numel())
    return write_new(path, [len(text).to_bytes(8, "little"), text, *contents])


def record_of(path: Path) -> FileRecord:
    """Return size and sha256 of a file.

    Raises:
        OSError: no such file, a symbolic link, or unreadable.
    """
    digest, size = hashlib.sha256(), 0
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def fsync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Safetensors files written byte by byte, so that they can be wrong in every way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def header_bytes(header: Any) -> bytes:
    """Return a header as the format has it: its size as 8 bytes, then JSON (or the bytes given)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write a safetensors file of any header and data."""
    path.write_bytes(header_bytes(header) + data)
    return path


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, Any]:
    """Return a header entry, by default of a vector of bytes."""
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}

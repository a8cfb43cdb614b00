"""Checkpoints made for these tests: shapes that fit badly, and bases quantised by bitsandbytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
from safetensors.torch import load_file, save_file

from tests.tiny import save_tiny

ODD: dict[str, Any] = {
    "hidden_size": 20,
    "intermediate_size": 50,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
}
"""Sizes of which no matrix is a whole number of blocks of 64 weights."""


def save_odd(folder: Path, **changes: Any) -> Path:
    """Save a tiny Llama of sizes that divide by nothing."""
    return save_tiny("llama", folder, **{**ODD, **changes})


def is_block_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a checkpoint's tensor is a matrix that the trainer quantises."""
    return name.startswith("model.layers.") and len(shape) == 2


def save_quantized(
    source: Path, folder: Path, quant_type: str = "nf4", double_quant: bool = True, skip: str | None = None
) -> Path:
    """Save a copy of a tiny checkpoint whose block matrices are quantised in bitsandbytes' own form.

    Args:
        skip: end of the names of matrices that are not.
    """
    folder.mkdir(parents=True)
    shutil.copy(source / "config.json", folder)
    tensors = {}
    for name, value in load_file(source / "model.safetensors").items():
        if not is_block_matrix(name, tuple(value.shape)) or (skip is not None and name.endswith(skip)):
            tensors[name] = value
            continue
        codes, state = bnb.quantize_4bit(value, blocksize=64, quant_type=quant_type, compress_statistics=double_quant)
        tensors[name] = codes
        tensors.update({f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

"""Settings of the commands that make and publish checkpoints, in the same form as config.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMG])B")
_UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}


def size_in_bytes(text: str) -> int:
    """Return the bytes of a size such as 5GB or 1.5 MB; ValueError for anything else."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no size")
    return int(float(match[1]) * _UNITS[match[2]])


def is_size(text: str) -> bool:
    """Return whether a text is a size above 0."""
    return _SIZE.fullmatch(text) is not None and size_in_bytes(text) > 0


@dataclass(frozen=True)
class QuantizeConfig:
    """Settings of making a pre-quantised checkpoint."""

    # --- input and output ---
    model: str
    """Alias, hub id (owner/name) or local folder with safetensors weights in 16 or 32 bits."""

    output_dir: str
    """Folder of the new checkpoint: empty, absent, or what a killed run of the same command left, which is finished."""

    revision: str | None = None
    """Branch, tag or commit of a hub model; default: the main branch."""

    overwrite: bool = False
    """Replace what is in --output_dir."""

    max_shard_size: str = "5GB"
    """Size at which a new weight file is begun, in KB, MB or GB."""

    # --- quantisation ---
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code of the linear layers of the decoder blocks."""

    double_quant: bool = True
    """Quantise the block scales too (0.37 bit per weight less); bitsandbytes' double quantisation."""

    # --- computation ---
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: on the GPU if there is one."""

    debug: bool = False
    """Show Python tracebacks of errors."""

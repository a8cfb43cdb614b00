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


@dataclass(frozen=True)
class MergeConfig:
    """Settings of making a checkpoint that stands on its own from a base and an adapter."""

    # --- input and output ---
    adapter: str
    """Folder of a trained adapter: the --output_dir of a training run, or any PEFT LoRA adapter."""

    output_dir: str
    """Folder of the new checkpoint: empty, absent, or what a killed run of the same command left, which is finished."""

    model: str | None = None
    """Base model (alias, hub id or local folder); default: the one the adapter was trained on."""

    revision: str | None = None
    """Branch, tag or commit of a hub model; default: the one of the training run, else the main branch."""

    overwrite: bool = False
    """Replace what is in --output_dir."""

    max_shard_size: str = "5GB"
    """Size at which a new weight file is begun, in KB, MB or GB."""

    # --- merging ---
    merge_base: Literal["dequantized", "original"] = "dequantized"
    """Add the adapter to the weights it was trained on (the 4-bit base, dequantised), or to those before quantisation."""

    output: Literal["bf16", "fp16", "fp32", "4bit"] = "bf16"
    """Form of the result; 4bit: the merged matrices are quantised again."""

    quant_type: Literal["auto", "nf4", "fp4"] = "auto"
    """4-bit code of the base in training; auto: as the run's record or a quantised base says, else nf4."""

    double_quant: bool | None = None
    """Whether the block scales were quantised too; default: as the run's record or a quantised base says, else true."""

    # --- check ---
    measure: bool = True
    """Compute a few prompts with base + adapter and with the result, and print how far they are apart."""

    # --- computation ---
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: on the GPU if there is one."""

    debug: bool = False
    """Show Python tracebacks of errors."""


@dataclass(frozen=True)
class PushConfig:
    """Settings of publishing an adapter or a model. The token is taken from HF_TOKEN."""

    # --- what and where ---
    folder: str
    """Folder of a training run, an adapter, or a model that merge or full fine-tuning made."""

    repo: str
    """Repository on the hub, owner/name; made if it is not there."""

    private: bool = False
    """Make the repository private."""

    base_model: str | None = None
    """Hub id of the base model, for the card and the adapter's config; default: the recorded one."""

    dry_run: bool = False
    """Print the model card and the names of the files, and send nothing."""

    debug: bool = False
    """Show Python tracebacks of errors."""

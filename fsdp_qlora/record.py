"""run.json: everything needed to know later what a run was and how to repeat it. No secrets: they never are settings."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fsdp_qlora import __version__
from fsdp_qlora.config import TrainConfig, to_dict
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.files import write_file
from fsdp_qlora.redact import redact
from fsdp_qlora.settings import show

PACKAGES = ("torch", "transformers", "bitsandbytes", "safetensors", "huggingface_hub", "datasets")


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def versions() -> dict[str, str]:
    """Return the versions of Python, this program and the packages that decide its numbers."""
    found = {"python": platform.python_version(), "fsdp_qlora": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command(config: TrainConfig, ranks: Ranks) -> str:
    """Return the command that repeats the run: the settings that differ from their defaults."""
    defaults = to_dict(TrainConfig())
    changed = {name: value for name, value in to_dict(config).items() if value != defaults[name]}
    flags = [f"--{name} {shlex.quote(show(value))}" for name, value in changed.items()]
    return " ".join([_launcher(ranks.world_size), *flags])


def _launcher(world_size: int) -> str:
    if world_size == 1:
        return "python train.py"
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    nodes = f"--nnodes {world_size // local_world_size} " if world_size > local_world_size else ""
    return f"torchrun {nodes}--nproc_per_node {local_world_size} train.py"


def describe(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Return the record of a run before it starts, without secrets."""
    record = {
        "command": command(config, ranks),
        "config": to_dict(config),
        "world_size": ranks.world_size,
        "device": ranks.device.type,
        "versions": versions(),
        "commit": _commit(),
    }
    redacted: dict[str, Any] = json.loads(redact(json.dumps(record)))
    return redacted


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json."""
    write_file(folder / "run.json", (json.dumps(record, indent=2) + "\n").encode())

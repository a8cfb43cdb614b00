"""The names of what the commands write, and where to find it; without torch, for commands that compute nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import CheckpointError
from fsdp_qlora.models.hub import TEXT_FILES

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
"""The files of an adapter."""

INDEX_FILE = "model.safetensors.index.json"

STATE_FILE = "unfinished.json"
"""What is known of a checkpoint in the making; removed when it is complete."""

SIDE_FILES = (*TEXT_FILES, "LICENSE*", "NOTICE*", "USE_POLICY*")
"""Patterns of tokenizer, generation, chat template and licence files."""


def find_adapter(folder: Path) -> Path:
    """Return the adapter's own folder where that of its training run is given."""
    inner = folder / "adapter"
    return inner if (inner / CONFIG_FILE).exists() and not (folder / CONFIG_FILE).exists() else folder


def read_record(folder: Path) -> dict[str, Any]:
    """Return the run.json of a run's folder, or of its adapter or one in its checkpoints; {} where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    folder = folder.resolve()
    candidates = [folder, folder.parent]
    if folder.parent.parent.name == "checkpoints":  # run/checkpoints/step-000100/adapter
        candidates.append(folder.parents[2])
    for path in (candidate / "run.json" for candidate in candidates):
        if path.exists():
            try:
                record = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: is unreadable ({error}); restore or remove it") from error
            return record if isinstance(record, dict) else {}
    return {}

"""Commands that take a training run read the base that it was trained on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fsdp_qlora.adapters import write_adapter
from fsdp_qlora.commands import evaluate, generate, merge
from fsdp_qlora.config import EvaluateConfig, GenerateConfig, MergeConfig
from fsdp_qlora.errors import ModelError

COMMANDS: dict[str, tuple[Callable[[Any], None], type]] = {
    "generate": (generate.run, GenerateConfig),
    "evaluate": (evaluate.run, EvaluateConfig),
    "merge": (merge.run, MergeConfig),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("owner/base", "v1")),
        ({"revision": "v2"}, ("owner/base", "v2")),
        ({"model": "owner/other"}, ("owner/other", None)),
        ({"model": "owner/other", "revision": "v2"}, ("owner/other", "v2")),
    ],
)
def test_the_base_is_that_of_training(
    command: str,
    settings: dict[str, str],
    expected: tuple[str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every command that takes a run asks for the same revision of the base."""
    (tmp_path / "run.json").write_text(json.dumps({"config": {"revision": "v1"}}))
    config = {"peft_type": "LORA", "r": 5, "lora_alpha": 10, "base_model_name_or_path": "owner/base"}
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", {"x.lora_A.weight": torch.zeros(5, 64)}, config)
    asked = []

    def resolve(base: str, revision: str | None, **_: object) -> Path:
        asked.append((base, revision))
        raise ModelError("no such model")

    run, cls = COMMANDS[command]
    first = {"evaluate": "resolve_config"}.get(
        command, "resolve"
    )  # evaluate looks at its data before it fetches weights
    monkeypatch.setattr(sys.modules[run.__module__], first, resolve)
    own = {"generate": {"prompt": "Hi"}, "evaluate": {}, "merge": {"output_dir": str(tmp_path / "out")}}[command]
    with pytest.raises(ModelError):
        run(cls(adapter=str(tmp_path), device="cpu", **own, **settings))
    assert asked == [expected]

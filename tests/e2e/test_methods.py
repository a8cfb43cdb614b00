"""Kinds of LoRA from the command line: trained on two ranks, continued from, resumed."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fsdp_qlora.output_files import CONFIG_FILE, WEIGHTS_FILE
from tests.faults.faults import kill_after_step
from tests.faults.jobs import SETTINGS, losses, make_inputs, state, train

METHODS: dict[str, dict[str, Any]] = {
    "plain": {"use_rslora": True, "rank_pattern": "q_proj=2,down_proj=6", "loraplus_lr_ratio": 4},
    "DoRA": {"use_dora": True, "cpu_offload": "all", "activation_checkpointing": "full"},
    "not quantised": {"quant_type": "none", "cpu_offload": "all"},
    "embedding and head": {
        "modules_to_save": "embed_tokens,lm_head",
        "cpu_offload": "all",
        "activation_checkpointing": "full",
    },
    "some blocks": {"layers_to_transform": "1", "lora_target_modules": "q_proj,up_proj", "alpha_pattern": "q_proj=3"},
    "experts": {"lora_target_parameters": "experts", "lora_dropout": 0, "cpu_offload": "all", "lora_rank": 3},
}

MIXTURE = "experts"
"""The kind that is not trained on the tiny Llama."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Settings by the family of the model."""
    families = {family: make_inputs(tmp_path_factory.mktemp(family), family) for family in ("llama", "qwen3_moe")}
    return {family: {**SETTINGS, **made, "max_steps": 4} for family, made in families.items()}


def adapter_of(run: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = run / "adapter"
    return json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / WEIGHTS_FILE)


def fingerprint(run: Path) -> str:
    found: str = json.loads((run / "run.json").read_text())["base"]["fingerprint"]
    return found


@pytest.mark.parametrize("method", METHODS)
def test_train_resume_and_continue(inputs: dict[str, dict[str, Any]], tmp_path: Path, method: str) -> None:
    chosen = inputs["qwen3_moe" if method == MIXTURE else "llama"]
    whole, cut, further = (tmp_path / name for name in ("whole", "cut", "further"))
    settings = {**chosen, **METHODS[method]}
    assert train(2, {**settings, "output_dir": whole}) == [0, 0], whole.with_suffix(".log").read_text()
    assert train(2, {**settings, "output_dir": cut}, functools.partial(kill_after_step, 3)) == [-9, -9]
    assert train(2, {**settings, "output_dir": cut}) == [0, 0], cut.with_suffix(".log").read_text()
    assert losses(cut) == losses(whole)
    assert state(cut, 4) == state(whole, 4)

    rates = {"lr": 1e-12, "loraplus_lr_ratio": 1, "output_dir": further, "adapter": whole, "max_steps": 1}
    continued = {name: value for name, value in chosen.items() if not name.startswith("lora_r")} | rates
    continued |= {"quant_type": settings.get("quant_type", "nf4"), "lora_dropout": settings["lora_dropout"]}
    assert train(1, continued) == [0], further.with_suffix(".log").read_text()
    (config, matrices), (further_config, further_matrices) = adapter_of(whole), adapter_of(further)
    assert further_config == config
    assert fingerprint(further) == fingerprint(whole), "one rank and two hold other bytes"
    assert matrices.keys() == further_matrices.keys()
    for name, value in matrices.items():
        torch.testing.assert_close(further_matrices[name], value, rtol=0, atol=1e-10)
        assert value.any(), "nothing was trained"

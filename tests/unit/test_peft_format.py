"""Names of tensors as PEFT's own wrappers give them, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fsdp_qlora.adapters import open_adapter
from fsdp_qlora.build import build_model
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.peft_format import file_name, matrix_names
from fsdp_qlora.quant.adapt import QuantSettings, lora_layers
from tests.tiny import save_tiny

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("base"), num_hidden_layers=2)


@pytest.mark.parametrize("modules", [["q_proj"], []])
@pytest.mark.parametrize("parameters", [[GATE_UP, DOWN], [GATE_UP], [DOWN], [f"model.layers.1.{DOWN}", GATE_UP]])
def test_adapters_of_peft(base: Path, ranks: Ranks, tmp_path: Path, modules: list[str], parameters: list[str]) -> None:
    """Their tensors find their layers, in which they have the shapes that are expected."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings: dict[str, Any] = {"r": 4, "target_modules": modules, "target_parameters": parameters}
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path, str(base))
    own = {"adapter": adapter.matrices, "shard": False}
    built = build_model(base, ranks, QuantSettings(), adapter.lora, torch.float32, **own)
    found = {layer.name.removeprefix("model.layers.") for layer in lora_layers(built.root)}
    experts = {f"{block}.{name}" for block in range(2) for name in parameters if name.startswith("mlp")}
    experts |= {name.removeprefix("model.layers.") for name in parameters if name.startswith("model")}
    assert found == experts | {f"{block}.self_attn.q_proj" for block in range(2) if modules}


def test_there_and_back() -> None:
    experts = "model.layers.0.mlp.experts"
    for adapted in (
        [f"{experts}.gate_up_proj"],
        [f"{experts}.down_proj"],
        [f"{experts}.gate_up_proj", f"{experts}.down_proj"],
    ):
        names = [(layer, part) for layer in [*adapted, "model.layers.0.mlp.down_proj"] for part in ("lora_A", "lora_B")]
        files = [file_name("model.", layer, part, adapted) for layer, part in names]
        targets = [name.removeprefix("model.layers.0.") for name in adapted]
        assert matrix_names(files, targets) == {
            f"{layer}.{part}": file for (layer, part), file in zip(names, files, strict=True)
        }


def test_experts_of_an_unknown_parameter_stay_as_they_are() -> None:
    """So that they fit no layer, which is an error."""
    name = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    assert matrix_names([name], ["mlp.experts.gate_proj"]) == {"model.layers.0.mlp.experts.lora_A": name}

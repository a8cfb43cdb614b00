"""The command `generate` sees prompts, and ends answers, as training and evaluation do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fsdp_qlora.adapters import save_adapter
from fsdp_qlora.build import build_model
from fsdp_qlora.commands import generate
from fsdp_qlora.config import GenerateConfig
from fsdp_qlora.data.prompts import encode_prompts
from fsdp_qlora.distributed import process_group
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from tests.tiny import save_tiny
from tests.unit.data.families import tiny_tokenizer


@pytest.mark.parametrize("family", ["chatml", None])
def test_prompt_and_end_are_those_of_training(
    family: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer(family)
    base = save_tiny("llama", tmp_path / "base", num_hidden_layers=2, vocab_size=len(tokenizer) + 8)
    tokenizer.save_pretrained(base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    lora = LoraSettings(rank=2, alpha=4)
    with process_group("full", 60, device="cpu") as ranks:
        built = build_model(base, ranks, QuantSettings(num_shards=1), lora, torch.float32)
        save_adapter(built.root, lora, str(base), tmp_path / "adapter", ranks)
    seen: dict[str, Any] = {}

    def record(self: torch.nn.Module, **inputs: Any) -> Tensor:
        seen.update(inputs)
        return torch.cat([inputs["input_ids"], inputs["input_ids"][:, :1]], dim=1)

    cls = type(AutoModelForCausalLM.from_pretrained(base))
    monkeypatch.setattr(cls, "generate", record)
    prompt = "say <|im_end|> now"
    generate.answer(GenerateConfig(adapter=str(tmp_path / "adapter"), prompt=prompt, device="cpu"))
    assert seen["input_ids"].tolist() == encode_prompts([prompt], tokenizer)
    assert set(seen["generation_config"].eos_token_id) == {tokenizer.eos_token_id, 3, 4}

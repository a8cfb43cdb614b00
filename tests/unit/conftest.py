"""Models that several tests plan for."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from fsdp_qlora.plan.model_shape import ModelShape, model_shape
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings

LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA3
)
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA3
)


@pytest.fixture(scope="module")
def llama_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a config.json and nothing else."""
    base = tmp_path_factory.mktemp("configs")
    for name, model in (("70b", LLAMA_70B), ("8b", LLAMA_8B)):
        model.save_pretrained(base / name)
    return {"70b": base / "70b", "8b": base / "8b"}


@pytest.fixture(scope="module")
def shape_of(llama_folders: dict[str, Path]):
    """Measure a model once: shape_of(name, num_shards, rank of LoRA)."""

    @functools.cache
    def measure(name: str, num_shards: int = 1, rank: int = 16) -> ModelShape:
        quant, lora = QuantSettings(num_shards=num_shards), LoraSettings(rank, 16.0)
        return model_shape(llama_folders[name], quant, lora, torch.bfloat16)

    return measure

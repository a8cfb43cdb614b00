"""Mixtures of experts on several ranks: the same bytes, losses and gradients as on one, with the balancing loss."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from fsdp_qlora import data
from fsdp_qlora.activation_checkpointing import Block
from fsdp_qlora.balance import balance_routers
from fsdp_qlora.build import build_model, gathered, verify_weights
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import make_mesh, process_group
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, packed_layers
from fsdp_qlora.quant.experts import ExpertStack
from fsdp_qlora.trainer import Trainer
from tests.distributed.checkpoints import save_quantized
from tests.distributed.test_equivalence import (
    LOADER,
    Split,
    assert_close,
    examples,
    gradients_of,
    initial_adapter,
    take_steps,
)
from tests.ranks import run_ranks
from tests.tiny import memory, save_tiny

LORA = LoraSettings(rank=4, alpha=8, target_parameters=("experts",))
AUX = 0.3
SPLITS = {
    1: [Split(4, 1), Split(1, 4, activation_checkpointing=True), Split(2, 2, "full", True, True)],
    2: [Split(2, 1), Split(1, 2, activation_checkpointing=True), Split(1, 2, "full", True, True), Split(2, 1, "none")],
    3: [],
}
"""By world size; the first of one rank is what the others are compared with."""

NUM_STEPS = 2


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral", "qwen2_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of odd sizes: three ranks cut through the middle of experts' matrices."""
    sizes = {
        "num_hidden_layers": 2,
        "intermediate_size": 50,
        "moe_intermediate_size": 42,
        "shared_expert_intermediate_size": 38,
    }
    return save_tiny(request.param, tmp_path_factory.mktemp("experts") / request.param, **sizes)


def look(folder: Path, quantized: Path, splits: list[Split]) -> dict[str, Any]:
    """Return hashes of every expert's matrix as gathered, fingerprints, and two training steps of each split."""
    found: dict[str, Any] = {"steps": [], "gradients": []}
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        for name, source in (("plain", folder), ("quantized", quantized)):
            quant = QuantSettings(num_shards=ranks.num_shards)
            built = build_model(source, ranks, quant, LORA, torch.float32)
            verify_weights(built, ranks)
            found[f"{name} fingerprint"] = built.fingerprint
            found[name] = {}
            for block in built.skeleton.blocks:
                with gathered(block):
                    for stack in packed_layers(block):
                        if isinstance(stack, ExpertStack):
                            found[name] |= hashes(stack)
        for split in splits:
            mesh = make_mesh(ranks.device, ranks.world_size, split.sharding)
            trainer = make_trainer(folder, split, dataclasses.replace(ranks, mesh=mesh))
            steps, gradients = take_steps(trainer, NUM_STEPS, gradients_of)
            found["steps"].append(steps)
            found["gradients"].append(gradients)
    return found


def hashes(stack: ExpertStack) -> dict[str, str]:
    """Return a hash of the bytes of each expert's matrix."""
    flat = stack.packed.detach().view(torch.uint8).clone()  # numpy would keep FSDP from freeing its own
    sections = map(stack.layout.matrix_range, range(stack.layout.num_matrices))
    pieces = (flat[section.start : section.stop].numpy().tobytes() for section in sections)
    return {name: hashlib.sha256(piece).hexdigest() for name, piece in zip(stack.matrix_names(), pieces, strict=True)}


def make_trainer(folder: Path, split: Split, ranks: Any) -> Trainer:
    resting = memory(cpu_offload=split.cpu_offload, activation_checkpointing=split.activation_checkpointing)
    quant = QuantSettings(num_shards=ranks.num_shards)
    shapes = {name: tuple(value.shape) for name, value in load_file(folder / "model.safetensors").items()}
    linears = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(("_proj.weight", "shared_expert_gate.weight")) and ".experts." not in name
    }
    adapter = initial_adapter(linears) | expert_adapter(folder)
    built = build_model(folder, ranks, quant, LORA, torch.float32, memory=resting, adapter=adapter)
    assert all(isinstance(block, Block) for block in built.skeleton.blocks)
    built.root.balance = balance_routers(built.skeleton.model, built.skeleton.config, AUX)
    loader = data.Loader(
        examples(),
        **LOADER,
        batch_size=split.batch_size,
        gradient_accumulation_steps=split.accumulation,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    # AdamW divides by a gradient's size: with larger steps the rounding of tiny ones shows in the second step
    config = TrainConfig(max_steps=NUM_STEPS, lr=1e-3, max_grad_norm=0.5)
    return Trainer(config, ranks, built, loader, {})


def expert_adapter(folder: Path) -> dict[str, Tensor]:
    """Return values for LoRA on the experts."""
    config = AutoConfig.from_pretrained(folder)
    inner = config.intermediate_size if config.model_type == "mixtral" else config.moe_intermediate_size
    rows = LORA.rank * (getattr(config, "num_experts", None) or config.num_local_experts)
    sizes = {"gate_up_proj": (2 * inner, config.hidden_size), "down_proj": (config.hidden_size, inner)}
    generator = torch.Generator().manual_seed(4)
    adapter = {}
    for block in range(config.num_hidden_layers):
        for parameter, (out_features, in_features) in sizes.items():
            name = f"model.layers.{block}.mlp.experts.{parameter}"
            adapter[f"{name}.lora_A"] = torch.randn(rows, in_features, generator=generator) * 0.1
            adapter[f"{name}.lora_B"] = torch.randn(out_features, rows, generator=generator) * 0.1
    return adapter


def expected_hashes(folder: Path) -> dict[str, str]:
    """Return the hashes of what bitsandbytes makes of each expert's matrix, put together by hand."""
    names = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
    expected = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if ".experts." not in name:
            continue
        codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        sections = (codes, state.absmax, state.state2.absmax, state.offset.reshape(1))
        text = b""
        for section in sections:
            piece = section.flatten().view(torch.uint8).numpy().tobytes()
            text += piece + bytes(-len(piece) % 16)
        for old, new in names.items():
            name = name.replace(old, new)
        expected[name] = hashlib.sha256(text).hexdigest()
    return expected


def test_worlds_agree(folder: Path, tmp_path: Path) -> None:
    quantized = save_quantized(folder, tmp_path / "quantized", skip=".gate.weight")
    worlds = {size: run_ranks(look, size, folder, quantized, splits) for size, splits in SPLITS.items()}
    bytes_expected = expected_hashes(folder)
    assert len(bytes_expected) == 2 * 3 * (4 if folder.name == "mixtral" else 6)
    first = worlds[1][0]
    for by_rank in worlds.values():
        for found in by_rank:
            assert found["plain"] == found["quantized"] == bytes_expected
            assert found["plain fingerprint"] == found["quantized fingerprint"] == first["plain fingerprint"]
            for steps, gradients in zip(found["steps"], found["gradients"], strict=True):
                for index, (one, other) in enumerate(zip(steps, first["steps"][0], strict=True)):
                    assert one.loss == pytest.approx(other.loss, rel=1e-6)
                    assert one.num_targets == other.num_targets
                    assert_close(gradients[index], first["gradients"][0][index], f"gradient of step {index + 1}")

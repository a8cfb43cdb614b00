"""Full fine-tuning: gradients and steps are those of transformers' model alone, for every number of ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fsdp_qlora import data
from fsdp_qlora.adapters import full_tensor
from fsdp_qlora.build import build_model
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks, make_mesh, process_group
from fsdp_qlora.optim import local
from fsdp_qlora.quant.adapt import QuantSettings
from fsdp_qlora.resume import trainable
from fsdp_qlora.trainer import Trainer
from tests.distributed.test_equivalence import LOADER, NODE, Split, assert_close, differences, examples, take_steps
from tests.ranks import run_ranks
from tests.tiny import memory, save_tiny

VOCABULARY = 321
"""Rows that no number of ranks here divides."""

MAX_GRAD_NORM = 0.5
NUM_STEPS = 2
LR = 1e-3

SPLITS = {
    1: [Split(4, 1), Split(2, 2, cpu_offload=True, activation_checkpointing=True)],
    2: [Split(1, 2), Split(2, 1, sharding="none"), Split(1, 2, cpu_offload=True, activation_checkpointing=True)],
    4: [Split(1, 1, sharding="hybrid", activation_checkpointing=True)],
}

Results = dict[str, Any]
"""Losses and norms of the steps, clipped gradients of the first and parameters after the last by transformers' names."""


def make_trainer(folder: Path, split: Split, ranks: Ranks, dtype: torch.dtype) -> Trainer:
    ranks = dataclasses.replace(ranks, mesh=make_mesh(ranks.device, ranks.world_size, split.sharding, NODE))
    settings = memory(cpu_offload=split.cpu_offload, activation_checkpointing=split.activation_checkpointing)
    quant = QuantSettings("none", num_shards=ranks.num_shards)
    built = build_model(folder, ranks, quant, None, dtype, memory=settings, full=True)
    own = {"batch_size": split.batch_size, "gradient_accumulation_steps": split.accumulation}
    loader = data.Loader(examples(), **LOADER, **own, rank=ranks.rank, world_size=ranks.world_size)
    config = TrainConfig(
        train_type="full",
        max_steps=NUM_STEPS,
        lr=LR,
        lr_scheduler="constant",
        warmup_ratio=0,
        max_grad_norm=MAX_GRAD_NORM,
        weight_decay=0.1,
    )
    return Trainer(config, ranks, built, loader, {})


def train_on_rank(folder: Path, splits: list[Split], dtype: torch.dtype, device: str = "cpu") -> list[Results]:
    results = []
    with process_group("full", timeout_s=60, device=device) as ranks:
        for split in splits:
            trainer = make_trainer(folder, split, ranks, dtype)
            steps, gradients = take_steps(trainer, NUM_STEPS, gradients_of)
            after = {name: whole(parameter, trainer) for name, parameter in trainable(trainer.root)}
            losses, norms = [step.loss for step in steps], [step.grad_norm for step in steps]
            results.append({"losses": losses, "norms": norms, "gradients": gradients[0], "after": after})
    return results


def gradients_of(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: whole(parameter.grad, trainer) for name, parameter in trainable(trainer.root)}


def whole(value: torch.Tensor | None, trainer: Trainer) -> np.ndarray:
    assert value is not None
    assert value.dtype == torch.float32
    return full_tensor(value, trainer.ranks.device).numpy()


def train_alone(folder: Path, dtype: torch.dtype, device: str = "cpu") -> Results:
    """Do the same steps with transformers' model and torch's AdamW: float32 masters, the computation in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    masters = dict(model.to(device).named_parameters())
    computing = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").to(device).train()
    )
    optimizer = torch.optim.AdamW(masters.values(), lr=LR, weight_decay=0.1)
    loader = data.Loader(examples(), **LOADER, batch_size=4, gradient_accumulation_steps=1, rank=0, world_size=1)
    found: Results = {"losses": [], "norms": []}
    for index in range(NUM_STEPS):
        (batch,) = loader.step(0, index)
        labels = torch.full_like(batch.labels, -100)
        labels[:, 1:] = batch.labels[:, :-1]  # transformers shifts them itself
        ids, labels = batch.input_ids.to(device), labels.to(device)
        loss = computing(input_ids=ids, labels=labels, num_items_in_batch=batch.num_targets).loss
        loss.backward()
        for name, parameter in computing.named_parameters():
            assert parameter.grad is not None, name
            masters[name].grad, parameter.grad = parameter.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), MAX_GRAD_NORM)
        found["losses"].append(loss.item())
        found["norms"].append(norm.item())
        gradients = {name: parameter.grad.to("cpu", copy=True).numpy() for name, parameter in masters.items()}
        found.setdefault("gradients", gradients)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in computing.named_parameters():
                parameter.copy_(masters[name])
    found["after"] = {name: parameter.detach().cpu().numpy() for name, parameter in masters.items()}
    return found


# llama3 and gemma2 are tied, gemma2 scales looked-up rows and caps logits; qwen2 has biases, phi3 joined projections
@pytest.mark.parametrize("family", ["llama", "llama3", "gemma2", "qwen2", "phi3"])
def test_steps_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = save_tiny(family, tmp_path, num_hidden_layers=2, vocab_size=VOCABULARY)
    expected = train_alone(folder, torch.float32)
    worlds = SPLITS if family in ("llama", "llama3") else {2: SPLITS[2][:1]}
    for world_size, splits in worlds.items():
        results = run_ranks(train_on_rank, world_size, folder, splits, torch.float32)[0]
        for found, split in zip(results, splits, strict=True):
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6), split
            assert found["norms"] == pytest.approx(expected["norms"], rel=1e-6), split
            assert_close(found["gradients"], expected["gradients"], f"gradient with {world_size} ranks and {split}")
            # Adam divides by the gradient's size, so that where that is tiny its rounding shows
            total, _ = differences(found["after"], expected["after"])
            assert total < 5e-6, f"parameters with {world_size} ranks and {split} differ by {total:.1e}"


def test_bf16_is_as_near_to_float32_as_transformers(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, num_hidden_layers=2, vocab_size=VOCABULARY)
    exact, theirs = train_alone(folder, torch.float32), train_alone(folder, torch.bfloat16)
    for world_size in (1, 2):
        (found,) = run_ranks(train_on_rank, world_size, folder, SPLITS[world_size][:1], torch.bfloat16)[0]
        assert_as_near(found, theirs, exact)


def assert_as_near(found: Results, theirs: Results, exact: Results) -> None:
    """Assert that rounding to bf16 changes as much as it does in transformers' model."""
    assert found["losses"] == pytest.approx(exact["losses"], rel=5e-3)
    for part in ("gradients", "after"):
        own, others = (differences(result[part], exact[part])[0] for result in (found, theirs))
        print(f"{part}: {own:.1e} from float32, transformers' model {others:.1e}")
        assert own < 1.2 * others, part


def load_on_rank(folder: Path, sharding: str) -> tuple[int, int]:
    """Return the bytes that this rank read, and those that it holds."""
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        ranks = dataclasses.replace(ranks, mesh=make_mesh(ranks.device, ranks.world_size, sharding))
        quant = QuantSettings("none", num_shards=ranks.num_shards)
        built = build_model(folder, ranks, quant, None, torch.bfloat16, full=True)
        held = sum(local(parameter).nbytes for _, parameter in trainable(built.root))
        return built.report.bytes_read, held


def test_each_rank_reads_and_holds_only_its_rows(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, torch.bfloat16, num_hidden_layers=2)
    whole_bytes = sum(value.nbytes for value in load_file(folder / "model.safetensors").values())
    assert run_ranks(load_on_rank, 2, folder, "full") == [(whole_bytes / 2, 2 * whole_bytes / 2)] * 2
    assert run_ranks(load_on_rank, 2, folder, "none") == [(whole_bytes, 2 * whole_bytes)] * 2

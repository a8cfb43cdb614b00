"""Training losses in bf16 on CUDA against PEFT + bitsandbytes: an 8B-wide model of two blocks, 20 steps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fsdp_qlora.adapters import read_adapter
from fsdp_qlora.build import build_model
from fsdp_qlora.distributed import process_group
from fsdp_qlora.parallel import MemorySettings
from scripts import random_checkpoint
from tests.batches import make_trainer, random_ids, whole_rows
from tests.parity import reference
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu

NUM_BLOCKS, NUM_STEPS, ROWS, TOKENS, LR = 2, 20, 4, 512, 5e-4
LORA = reference.LoraSettings(rank=16, alpha=16.0)


def rows(step: int) -> torch.Tensor:
    """Return the token ids [rows, tokens] of a step; two batches take turns, so that it can learn."""
    return random_ids(ROWS, TOKENS, 128256, seed=step % 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-8b")
    random_checkpoint.make("llama-8b", str(folder), NUM_BLOCKS)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[float]:
    """Train PEFT's model; its first adapter is left beside the checkpoint."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, device_map={"": 0})
    config = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    model.save_pretrained(checkpoint / "adapter")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=0.0)
    losses = []
    for step in range(NUM_STEPS):
        ids = rows(step).cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train(folder: Path, memory: MemorySettings, sharding: str) -> list[float]:
    """Train on this rank's share of the same rows; hybrid sharding takes each rank for a machine of its own."""
    if sharding == "hybrid":
        os.environ["LOCAL_WORLD_SIZE"] = "1"
    with process_group(sharding, 120) as ranks:
        built = build_model(
            folder,
            ranks,
            reference.QuantSettings(num_shards=ranks.num_shards),
            LORA,
            torch.bfloat16,
            memory=memory,
            adapter=read_adapter(folder / "adapter")[1],
        )
        trainer = make_trainer(built, ranks, max_steps=NUM_STEPS, lr=LR)
        share = slice(ranks.rank * ROWS // ranks.world_size, (ranks.rank + 1) * ROWS // ranks.world_size)
        return [trainer.train_step([whole_rows(rows(s)[share])], s).loss for s in range(NUM_STEPS)]


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize(("world_size", "sharding"), [(1, "full"), (2, "full"), (2, "none"), (2, "hybrid")])
def test_losses_are_pefts(
    checkpoint: Path, expected: list[float], world_size: int, sharding: str, offload: bool
) -> None:
    everything = MemorySettings(NUM_BLOCKS, True, True, NUM_BLOCKS, True)
    memory = everything if offload else MemorySettings(checkpoint_blocks=NUM_BLOCKS)
    by_rank = run_ranks(train, world_size, checkpoint, memory, sharding, cuda=True)
    deviation = max(abs(a - b) / b for a, b in zip(by_rank[0], expected, strict=True))
    print(f"{world_size} x {sharding}, offload {offload}: {by_rank[0][0]:.4f} -> {by_rank[0][-1]:.4f},", end=" ")
    print(f"PEFT {expected[0]:.4f} -> {expected[-1]:.4f}, largest relative difference {deviation:.1e}")
    assert all(losses == by_rank[0] for losses in by_rank)
    assert expected[-1] < 0.995 * expected[0], "the comparison says nothing unless the model learns"
    assert deviation < 1e-2

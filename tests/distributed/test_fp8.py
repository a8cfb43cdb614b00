"""Fp8 with shards: every rank finds the gains of whole matrices, and trains as a single rank does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fsdp_qlora.build import build_model
from fsdp_qlora.distributed import process_group
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, lora_linears
from tests.batches import make_trainer, random_ids, whole_rows
from tests.ranks import run_ranks
from tests.tiny import COMMON, memory, save_tiny


def train(folder: Path, everything: bool) -> tuple[dict[str, float], list[float]]:
    """Train two steps, each rank on half of the rows; return the gains and the losses.

    Args:
        everything: whether all is offloaded and recomputed.
    """
    rows = random_ids(4, 32, COMMON["vocab_size"])
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        quant = QuantSettings(num_shards=ranks.num_shards, fp8=True)
        rests = memory(cpu_offload=everything, activation_checkpointing=everything)
        built = build_model(folder, ranks, quant, LoraSettings(4, 8.0), torch.float32, memory=rests)
        trainer = make_trainer(built, ranks, max_steps=2, lr=1e-2)
        size = len(rows) // ranks.world_size
        batch = whole_rows(rows[ranks.rank * size : (ranks.rank + 1) * size])
        losses = [trainer.train_step([batch], step).loss for step in range(2)]
        gains = {linear.name: float(linear.gain) for linear in lora_linears(built.root) if linear.gain is not None}
    return gains, losses


def test_gains_and_losses_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    ((gains, losses),) = run_ranks(train, 1, folder, False)
    assert len(gains) == 4 * COMMON["num_hidden_layers"]
    for everything in (False, True):
        for found_gains, found_losses in run_ranks(train, 2, folder, everything):
            assert found_gains == gains
            # single values can fall on the other side of two e4m3 numbers
            assert found_losses == pytest.approx(losses, rel=1e-4)
    assert losses[1] < losses[0] * 0.99

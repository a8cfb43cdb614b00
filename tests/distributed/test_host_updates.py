"""Updates beside the forward of blocks that FSDP gathers: no block computes with parameters that are still to be updated."""

from __future__ import annotations

import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from fsdp_qlora import host_updates
from fsdp_qlora.adapters import gather_adapter
from fsdp_qlora.build import build_model
from fsdp_qlora.distributed import process_group
from fsdp_qlora.optim import build_optimizer
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from tests.batches import make_trainer, random_ids, whole_rows
from tests.ranks import run_ranks
from tests.tiny import COMMON, save_tiny

BLOCKS, STEPS, DELAY_S = 4, 3, 0.05
OFFLOADED = [BLOCKS, BLOCKS // 2]
UPDATE = host_updates._update


def late(*args: object) -> None:
    """Update a block so late that a forward which does not wait has used it by then."""
    time.sleep(DELAY_S)
    UPDATE(*args)  # type: ignore[arg-type]


def train(folder: Path, device: str) -> list[list[float]]:
    """Return the losses of training and evaluation with nothing offloaded, and with these numbers of blocks."""
    found = []
    with process_group("full", 120, device=device) as ranks, mock.patch.object(host_updates, "_update", late):
        for count in (0, *OFFLOADED):
            memory = MemorySettings(count, False, count > 0, BLOCKS)
            quant = QuantSettings(num_shards=ranks.num_shards)
            built = build_model(folder, ranks, quant, LoraSettings(4, 8.0), torch.float32, memory=memory)
            trainer = make_trainer(built, ranks, max_steps=STEPS, lr=1e-2)
            trainer.optimizer = build_optimizer(built.root, trainer.config, built.offloaded)  # on CPUs, too
            losses = []
            for step in range(STEPS):
                batch = whole_rows(random_ids(2, 32, COMMON["vocab_size"], seed=step + 10 * ranks.rank))
                losses.append(trainer.train_step([batch, batch], step).loss)
            trainer.optimizer.finish()
            losses.append(sum(float(value.abs().sum()) for value in gather_adapter(built.root, ranks).values()))
            found.append(losses)
    return found


def check_late_updates(folder: Path, world_size: int, device: str) -> None:
    """Compare the losses of all offloads, which must be the same to the bit."""
    save_tiny("llama", folder, num_hidden_layers=BLOCKS)
    for resident, *others in run_ranks(train, world_size, folder, device, cuda=device == "cuda"):
        assert len(set(resident)) == STEPS + 1
        assert others == [resident] * len(OFFLOADED)


@pytest.mark.parametrize("world_size", [1, 2])
def test_late_updates_change_nothing(tmp_path: Path, world_size: int) -> None:
    check_late_updates(tmp_path, world_size, "cpu")

"""Long contexts with the MLP in chunks on CUDA: the same losses, compiled or not, sharded or not, and less memory."""

from __future__ import annotations

import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from fsdp_qlora import chunked_mlp
from fsdp_qlora.build import build_model
from fsdp_qlora.compile_workers import end_compile_workers
from fsdp_qlora.distributed import process_group
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from scripts import random_checkpoint
from tests.batches import make_trainer, random_ids, whole_rows
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu

NUM_BLOCKS, NUM_STEPS, TOKENS = 2, 3, 32768


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-8b")
    random_checkpoint.make("llama-8b", str(folder), NUM_BLOCKS)
    return folder


def train(folder: Path, compiled: bool, chunk_tokens: int) -> tuple[list[float], int, float]:
    """Return the losses of this rank, its most allocated bytes, and the seconds of the fastest step."""
    with process_group("full", 120) as ranks, mock.patch.object(chunked_mlp, "CHUNK_TOKENS", chunk_tokens):
        memory = MemorySettings(checkpoint_blocks=NUM_BLOCKS)
        quant, lora = QuantSettings(num_shards=ranks.num_shards), LoraSettings(16, 16.0)
        built = build_model(folder, ranks, quant, lora, torch.bfloat16, memory=memory, compiled=compiled)
        trainer = make_trainer(built, ranks, max_steps=NUM_STEPS, lr=5e-4)
        rows = [whole_rows(random_ids(1, TOKENS, 128256, seed=step % 2 + 2 * ranks.rank)) for step in range(NUM_STEPS)]
        torch.cuda.reset_peak_memory_stats()
        losses, seconds = [], []
        for step, row in enumerate(rows):
            started = time.perf_counter()
            losses.append(trainer.train_step([row], step).loss)
            seconds.append(time.perf_counter() - started)
        end_compile_workers()
        return losses, torch.cuda.max_memory_allocated(), min(seconds)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_are_the_same_and_less_memory_is_needed(checkpoint: Path, world_size: int, compiled: bool) -> None:
    found = {}
    for chunk_tokens in (chunked_mlp.CHUNK_TOKENS, TOKENS):
        by_rank = run_ranks(train, world_size, checkpoint, compiled, chunk_tokens, cuda=True)
        assert all(losses == by_rank[0][0] for losses, _, _ in by_rank)
        found[chunk_tokens] = by_rank[0]
    (losses, peak, seconds), (whole_losses, whole_peak, whole_seconds) = found.values()
    print(f"{peak / 2**30:.2f} of {whole_peak / 2**30:.2f} GiB, {seconds:.3f} s for {whole_seconds:.3f}, {losses}")
    assert losses == pytest.approx(whole_losses, rel=1e-3)
    # five tensors of the MLP's width are alive at once in backward, of which a chunk has a quarter of the tokens
    assert peak < whole_peak - 2.5 * TOKENS * 14336 * 2

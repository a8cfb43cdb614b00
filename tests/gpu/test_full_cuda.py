"""Full fine-tuning on CUDA in bf16, resident and offloaded, against transformers' model with float32 masters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.test_equivalence import Split
from tests.distributed.test_full import assert_as_near, train_alone, train_on_rank
from tests.ranks import run_ranks
from tests.tiny import save_tiny

pytestmark = pytest.mark.gpu

SPLITS = {
    1: [Split(4, 1), Split(2, 2, cpu_offload=True, activation_checkpointing=True)],
    2: [Split(1, 2), Split(2, 1, cpu_offload=True, activation_checkpointing=True)],
}


@pytest.mark.parametrize("world_size", SPLITS)
def test_bf16_is_as_near_to_float32_as_transformers(tmp_path: Path, world_size: int) -> None:
    folder = save_tiny("llama", tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    exact, theirs = (train_alone(folder, dtype, "cuda") for dtype in (torch.float32, torch.bfloat16))
    splits = SPLITS[world_size]
    for found in run_ranks(train_on_rank, world_size, folder, splits, torch.bfloat16, "cuda", cuda=True)[0]:
        assert_as_near(found, theirs, exact)

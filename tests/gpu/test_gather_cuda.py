"""Gathered bytes on CUDA, where FSDP's copies can change NaN bit patterns of 16-bit floats (pytorch#159333)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fsdp_qlora.quant.layout import STORAGE_DTYPES
from tests.distributed.checkpoints import save_odd, save_quantized
from tests.distributed.test_gather import Case, flip_cases, gather_cases, storage_cases
from tests.ranks import run_ranks
from tests.tiny import save_tiny

pytestmark = pytest.mark.gpu

TAKES_UINT8 = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)
STORAGES = tuple(storage for storage in STORAGE_DTYPES if storage != "uint8" or TAKES_UINT8)


@pytest.mark.parametrize("world_size", [1, 2])
def test_gathered_bytes_are_those_of_the_checkpoint(tmp_path: Path, world_size: int) -> None:
    # large enough that codes and scales hold every 16-bit NaN pattern class many times over
    wide = save_tiny("llama", tmp_path / "wide", num_hidden_layers=2, hidden_size=512, intermediate_size=1400)
    odd = save_odd(tmp_path / "odd")
    quantized = save_quantized(odd, tmp_path / "odd-nf4")
    cases = [*storage_cases(wide, STORAGES), *storage_cases(odd, STORAGES), Case(odd, double_quant=False)]
    cases += [Case(odd, quantized), Case(odd, quantized, cpu_offload=True)]
    by_rank = run_ranks(gather_cases, world_size, "cuda", cases, cuda=True)
    assert all(result == by_rank[0] for result in by_rank)
    assert all(len(result) == 14 for result in by_rank[0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_changed_bit_in_one_shard_stops_every_rank(tmp_path: Path, world_size: int) -> None:
    source = save_tiny("llama", tmp_path / "usual", num_hidden_layers=2)
    cases = [Case(source), Case(source, storage="bfloat16", cpu_offload=True), Case(source, sharding="none")]
    by_rank = run_ranks(flip_cases, world_size, "cuda", cases, cuda=True)
    for messages in by_rank:
        assert messages == by_rank[0]
        assert [message.split(" ")[0] for message in messages] == ["'model.layers.0.self_attn.o_proj'"] * 3

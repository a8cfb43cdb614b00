"""Each rank reads its own part of a checkpoint only, and an error of one rank ends all of them."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsdp_qlora.build import build_model
from fsdp_qlora.distributed import make_mesh, process_group
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from fsdp_qlora.quant.layout import BLOCKSIZE, Layout
from fsdp_qlora.weights import reader as reader_module
from fsdp_qlora.weights.read_ahead import ReadAhead, Run
from fsdp_qlora.weights.reader import Reader
from tests.distributed.checkpoints import is_block_matrix, save_quantized
from tests.ranks import run_ranks
from tests.tiny import save_tiny

LORA = LoraSettings(rank=2, alpha=4)


def load_on_rank(folders: list[Path], sharding: str) -> list[tuple[str, str, float, int]]:
    """Load checkpoints; return each one's error type and message ('' for none), seconds and bytes read."""
    results = []
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        ranks = dataclasses.replace(ranks, mesh=make_mesh(ranks.device, ranks.world_size, sharding))
        quant = QuantSettings(num_shards=ranks.num_shards)
        for folder in folders:
            started = time.monotonic()
            kind, message, bytes_read = "", "", 0
            try:
                bytes_read = build_model(folder, ranks, quant, LORA, torch.float32).report.bytes_read
            except FsdpQloraError as error:
                kind, message = type(error).__name__, str(error)
            results.append((kind, message, time.monotonic() - started, bytes_read))
    return results


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose matrices are large beside the roundings."""
    folder = tmp_path_factory.mktemp("loading") / "llama"
    return save_tiny("llama", folder, num_hidden_layers=2, hidden_size=256, intermediate_size=704, vocab_size=64)


def matrix_limit(shape: tuple[int, ...], itemsize: int, num_shards: int) -> int:
    """Return the most bytes of a matrix a rank may read: those behind its shard, and a block at each edge of it.

    The shards also share out the scales, 1/32 of the codes, so the first ones hold that much more of the codes.
    """
    layout = Layout(shape[0], shape[1], num_shards=num_shards)
    if num_shards == 1:
        return layout.num_weights * itemsize
    assert layout.padded_bytes / layout.codes.size < 1 + 1 / 32 + 1 / 128, "scales of scales and padding are small"
    return (2 * layout.shard_bytes + 2 * BLOCKSIZE) * itemsize


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_reads_its_share_and_no_more(source: Path, world_size: int) -> None:
    tensors = load_file(source / "model.safetensors")
    limit = total = 0
    for name, value in tensors.items():
        shape = tuple(value.shape)
        total += value.nbytes
        rows = -(-shape[0] // world_size)
        is_matrix = is_block_matrix(name, shape)
        limit += matrix_limit(shape, 4, world_size) if is_matrix else rows * (value.nbytes // shape[0])
    by_rank = run_ranks(load_on_rank, world_size, [source], "full")
    read = [results[0][3] for results in by_rank]
    assert max(read) <= limit
    assert max(read) <= total / world_size * 1.06, "the limit itself is close to an equal share"
    assert total <= sum(read) <= total * 1.03, "everything is read, and hardly anything twice"


def test_without_sharding_every_rank_reads_all(source: Path) -> None:
    total = sum(value.nbytes for value in load_file(source / "model.safetensors").values())
    assert [results[0][3] for results in run_ranks(load_on_rank, 2, [source], "none")] == [total, total]


def test_a_quantized_checkpoint_is_shared_out_too(source: Path, tmp_path: Path) -> None:
    folder = save_quantized(source, tmp_path / "nf4")
    tensors = load_file(folder / "model.safetensors")
    share = sum(value.nbytes for name, value in tensors.items() if "quant_" not in name) / 2
    described = sum(value.nbytes for name, value in tensors.items() if "quant_" in name)
    for results in run_ranks(load_on_rank, 2, [folder], "full"):
        kind, _, _, bytes_read = results[0]
        assert kind == ""
        # every rank checks the descriptions; a few kilobytes a matrix
        assert bytes_read <= share * 1.02 + 3 * described


def recorded_reads(folders: list[Path]) -> list[tuple[list[tuple[str, int, int]], list[tuple[str, int, int]]]]:
    """Load checkpoints; return (file, place, size) of what was to be read ahead, and of what was read then."""
    results = []
    with process_group("full", timeout_s=60, device="cpu") as ranks, pytest.MonkeyPatch.context() as patch:
        planned: list[Run] = []
        read: list[Run] = []

        def ahead(runs: Iterable[Run], num_threads: int) -> ReadAhead:
            planned.extend(runs)
            return ReadAhead([], num_threads)

        def read_into(reader: Reader, data: torch.Tensor, name: str, start: int) -> None:
            if "quant_" not in name:  # a few bytes that describe a matrix
                read.append((reader.entry(name).file, reader.entry(name).start + start, data.numel()))
            original(reader, data, name, start)

        original = Reader.read_into
        patch.setattr(reader_module, "ReadAhead", ahead)
        patch.setattr(Reader, "read_into", read_into)
        for folder in folders:
            planned.clear(), read.clear()
            build_model(folder, ranks, QuantSettings(num_shards=ranks.num_shards), LORA, torch.float32)
            results.append(tuple([(path.name, *place) for path, *place in runs] for runs in (planned, read)))
    return results


def test_what_is_read_ahead_is_what_is_read(source: Path, tmp_path: Path) -> None:
    folders = [source, save_quantized(source, tmp_path / "nf4"), save_tiny("mixtral", tmp_path / "experts")]
    for results in run_ranks(recorded_reads, 2, folders):
        for planned, read in results:
            assert len(planned) > 10
            assert planned == read


def plant(source: Path, folder: Path, name: str, row: int, value: float) -> Path:
    """Save a copy of a checkpoint with one value changed."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(len(tensors[name]), -1)[row, 0] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


PLANTED = [
    ("model.layers.0.self_attn.q_proj.weight", 0, float("nan")),
    ("model.layers.1.mlp.down_proj.weight", -1, float("-inf")),
    ("model.embed_tokens.weight", -1, float("nan")),
    ("model.layers.1.input_layernorm.weight", 2, float("inf")),
    ("lm_head.weight", 0, float("nan")),
]
"""Tensor, row and value: the first rows are the first rank's, the last ones the last rank's."""


def test_damage_seen_by_one_rank_is_an_error_on_every_rank(source: Path, tmp_path: Path) -> None:
    folders = [plant(source, tmp_path / str(number), *planted) for number, planted in enumerate(PLANTED)]
    by_rank = run_ranks(load_on_rank, 2, folders, "full")
    for case, (name, row, _) in enumerate(PLANTED):
        seen_by = 1 if row == -1 else 0
        for rank, results in enumerate(by_rank):
            kind, message, seconds, _ = results[case]
            assert kind == ("WeightsError" if rank == seen_by else "TrainingError")
            assert f"'{name}' holds NaN or infinite values" in message
            assert "model.safetensors" in message
            assert seconds < 30
            if rank != seen_by:
                assert message.startswith(f"rank {seen_by} failed while loading weights: ")


def load_with_bad_disk(folder: Path) -> tuple[str, str]:
    """Load a checkpoint while the last rank's disk gives input/output errors in the middle; return type and message."""
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        if ranks.rank == ranks.world_size - 1:
            calls = []

            def broken(*args: object) -> int:
                calls.append(args)
                if len(calls) > 5:
                    raise OSError(5, "Input/output error")
                return preadv(*args)  # type: ignore[arg-type]

            preadv, os.preadv = os.preadv, broken
        try:
            build_model(folder, ranks, QuantSettings(num_shards=ranks.num_shards), LORA, torch.float32)
        except FsdpQloraError as error:
            return type(error).__name__, str(error)
        return "", ""


def test_a_failing_disk_of_one_rank_is_an_error_on_every_rank(source: Path) -> None:
    started = time.monotonic()
    (first, first_message), (last, last_message) = run_ranks(load_with_bad_disk, 2, source)
    assert (first, last) == ("TrainingError", "WeightsError")
    assert "model.safetensors: tensor 'model." in last_message
    assert "cannot be read (Input/output error)" in last_message
    assert first_message == f"rank 1 failed while loading weights: {last_message}"
    assert time.monotonic() - started < 45

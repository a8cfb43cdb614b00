"""--loading broadcast: one copy of the base is read, and the others are byte for byte the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

import pytest
import torch

from fsdp_qlora.build import build_model, verify_weights
from fsdp_qlora.distributed import make_mesh, process_group
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from fsdp_qlora.weights.loader import Loader, LoadReport
from tests.distributed.checkpoints import save_odd, save_quantized
from tests.faults.jobs import losses, make_inputs, of_world, train
from tests.ranks import run_ranks
from tests.tiny import memory, save_tiny

LORA = LoraSettings(rank=2, alpha=4)
NODE = 2
"""Ranks of what hybrid sharding takes for a node."""

Loaded = tuple[LoadReport, str, int]
"""What loading did, the sha256 of all parameters of this rank, and the bytes of the frozen ones."""


def load_on_rank(cases: list[tuple[Path, str, bool]], broadcast: bool) -> list[Loaded]:
    """Load checkpoints, each with a kind of sharding and offloaded or not, and verify what is gathered."""
    results = []
    with process_group("full", timeout_s=60, device="cpu") as joined:
        for folder, sharding, cpu_offload in cases:
            mesh = make_mesh(joined.device, joined.world_size, sharding, NODE)
            ranks = dataclasses.replace(joined, mesh=mesh)
            quant, settings = QuantSettings(num_shards=ranks.num_shards), memory(cpu_offload=cpu_offload)
            built = build_model(folder, ranks, quant, LORA, torch.float32, memory=settings, broadcast=broadcast)
            verify_weights(built, ranks)
            sha, frozen = hashlib.sha256(), 0
            for name, parameter in built.root.named_parameters():
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                data = local.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                sha.update(name.encode() + data)
                frozen += 0 if parameter.requires_grad else len(data)
            results.append((built.report, sha.hexdigest(), frozen))
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("broadcast") / "llama", num_hidden_layers=2)


def test_only_the_first_copy_is_read(folder: Path, tmp_path: Path) -> None:
    """Matrices that no number of ranks divides, experts, tied embeddings; on two nodes of two ranks and on four of one."""
    odd, experts = save_odd(tmp_path / "odd"), save_tiny("qwen3_moe", tmp_path / "experts", num_hidden_layers=2)
    tied = save_tiny("qwen3", tmp_path / "tied", num_hidden_layers=2)
    cases = [(folder, "hybrid", True), (odd, "hybrid", False), (experts, "hybrid", False), (tied, "none", False)]
    read, sent = run_ranks(load_on_rank, 2 * NODE, cases, False), run_ranks(load_on_rank, 2 * NODE, cases, True)
    for rank in range(2 * NODE):
        for case, (_, sharding, _) in enumerate(cases):
            is_reader = rank < (NODE if sharding == "hybrid" else 1)
            (every, sha_then, frozen), (one, sha_now, _) = read[rank][case], sent[rank][case]
            assert sha_now == sha_then
            assert one.fingerprints == every.fingerprints
            assert one.bytes_read == (every.bytes_read if is_reader else 0)
            assert one.bytes_received == (0 if is_reader else frozen)
            assert every.bytes_received == 0


def test_of_a_quantized_checkpoint_the_others_read_one_description(folder: Path, tmp_path: Path) -> None:
    """The form of the base is what all ranks have to know before they build the model."""
    cases = [(save_quantized(folder, tmp_path / "nf4"), "hybrid", False)]
    read, sent = run_ranks(load_on_rank, 2 * NODE, cases, False), run_ranks(load_on_rank, 2 * NODE, cases, True)
    for rank in range(2 * NODE):
        (every, sha_then, frozen), (one, sha_now, _) = read[rank][0], sent[rank][0]
        assert sha_now == sha_then
        assert one.fingerprints == every.fingerprints
        if rank < NODE:
            assert (one.bytes_read, one.bytes_received) == (every.bytes_read, 0)
        else:
            assert one.bytes_read < 200
            assert one.bytes_received == frozen


def test_the_record_says_who_read_what(tmp_path: Path) -> None:
    settings = {**of_world(make_inputs(tmp_path), 2), "max_steps": 1, "sharding": "none"}
    read, sent = tmp_path / "read", tmp_path / "sent"
    assert train(2, {**settings, "output_dir": read}) == [0, 0]
    assert train(2, {**settings, "output_dir": sent, "loading": "broadcast"}) == [0, 0], sent.with_suffix(
        ".log"
    ).read_text()
    assert losses(sent) == losses(read)
    ranks = json.loads((sent / "run.json").read_text())["result"]["ranks"]
    size = json.loads((read / "run.json").read_text())["result"]["ranks"][0]["bytes_read"]
    assert [rank["bytes_read"] for rank in ranks] == [size, 0]
    assert ranks[0]["bytes_received"] == 0 < ranks[1]["bytes_received"] < size, "it is sent quantised"
    assert "MiB read by this rank for 2 copies in" in sent.with_suffix(".log").read_text()


def load_with_a_fault(folder: Path, fault: str) -> tuple[str, str, float]:
    """Load while rank 1 cannot read, or rank 3 receives a wrong byte; return the error's type and message, and seconds."""
    started = time.monotonic()
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        ranks = dataclasses.replace(ranks, mesh=make_mesh(ranks.device, ranks.world_size, "hybrid", NODE))
        if fault == "disk" and ranks.rank == 1:

            def broken(*_: object) -> int:
                raise OSError(5, "Input/output error")

            os.preadv = broken  # type: ignore[assignment]
        if fault == "transfer" and ranks.rank == 3:
            receive = Loader._broadcast

            def damaged(self: Loader, module: torch.nn.Module, name: str, target: torch.Tensor) -> None:
                receive(self, module, name, target)
                if name == "packed":
                    target.view(torch.uint8)[5] ^= 1

            Loader._broadcast = damaged  # type: ignore[method-assign]
        try:
            quant = QuantSettings(num_shards=ranks.num_shards)
            verify_weights(build_model(folder, ranks, quant, LORA, torch.float32, broadcast=True), ranks)
        except FsdpQloraError as error:
            return type(error).__name__, str(error), time.monotonic() - started
    return "", "", time.monotonic() - started


def test_a_failing_disk_of_the_reading_node_ends_all(folder: Path) -> None:
    results = run_ranks(load_with_a_fault, 2 * NODE, folder, "disk")
    _, cause, _ = results[1]
    assert "cannot be read (Input/output error)" in cause
    for rank, (kind, message, seconds) in enumerate(results):
        assert kind == ("WeightsError" if rank == 1 else "TrainingError")
        assert message == (cause if rank == 1 else f"rank 1 failed while loading weights: {cause}")
        assert seconds < 45


def test_what_the_transfer_damages_is_found(folder: Path) -> None:
    for kind, message, _ in run_ranks(load_with_a_fault, 2 * NODE, folder, "transfer"):
        assert kind == "WeightsError"
        assert "is gathered with other bytes on rank 2" in message, "rank 2 gathers from rank 3"

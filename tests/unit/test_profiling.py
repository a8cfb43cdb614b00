"""Traces of a few steps, counted by the optimizer's, and histories of GPU memory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks, make_mesh, process_group
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.profiling import PROFILED_STEPS, SKIPPED_STEPS, check_profiling, profiling


def train(folder: Path, num_steps: int, **settings: bool) -> None:
    """Run steps of a little optimizer, each with one matrix product of its own shape."""
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.SGD([parameter])
    with process_group("full", 60, device="cpu") as ranks:
        config = TrainConfig(output_dir=str(folder), **settings)
        with profiling(config, ranks, optimizer):
            for _ in range(num_steps):
                (parameter @ parameter).sum().backward()
                optimizer.step()


def test_a_trace_of_the_steps_after_the_first(tmp_path: Path) -> None:
    train(tmp_path, 10, profile=True)
    (path,) = tmp_path.iterdir()
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{i}" for i in range(SKIPPED_STEPS, SKIPPED_STEPS + PROFILED_STEPS)}
    assert sum(event["name"] == "aten::mm" for event in events) >= PROFILED_STEPS


def test_a_run_too_short_for_a_trace_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no step was traced, as the first 3 never are"):
        train(tmp_path, 3, profile=True)


def test_nothing_is_recorded_unasked(tmp_path: Path) -> None:
    train(tmp_path, 8)
    assert list(tmp_path.iterdir()) == []


def test_no_memory_history_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match="only GPUs keep a history of their memory, and this run is on the cpu"):
        check_profiling(TrainConfig(memory_snapshot=True), torch.device("cpu"))
    check_profiling(TrainConfig(), torch.device("cpu"))


@pytest.mark.gpu
def test_memory_history_is_written_at_an_error_too(tmp_path: Path) -> None:
    device = torch.device("cuda")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(4, device=device))])
    with process_group("full", 60) as ranks:
        own = Ranks(0, 1, 0, device, make_mesh(device, 1, "full"))
        with (
            pytest.raises(RuntimeError),
            profiling(TrainConfig(output_dir=str(tmp_path), memory_snapshot=True), own, optimizer),
        ):
            raise RuntimeError("out of memory")
    assert [path.name for path in tmp_path.iterdir()] == [f"memory-rank-{ranks.rank}.pickle"]

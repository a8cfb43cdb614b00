"""The process group, devices, and errors that become those of all ranks."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fsdp_qlora.distributed import (
    Ranks,
    agree_on_errors,
    choose_device,
    compute_dtype,
    count_cores,
    count_ranks_by_gpu,
    make_mesh,
    pick_backend,
    process_group,
    sum_over_ranks,
)
from fsdp_qlora.errors import ConfigError, DataError, FsdpQloraError, TrainingError, WeightsError
from tests.ranks import free_port, run_ranks


def agree(ranks: Ranks, failing: dict[int, FsdpQloraError]) -> tuple[str, str, bool]:
    """Fail on some ranks; return this rank's error type, message and whether it is its own to print."""
    try:
        with agree_on_errors(ranks, "counting sheep"):
            if ranks.rank in failing:
                raise failing[ranks.rank]
    except FsdpQloraError as error:
        return type(error).__name__, str(error), error.rank_local
    return "", "", False


def agree_on_rank(cases: list[dict[int, FsdpQloraError]]) -> list[tuple[str, str, bool]]:
    with process_group("full", timeout_s=30, device="cpu") as ranks:
        return [agree(ranks, failing) for failing in cases]


def agree_after_a_signal(failing: dict[int, FsdpQloraError]) -> tuple[str, str, bool]:
    with process_group("full", timeout_s=30, device="cpu") as ranks:
        return agree(replace(ranks, is_interrupted=lambda: ranks.rank == 0), failing)


def test_an_error_counts_more_than_a_signal() -> None:
    """So that every rank says that the run failed, and none that it was preempted."""
    interrupted = ("Interrupted", "interrupted while counting sheep")
    assert [found[:2] for found in run_ranks(agree_after_a_signal, 2, {})] == [interrupted] * 2
    assert run_ranks(agree_after_a_signal, 2, {1: DataError("row 7")}) == [
        ("TrainingError", "rank 1 failed while counting sheep: row 7", False),
        ("DataError", "row 7", True),
    ]


def test_errors_of_any_rank_are_errors_of_all() -> None:
    cases: list[dict[int, FsdpQloraError]] = [
        {},
        {1: WeightsError("file x is damaged")},
        {1: DataError("row 7"), 2: DataError("row 9")},
        {rank: ConfigError("the same") for rank in range(3)},
        {},
    ]
    by_case = list(zip(*run_ranks(agree_on_rank, 3, cases), strict=True))
    told = "rank 1 failed while counting sheep: "
    assert by_case[0] == (("", "", False),) * 3
    assert by_case[1] == (
        ("TrainingError", told + "file x is damaged", False),
        ("WeightsError", "file x is damaged", True),
        ("TrainingError", told + "file x is damaged", False),
    )
    assert by_case[2] == (
        ("TrainingError", told + "row 7", False),
        ("DataError", "row 7", True),
        ("DataError", "row 9", False),
    )
    assert [(kind, message) for kind, message, _ in by_case[3]] == [("ConfigError", "the same")] * 3
    assert [own for _, _, own in by_case[3]] == [True, False, False], "printed once"
    assert by_case[4] == (("", "", False),) * 3, "the ranks still understand each other"


def return_inside(world_size: int) -> int:
    """Leave the block by return on one rank, as saving does."""
    with process_group("full", timeout_s=30, device="cpu") as ranks:

        def leave() -> str:
            with agree_on_errors(ranks, "saving"):
                if ranks.rank == 1:
                    return "early"
            return "late"

        assert leave() == ("early" if ranks.rank == 1 else "late")
        return int(sum_over_ranks(1))


def test_a_rank_may_return_out_of_the_block() -> None:
    assert run_ranks(return_inside, 2, 2) == [2, 2]


def sums_on_rank() -> list[float]:
    with process_group("none", timeout_s=30, device="cpu") as ranks:
        return [sum_over_ranks(2**53 // 3 - ranks.rank), sum_over_ranks(0.25 * ranks.rank)]


def test_sums_are_exact_for_token_counts() -> None:
    third = 2**53 // 3
    assert run_ranks(sums_on_rank, 3) == [[3.0 * third - 3, 0.75]] * 3


def shards_on_rank(sharding: str) -> tuple[int, int, int, bool]:
    with process_group(sharding, timeout_s=30, device="cpu") as ranks:
        sum_over_ranks(1)  # rank 0 holds the store through which the others are still meeting
        return ranks.rank, ranks.num_shards, ranks.shard, ranks.is_main


def test_meshes() -> None:
    assert run_ranks(shards_on_rank, 2, "full") == [(0, 2, 0, True), (1, 2, 1, False)]
    assert run_ranks(shards_on_rank, 2, "none") == [(0, 1, 0, True), (1, 1, 0, False)]


def hybrid_on_rank(node_sizes: list[int]) -> tuple[list[int], int] | str:
    """Return the ranks that share a copy of the base with this one, and its shard; or the error."""
    node = next(node for node, size in enumerate(node_sizes) if int(os.environ["RANK"]) < sum(node_sizes[: node + 1]))
    os.environ["LOCAL_WORLD_SIZE"] = str(node_sizes[node])
    try:
        with process_group("hybrid", timeout_s=30, device="cpu") as ranks:
            sum_over_ranks(1)
            return torch.distributed.get_process_group_ranks(ranks.shard_group), ranks.shard
    except ConfigError as error:
        return str(error)


def test_hybrid_shards_inside_nodes() -> None:
    assert run_ranks(hybrid_on_rank, 4, [2, 2]) == [([0, 1], 0), ([0, 1], 1), ([2, 3], 0), ([2, 3], 1)]
    assert run_ranks(hybrid_on_rank, 3, [3]) == [([0, 1, 2], rank) for rank in range(3)]


def test_hybrid_needs_nodes_of_one_size() -> None:
    for message in run_ranks(hybrid_on_rank, 4, [3, 1]):
        assert isinstance(message, str)
        assert message.startswith("--sharding=hybrid: nodes have 1 and 3 ranks; start equally many")


def test_one_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):
        with process_group("full", timeout_s=30, device="cpu") as ranks:
            assert (ranks.rank, ranks.world_size, ranks.num_shards, ranks.shard) == (0, 1, 1, 0)
            assert ranks.device == torch.device("cpu")
            assert make_mesh(ranks.device, 1, "none").ndim == 2
            assert sum_over_ranks(3) == 3
    assert not torch.distributed.is_initialized()


def test_the_group_is_left_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), process_group("full", timeout_s=30, device="cpu"):
        _ = 1 / 0
    assert not torch.distributed.is_initialized()


def join_nobody(port: int) -> str:
    """Try to join a group whose first rank never comes."""
    os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_PORT=str(port))
    try:
        with process_group("full", timeout_s=2, device="cpu"):
            return "joined"
    except TrainingError as error:
        return str(error)


def test_ranks_that_cannot_be_reached_end_with_the_time_limit() -> None:
    started = time.monotonic()
    (message,) = run_ranks(join_nobody, 1, free_port())
    assert message.startswith("rank 1 of 2 could not join the others within 2 s: ")
    assert "MASTER_ADDR:MASTER_PORT" in message
    assert time.monotonic() - started < 45


def gpus_on_rank(gpus: list[str]) -> tuple[list[int], str]:
    """Count the ranks by GPU, with this rank's own as its number 0, and pick a backend."""
    rank, cuda = int(os.environ["RANK"]), torch.device("cuda", 0)
    with process_group("full", timeout_s=30, device="cpu"):
        store = torch.distributed.distributed_c10d._get_default_store()
        torch.cuda.get_device_properties = lambda _: SimpleNamespace(uuid=gpus[rank])
        time.sleep(0.3 * rank)  # whoever asks first waits for the others
        counts = count_ranks_by_gpu(cuda, store, rank, len(gpus))
        sum_over_ranks(1)  # rank 0 holds the store, and must not leave before the others have read
    return counts, pick_backend(cuda, counts)


def cores_on_rank(masks: list[set[int]], nodes: str) -> int:
    """Share out the cores with ranks that may run on those given, of a node named by a letter."""
    rank = int(os.environ["RANK"])
    platform.node = lambda: nodes[rank]
    with process_group("full", timeout_s=30, device="cpu"):
        os.sched_getaffinity = lambda _: masks[rank]
        count = count_cores(torch.distributed.distributed_c10d._get_default_store(), rank, len(masks))
        sum_over_ranks(1)  # rank 0 holds the store
    return count


@pytest.mark.parametrize(
    ("masks", "nodes", "expected"),
    [
        ([{0, 1, 2, 3, 4, 5}] * 3, "aaa", [2, 2, 2]),  # torchrun: all share all
        ([{0, 1, 2, 3, 4, 5}] * 3, "aab", [3, 3, 6]),  # on two nodes
        ([{0, 1, 2}, {3, 4, 5}], "aa", [3, 3]),  # srun with a task for each rank: already shared out
        ([{0}] * 3, "aaa", [1, 1, 1]),
    ],
)
def test_cores_are_shared_out_once(masks: list[set[int]], nodes: str, expected: list[int]) -> None:
    assert run_ranks(cores_on_rank, len(masks), masks, nodes) == expected


def test_nccl_where_every_rank_has_a_gpu_of_its_own() -> None:
    assert run_ranks(gpus_on_rank, 3, ["a", "b", "c"]) == [([1, 1, 1], "cpu:gloo,cuda:nccl")] * 3
    assert run_ranks(gpus_on_rank, 3, ["a", "b", "a"]) == [([2, 1, 2], "gloo")] * 3
    cpu = torch.device("cpu")
    assert count_ranks_by_gpu(cpu, torch.distributed.HashStore(), 0, 2) == [1, 1]
    assert pick_backend(cpu, [1, 1]) == "gloo"


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert compute_dtype("auto", cpu) == torch.float32
    assert compute_dtype("auto", cuda) == torch.bfloat16
    assert compute_dtype("bf16", cpu) == torch.bfloat16
    assert compute_dtype("fp32", cuda) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 3) == choose_device("cpu", 3) == cpu
    with pytest.raises(ConfigError, match="--device=cuda: torch sees no CUDA device; use --device=auto"):
        choose_device("cuda", 3)
    with pytest.raises(ConfigError, match="--device=cuda"), process_group("full", timeout_s=30, device="cuda"):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device("auto", rank).index for rank in range(4)] == [0, 1, 0, 1]
    assert choose_device("cpu", 3) == cpu

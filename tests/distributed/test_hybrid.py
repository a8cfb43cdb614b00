"""Hybrid sharding, and none: what a rank holds, and what crosses between nodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from fsdp_qlora.distributed import process_group
from fsdp_qlora.parallel import local_bytes
from fsdp_qlora.plan.model_shape import model_shape
from fsdp_qlora.quant.adapt import QuantSettings, lora_linears
from tests.distributed.test_equivalence import LORA, NODE, Split, make_trainer
from tests.ranks import run_ranks
from tests.tiny import save_tiny

WORLD = 2 * NODE


@dataclasses.dataclass(frozen=True)
class Sent:
    """One collective: its name, the ranks that took part, and the bytes of its input on this rank."""

    name: str
    ranks: tuple[int, ...]
    size: int


class Collectives(TorchDispatchMode):
    """Records the collectives inside the block, those of autograd's backward on the CPU included."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            group = next(dist.ProcessGroup.unbox(one) for one in args if isinstance(one, torch.ScriptObject))
            name = func._schema.name.removeprefix("c10d::").strip("_")
            inputs = args[0] if name == "allreduce" else args[1]
            size = sum(tensor.nbytes for tensor in ([inputs] if isinstance(inputs, torch.Tensor) else inputs))
            self.sent.append(Sent(name, tuple(dist.get_process_group_ranks(group)), size))
        return func(*args, **(kwargs or {}))


def step_on_rank(folder: Path, sharding: str, accumulation: int = 1) -> tuple[list[Sent], int, int]:
    """Do one step; return its collectives, and the bytes of 4-bit weights and of LoRA that this rank holds."""
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        trainer = make_trainer(folder, Split(1, accumulation, sharding), ranks)
        with Collectives() as collectives:
            trainer.train_step(trainer.train_loader.step(0, 0), 0)
        linears = list(lora_linears(trainer.root))
        packed = sum(local_bytes(linear, "packed") for linear in linears)
        lora = sum(local_bytes(linear, name) for linear in linears for name in ("lora_A", "lora_B"))
        return collectives.sent, packed, lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("hybrid") / "llama", num_hidden_layers=2)


def test_only_gradients_cross_between_nodes(folder: Path) -> None:
    for rank, (sent, _, lora) in enumerate(run_ranks(step_on_rank, WORLD, folder, "hybrid")):
        neighbours = tuple(range(rank // NODE * NODE, rank // NODE * NODE + NODE))
        counterparts = tuple(range(rank % NODE, WORLD, NODE))
        crossing = [one for one in sent if one.ranks == counterparts]
        assert {one.name for one in crossing} == {"allreduce"}
        assert sum(one.size for one in crossing) == lora, "this rank's part of every gradient, once"
        everywhere = [one for one in sent if one.ranks not in (neighbours, counterparts)]
        assert sum(one.size for one in everywhere) <= 64, "counts and losses"
        inside = {one.name for one in sent if one.ranks == neighbours}
        assert any(name.startswith("allgather") or name.startswith("_allgather") for name in inside)


def test_without_sharding_only_gradients_are_exchanged_once_a_step(folder: Path) -> None:
    """Nor with hybrid sharding and one rank a node, whose ranks are those of `none`."""
    for sent, _, lora in run_ranks(step_on_rank, NODE, folder, "none", 3):
        among_all = [one for one in sent if one.ranks == tuple(range(NODE))]
        assert {one.name for one in among_all} == {"allreduce"}
        assert [one.size for one in among_all if one.size > 64] == [lora], "every gradient, once, in one exchange"
        assert len(among_all) == 3, "and the number of targets, and the loss"


def test_full_sharding_gathers_from_all(folder: Path) -> None:
    """The control: the same recorder sees gathers cross where they do."""
    for sent, _, lora in run_ranks(step_on_rank, WORLD, folder, "full"):
        crossing = [one for one in sent if one.ranks == tuple(range(WORLD))]
        assert sum(one.size for one in crossing) > 4 * lora


def test_a_rank_holds_what_is_planned(folder: Path) -> None:
    planned = model_shape(folder, QuantSettings(num_shards=NODE), LORA, torch.float32)
    for _, packed, lora in run_ranks(step_on_rank, WORLD, folder, "hybrid"):
        assert packed == sum(block.packed_part for block in planned.blocks)
        assert lora == sum(block.lora_part for block in planned.blocks)

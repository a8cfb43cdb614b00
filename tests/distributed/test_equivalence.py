"""One optimizer step gives the same numbers however it is split over ranks and micro-batches, sharded or not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

import fsdp_qlora.trainer
from fsdp_qlora import chunked_mlp, data
from fsdp_qlora.adapters import full_tensor, gather_adapter
from fsdp_qlora.build import build_model
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks, make_mesh, process_group
from fsdp_qlora.errors import TrainingError
from fsdp_qlora.peft_format import PREFIX
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, lora_layers, lora_linears
from fsdp_qlora.trainer import StepResult, Trainer
from tests.ranks import run_ranks
from tests.tiny import memory, save_tiny

SEQUENCES = 4
"""Sequences of one optimizer step, over all ranks and micro-batches."""

NUM_STEPS = 3
MAX_GRAD_NORM = 0.5
TOLERANCE = 1e-6
NODE = 2
"""Ranks of what hybrid sharding takes for a node."""

LORA = LoraSettings(rank=4, alpha=8)
LOADER: dict[str, Any] = {"context_length": 64, "packing": False, "seed": 5, "shuffle": True, "pad_token_id": 0}


@dataclass(frozen=True)
class Split:
    """How a step is computed; world size x batch_size x accumulation is SEQUENCES."""

    batch_size: int
    accumulation: int
    sharding: str = "full"
    cpu_offload: bool = False
    activation_checkpointing: bool = False
    offload_lora: bool = True
    chunk_tokens: int = chunked_mlp.CHUNK_TOKENS


SPLITS: dict[int, list[Split]] = {
    1: [
        Split(4, 1),
        Split(1, 4),
        Split(2, 2, cpu_offload=True, activation_checkpointing=True),
        Split(1, 4, sharding="none", activation_checkpointing=True),
        Split(4, 1, cpu_offload=True, activation_checkpointing=True, chunk_tokens=7),
    ],
    2: [
        Split(1, 2),
        Split(2, 1, sharding="none"),
        Split(1, 2, sharding="none"),
        # as with hybrid sharding and one rank a node
        Split(1, 2, sharding="none", cpu_offload=True),
        Split(1, 2, sharding="none", cpu_offload=True, activation_checkpointing=True, offload_lora=False),
        Split(1, 2, cpu_offload=True),
        Split(1, 2, activation_checkpointing=True),
        Split(2, 1, cpu_offload=True, activation_checkpointing=True),
        Split(2, 1, activation_checkpointing=True, chunk_tokens=7),
        Split(1, 2, sharding="none", activation_checkpointing=True, chunk_tokens=7),
    ],
    4: [
        Split(1, 1),
        Split(1, 1, sharding="none", activation_checkpointing=True),
        Split(1, 1, cpu_offload=True, activation_checkpointing=True),
        Split(1, 1, sharding="hybrid"),
        Split(1, 1, sharding="hybrid", cpu_offload=True, activation_checkpointing=True),
    ],
}
"""By world size. The first of one rank, all sequences in one batch, is what the others are compared with."""


def examples() -> list[data.Example]:
    """Return 10 examples of unequal lengths and target counts: the last of three steps leaves two sequences empty."""
    random = np.random.default_rng(1)
    found = []
    for number in range(10):
        ids = random.integers(3, 320, size=6 + 5 * number).tolist()
        first_target = random.integers(1, len(ids) - 1)
        found.append(data.Example(ids, [-100] * first_target + ids[first_target:]))
    return found


def initial_adapter(linears: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Return LoRA matrices in which neither is zero, so that both have gradients from the first step on."""
    generator = torch.Generator().manual_seed(3)
    adapter = {}
    for name, (rows, columns) in linears.items():
        adapter[f"{name}.lora_A"] = torch.randn(LORA.rank, columns, generator=generator) * 0.1
        adapter[f"{name}.lora_B"] = torch.randn(rows, LORA.rank, generator=generator) * 0.1
    return adapter


def llama_linears(num_layers: int = 2) -> dict[str, tuple[int, int]]:
    """Return (out, in) of the tiny model's linear layers by name."""
    attention = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    mlp = {"gate_proj": (104, 64), "up_proj": (104, 64), "down_proj": (64, 104)}
    shapes = {f"self_attn.{name}": shape for name, shape in attention.items()}
    shapes |= {f"mlp.{name}": shape for name, shape in mlp.items()}
    return {f"model.layers.{i}.{name}": shape for i in range(num_layers) for name, shape in shapes.items()}


def make_trainer(
    folder: Path, split: Split, ranks: Ranks, lora: LoraSettings | None = None, lr: float = 3e-4
) -> Trainer:
    """Build the tiny model and a trainer for one way of splitting.

    Args:
        lora: what is trained, from its usual initial values; by default LORA, from those of initial_adapter.
    """
    ranks = dataclasses.replace(ranks, mesh=make_mesh(ranks.device, ranks.world_size, split.sharding, NODE))
    resting = memory(cpu_offload=split.cpu_offload, activation_checkpointing=split.activation_checkpointing)
    built = build_model(
        folder,
        ranks,
        QuantSettings(num_shards=ranks.num_shards),
        lora or LORA,
        torch.float32,
        memory=dataclasses.replace(resting, offload_lora=split.cpu_offload and split.offload_lora),
        adapter=initial_adapter(llama_linears()) if lora is None else None,
    )
    loader = data.Loader(
        examples(),
        **LOADER,
        batch_size=split.batch_size,
        gradient_accumulation_steps=split.accumulation,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    config = TrainConfig(max_steps=NUM_STEPS, lr=lr, max_grad_norm=MAX_GRAD_NORM, weight_decay=0.1)
    return Trainer(config, ranks, built, loader, {})


def train_on_rank(folder: Path, splits: list[Split]) -> list[dict[str, Any]]:
    """Train each split for three steps; return losses, norms, target counts, gradients as clipped, final adapters."""
    results = []
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        for split in splits:
            trainer = make_trainer(folder, split, ranks)
            with mock.patch.object(chunked_mlp, "CHUNK_TOKENS", split.chunk_tokens):
                steps, gradients = take_steps(trainer, NUM_STEPS, gradients_of)
            adapter = {name: value.numpy() for name, value in gather_adapter(trainer.root, trainer.ranks).items()}
            results.append({"steps": steps, "gradients": gradients, "adapter": adapter})
    return results


def take_steps(
    trainer: Trainer, num_steps: int, gradients_of: Callable[[Trainer], dict[str, np.ndarray]]
) -> tuple[list[StepResult], list[dict[str, np.ndarray]]]:
    """Train; return the steps, and of each the clipped gradients."""
    gradients: list[dict[str, np.ndarray]] = []
    update = trainer.optimizer.step_if_finite

    def watched(loss: torch.Tensor, norm: torch.Tensor) -> None:
        update(loss, norm)
        trainer.optimizer.finish()
        gradients.append(gradients_of(trainer))

    trainer.optimizer.step_if_finite = watched  # type: ignore[method-assign]
    steps = [trainer.train_step(trainer.train_loader.step(0, index), index) for index in range(num_steps)]
    return steps, gradients


def gradients_of(trainer: Trainer) -> dict[str, np.ndarray]:
    """Return the whole gradient of every LoRA matrix; all ranks take part."""
    found = {}
    for layer in lora_layers(trainer.root):
        for part, parameter in layer.adapter():
            found[f"{layer.name}.{part}"] = full_tensor(parameter.grad, trainer.ranks.device).numpy()
    return found


def differences(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, dict[str, float]]:
    """Return the norm of the difference of two sets of matrices over the norm expected: all together, and of each."""
    assert {name: value.shape for name, value in found.items()} == {name: v.shape for name, v in expected.items()}
    apart = {name: found[name] - value for name, value in expected.items()}
    each = {name: norm_of({name: apart[name]}) / norm_of({name: value}) for name, value in expected.items()}
    return norm_of(apart) / norm_of(expected), each


def assert_close(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], what: str, of_each: float = 3 * TOLERANCE
) -> None:
    """Compare sets of matrices: all together, and each, whose own rounding is larger."""
    total, each = differences(found, expected)
    assert total < TOLERANCE, f"{what} differs by {total:.1e}"
    for name, relative in each.items():
        assert relative < of_each, f"{what}: {name} differs by {relative:.1e}"


def norm_of(matrices: dict[str, np.ndarray]) -> float:
    """Return the norm of all elements together."""
    return math.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in matrices.values()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("equivalence") / "llama", num_hidden_layers=2)


class Results(dict[tuple[int, Split], dict[str, Any]]):
    """What the ranks found by world size and split, each world size run when first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, key: tuple[int, Split]) -> dict[str, Any]:
        world_size = key[0]
        by_rank = run_ranks(train_on_rank, world_size, self.folder, SPLITS[world_size])
        for number, split in enumerate(SPLITS[world_size]):
            assert all(found[number]["steps"] == by_rank[0][number]["steps"] for found in by_rank)
            for found in by_rank:  # where there are several copies of the adapter, of each rank's own
                assert all(
                    (value == by_rank[0][number]["adapter"][name]).all()
                    for name, value in found[number]["adapter"].items()
                )
            self[world_size, split] = by_rank[0][number]
        return self[key]


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return Results(folder)


CASES = [(world_size, split) for world_size, splits in SPLITS.items() for split in splits]


def name_of(world_size: int, split: Split) -> str:
    """Return a case's name for pytest."""
    offload = "offload" if split.offload_lora else "offload_base"
    extras = [offload] * split.cpu_offload + ["checkpoint"] * split.activation_checkpointing
    extras += ["chunked"] * (split.chunk_tokens != chunked_mlp.CHUNK_TOKENS)
    return "-".join([f"{world_size}x{split.accumulation}x{split.batch_size}", split.sharding, *extras])


@pytest.mark.parametrize(("world_size", "split"), CASES, ids=[name_of(*case) for case in CASES])
def test_a_step_does_not_depend_on_how_it_is_split(results: Results, world_size: int, split: Split) -> None:
    assert world_size * split.batch_size * split.accumulation == SEQUENCES
    expected, found = results[CASES[0]], results[world_size, split]
    for step, (one, other) in enumerate(zip(found["steps"], expected["steps"], strict=True)):
        assert one.num_targets == other.num_targets
        assert one.loss == pytest.approx(other.loss, rel=TOLERANCE)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=TOLERANCE)
        assert_close(found["gradients"][step], expected["gradients"][step], f"gradient of step {step + 1}")
    assert_close(found["adapter"], expected["adapter"], "adapter")


def test_the_cases_are_not_easier_than_they_look(results: Results) -> None:
    result = results[CASES[0]]
    counts = [step.num_targets for step in result["steps"]]
    assert len(set(counts)) == NUM_STEPS, "unequal numbers of targets per step"
    loader = data.Loader(examples(), **LOADER, batch_size=1, gradient_accumulation_steps=1, rank=3, world_size=4)
    assert [loader.step(0, index)[0].num_targets > 0 for index in range(NUM_STEPS)] == [True, True, False]
    initial = initial_adapter(llama_linears())
    for name, value in result["adapter"].items():
        before = initial[name.removeprefix(PREFIX).removesuffix(".weight")].numpy()
        assert np.abs(value - before).max() > 3e-4, "the optimizer moved every matrix"


@pytest.mark.parametrize(("world_size", "split"), CASES, ids=[name_of(*case) for case in CASES])
def test_clipping_scales_the_whole_gradient_to_the_norm(results: Results, world_size: int, split: Split) -> None:
    result = results[world_size, split]
    for step, gradients in zip(result["steps"], result["gradients"], strict=True):
        assert step.grad_norm > MAX_GRAD_NORM
        assert norm_of(gradients) == pytest.approx(MAX_GRAD_NORM, rel=1e-5)


def poison_on_rank(folder: Path, where: str, sharding: str) -> tuple[str, bool, int]:
    """Train a step in which the last rank alone meets a NaN, before or after gradients are summed over ranks.

    Returns the error, whether all parameters are unchanged, and the number of optimizer states.
    """
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        trainer = make_trainer(folder, Split(1, 2, sharding), ranks)
        before = gather_adapter(trainer.root, trainer.ranks)
        if ranks.rank == ranks.world_size - 1:
            (plant_in_backward if where == "before" else plant_in_shard)(trainer)
        message = ""
        try:
            trainer.train_step(trainer.train_loader.step(0, 0), 0)
        except TrainingError as error:
            message = str(error)
        trainer.optimizer.finish()
        after = gather_adapter(trainer.root, trainer.ranks)
        unchanged = all(torch.equal(before[name], after[name]) for name in before)
        moved = [v for state in trainer.optimizer.state.values() for v in state.values() if v.any()]
        return message, unchanged, len(moved)


def plant_in_backward(trainer: Trainer) -> None:
    """Make the gradient of a layer's output NaN on this rank; the loss stays finite."""
    linear = list(lora_linears(trainer.root))[4]

    def watch(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient * math.nan)

    linear.register_forward_hook(watch)


def plant_in_shard(trainer: Trainer) -> None:
    """Write one NaN into this rank's shard of one summed gradient."""
    linear = list(lora_linears(trainer.root))[4]
    measure = fsdp_qlora.trainer.gradient_norm

    def poisoned(root: torch.nn.Module) -> torch.Tensor:
        gradient = linear.lora_B.grad
        assert isinstance(gradient, DTensor)
        gradient.to_local()[-1, -1] = math.nan
        return measure(root)

    fsdp_qlora.trainer.gradient_norm = poisoned


@pytest.mark.parametrize(
    ("where", "sharding", "world_size"),
    [
        ("before", "full", 1),
        ("before", "full", 2),
        ("before", "none", 2),
        ("before", "hybrid", 4),
        ("after", "full", 2),
    ],
)
def test_nan_in_one_ranks_gradient_stops_all_before_the_update(
    folder: Path, where: str, sharding: str, world_size: int
) -> None:
    for message, unchanged, num_moved in run_ranks(poison_on_rank, world_size, folder, where, sharding):
        assert message.startswith("step 1: loss 6.")
        assert "gradient norm nan; stopped before the update" in message
        assert unchanged
        assert num_moved == 0

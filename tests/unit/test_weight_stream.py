"""Weights that visit the device block by block: where they are when, and that training with them changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fsdp_qlora.build import BuiltModel, build_model
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, lora_linears
from fsdp_qlora.weight_stream import WeightStream
from tests.batches import make_trainer, random_ids, whole_rows
from tests.tiny import COMMON, save_tiny

SIZES = {1: (3, 200), 4: (700, 1), 5: (8, 8), 7: (100, 30)}
"""Elements of two parameters of each streamed block; sizes differ so that a wrong place shows."""


@pytest.fixture
def modules() -> dict[int, nn.ParameterList]:
    return {
        index: nn.ParameterList(
            nn.Parameter(torch.full((size,), float(10 * index + part)), requires_grad=False)
            for part, size in enumerate(sizes)
        )
        for index, sizes in SIZES.items()
    }


@pytest.fixture
def stream(modules: dict[int, nn.ParameterList]) -> WeightStream:
    return WeightStream(
        {index: [(module, "0"), (module, "1")] for index, module in modules.items()}, torch.device("cpu")
    )


def present(modules: dict[int, nn.ParameterList]) -> list[int]:
    """Return the blocks whose weights are on the device, after checking their values; the others must be empty."""
    found = []
    for index, module in modules.items():
        sizes = tuple(parameter.numel() for parameter in module)
        assert sizes in (SIZES[index], (0, 0))
        if sizes == SIZES[index]:
            found.append(index)
            for part, parameter in enumerate(module):
                assert parameter.eq(10 * index + part).all()
    return found


def test_the_next_block_is_there_in_both_directions(stream: WeightStream, modules: dict[int, nn.ParameterList]) -> None:
    for _ in range(2):  # the second step begins where the first has ended
        for index, there in ((1, [1, 4]), (4, [4, 5]), (5, [5, 7]), (7, [5, 7])):
            stream.arrive(index, backward=False)
            assert present(modules) == there
        for index, there in ((7, [5, 7]), (5, [4, 5]), (4, [1, 4]), (1, [1, 4])):
            stream.arrive(index, backward=True)
            assert present(modules) == there


def test_any_order_works(stream: WeightStream, modules: dict[int, nn.ParameterList]) -> None:
    for index in (7, 1, 5, 5, 4, 1, 7):
        stream.arrive(index, backward=index > 4)
        assert index in present(modules)


BLOCKS = COMMON["num_hidden_layers"]
SETTINGS = {
    "all": MemorySettings(BLOCKS, True, True, BLOCKS),
    "half of the blocks": MemorySettings(BLOCKS // 2, checkpoint_blocks=BLOCKS),
    "half of them recomputed": MemorySettings(BLOCKS, checkpoint_blocks=BLOCKS // 2),
}


def load(folder: Path, ranks: Ranks, memory: MemorySettings) -> BuiltModel:
    return build_model(folder, ranks, QuantSettings(), LoraSettings(4, 8.0), torch.float32, memory=memory)


def losses(built: BuiltModel, ranks: Ranks) -> list[float]:
    """Train three steps, evaluating between them."""
    trainer = make_trainer(built, ranks, max_steps=3, lr=1e-2)
    found = []
    for step in range(3):
        batch = whole_rows(random_ids(2, 32, COMMON["vocab_size"], seed=step))
        found.append(trainer.train_step([batch, batch], step).loss)
        with torch.no_grad():
            found.append(trainer.loss(batch).item())
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_training_with_streamed_weights_is_bitwise_the_same(name: str, ranks: Ranks, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    built = load(folder, ranks, SETTINGS[name])
    streamed = [block for block in built.skeleton.blocks if block.weights is not None]
    assert len(streamed) == BLOCKS if name == "all" else BLOCKS // 2
    assert losses(built, ranks) == losses(load(folder, ranks, MemorySettings()), ranks)
    held = [linear for block in streamed for linear in lora_linears(block) if linear.packed.numel()]
    per_block = len(list(lora_linears(streamed[0])))
    assert len(held) <= 2 * per_block

"""Embedding and head trained whole: the same step for every number of ranks, and runs that go on with another number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fsdp_qlora.adapters import full_tensor, gather_adapter
from fsdp_qlora.distributed import process_group
from fsdp_qlora.peft_format import PREFIX
from fsdp_qlora.quant.adapt import LoraSettings
from fsdp_qlora.resume import trainable
from fsdp_qlora.trainer import Trainer
from tests.distributed.test_equivalence import MAX_GRAD_NORM, Split, assert_close, make_trainer, norm_of, take_steps
from tests.faults import trials
from tests.faults.jobs import make_inputs, of_world, train
from tests.ranks import run_ranks
from tests.tiny import save_tiny

ROWS = 321
"""Rows of the vocabulary, which no number of ranks here divides."""

PADDING = 0
NUM_STEPS = 2
LORA = LoraSettings(4, 8.0, modules_to_save=("embed_tokens", "lm_head"))

SPLITS = {
    1: [Split(4, 1), Split(2, 2, cpu_offload=True, activation_checkpointing=True)],
    2: [
        Split(1, 2),
        Split(2, 1, sharding="none"),
        Split(1, 2, "none", cpu_offload=True, activation_checkpointing=True, offload_lora=False),
        Split(1, 2, cpu_offload=True, activation_checkpointing=True),
    ],
    4: [Split(1, 1), Split(1, 1, sharding="hybrid", activation_checkpointing=True)],
}
CASES = [(world_size, split) for world_size, splits in SPLITS.items() for split in splits]


def train_on_rank(folder: Path, splits: list[Split]) -> list[dict[str, Any]]:
    """Return, of each split, the steps, the clipped gradients of the last and the modules before and after."""
    results = []
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        for split in splits:
            trainer = make_trainer(folder, split, ranks, LORA, lr=3e-3)
            before = modules_of(trainer)
            steps, gradients = take_steps(trainer, NUM_STEPS, gradients_of)
            after = modules_of(trainer)
            results.append({"steps": steps, "gradients": gradients[-1], "before": before, "after": after})
    return results


def gradients_of(trainer: Trainer) -> dict[str, np.ndarray]:
    """Return the whole gradient of all that is trained; all ranks take part."""
    named = [(name, parameter.grad) for name, parameter in trainable(trainer.root)]
    return {name: full_tensor(gradient, trainer.ranks.device).numpy() for name, gradient in named}


def modules_of(trainer: Trainer) -> dict[str, np.ndarray]:
    """Return what is saved of embedding and head; all ranks take part."""
    adapter = gather_adapter(trainer.root, trainer.ranks)
    return {name: value.numpy() for name, value in adapter.items() if "lora" not in name}


@pytest.mark.parametrize("family", ["llama", "llama3", "gemma2"])  # llama3 and gemma2 are tied, gemma2 scales rows
def test_a_step_does_not_depend_on_how_it_is_split(tmp_path: Path, family: str) -> None:
    folder = save_tiny(family, tmp_path, num_hidden_layers=2, vocab_size=ROWS)
    expected: dict[str, Any] = {}
    for world_size, splits in SPLITS.items():
        by_rank = run_ranks(train_on_rank, world_size, folder, splits)
        for number, split in enumerate(splits):
            found = by_rank[0][number]
            expected = expected or found
            for one, other in zip(found["steps"], expected["steps"], strict=True):
                assert one.loss == pytest.approx(other.loss, rel=1e-6), (world_size, split)
                assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-6), (world_size, split)
            assert norm_of(found["gradients"]) == pytest.approx(MAX_GRAD_NORM, rel=1e-5), "each matrix counts once"
            case = f"with {world_size} ranks and {split}"
            # lora_B, and so lora_A's gradient, is what AdamW's first step made of 0, whatever the size of its gradient:
            # there rounding shows most
            assert_close(found["gradients"], expected["gradients"], f"gradient {case}", of_each=1e-4)
            assert_close(found["after"], expected["after"], f"modules {case}")
    modules = ["model.embed_tokens"] if family != "llama" else ["model.embed_tokens", "lm_head"]
    assert set(modules) == {name for name in expected["gradients"] if "lora" not in name}
    for module in modules:
        name = f"{PREFIX}{module}.weight"
        assert np.abs(expected["after"][name] - expected["before"][name]).max() > 1e-3
    assert (expected["gradients"]["model.embed_tokens"][PADDING] == 0).all() == (family == "llama")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


CHANGES = {"lora_dropout": 0, "packing": True, "modules_to_save": "embed_tokens,lm_head"}


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks(inputs: dict[str, str], tmp_path: Path, before: int, after: int) -> None:
    reference = tmp_path / "reference"
    settings = {**of_world(inputs, before), **CHANGES, "output_dir": reference}
    assert train(before, settings) == [0] * before
    assert trials.resharded(inputs, reference, tmp_path / "run", before, after, **CHANGES) < 1e-6

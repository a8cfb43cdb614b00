"""Training gives the stored losses, and the same seed gives the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fsdp_qlora.distributed import Ranks
from fsdp_qlora.optim import local
from fsdp_qlora.quant.adapt import lora_linears
from tests.golden.golden import FILE, NUM_STEPS, RUNS, train


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_stored_ones(name: str, ranks: Ranks, tmp_path: Path) -> None:
    results, _ = train(tmp_path, ranks, **RUNS[name])
    stored = json.loads(FILE.read_text())["runs"][name]
    assert [result.loss for result in results] == pytest.approx(stored["loss"], rel=1e-5)
    assert [result.grad_norm for result in results] == pytest.approx(stored["grad_norm"], rel=1e-4)
    assert len(results) == NUM_STEPS
    assert results[-1].loss < results[0].loss


def test_same_seed_gives_the_same_bits(ranks: Ranks, tmp_path: Path) -> None:
    """With dropout, whose masks are redrawn when blocks are recomputed."""
    (first, built), (second, rebuilt) = (
        train(tmp_path / name, ranks, lora_dropout=0.1) for name in ("first", "second")
    )
    assert first == second
    for a, b in zip(lora_linears(built.root), lora_linears(rebuilt.root), strict=True):
        for part in ("lora_A", "lora_B"):
            assert local(getattr(a, part)).equal(local(getattr(b, part)))


def test_another_seed_and_no_dropout_give_other_losses(ranks: Ranks, tmp_path: Path) -> None:
    """Else the test above would say nothing."""
    changes = ({"lora_dropout": 0.1}, {"lora_dropout": 0.1, "seed": 8}, {})
    losses = [train(tmp_path / str(i), ranks, num_steps=2, **change)[0][1].loss for i, change in enumerate(changes)]
    assert len(set(losses)) == 3


def test_lora_starts_as_the_plain_base(ranks: Ranks, tmp_path: Path) -> None:
    """lora_B is zero at first, so the first step's loss depends neither on the rank nor on the scale."""
    losses = [
        train(tmp_path / str(rank), ranks, num_steps=1, lora_rank=rank, lora_alpha=rank * 3.0)[0][0].loss
        for rank in (2, 16)
    ]
    assert losses[0] == losses[1]

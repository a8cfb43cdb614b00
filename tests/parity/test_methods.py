"""Every kind of LoRA against PEFT: losses, gradients, and adapters that change hands in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsdp_qlora.distributed import Ranks
from tests.parity import reference
from tests.parity.methods import METHODS, TOKENS, measure
from tests.tiny import COMMON, save_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("methods"))


@pytest.mark.parametrize("method", METHODS)
def test_method_is_pefts(method: str, base: Path, ranks: Ranks, tmp_path: Path) -> None:
    found = measure(base, METHODS[method], ranks, tmp_path)
    assert found.loss < 1e-6
    assert found.gradients < 1e-4
    assert found.exported < 1e-5
    assert found.imported < 1e-5
    assert found.update > 1e-2


def test_loraplus_steps_follow_peft(base: Path, ranks: Ranks) -> None:
    loader = reference.unpacked_loader(reference.random_examples(8, TOKENS, COMMON["vocab_size"]), TOKENS)
    curves = []
    for ratio in (1.0, 8.0):
        pair = reference.load_pair(base, ranks, zero_lora_B=True)
        curves.append(reference.train_both(pair, ranks, loader, num_steps=4, lr=1e-3, lr_ratio=ratio))
    plain, faster = curves
    assert faster.max_deviation < 1e-5
    assert abs(faster.ours[-1] - plain.ours[-1]) > 1e-3 * plain.ours[-1], "the ratio changes nothing"

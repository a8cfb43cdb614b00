"""Whether a run can go on from a checkpoint with other settings, and what is said if not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fsdp_qlora.config import TrainConfig, to_dict
from fsdp_qlora.errors import CheckpointError, ConfigError
from fsdp_qlora.resume import check_fit, check_identity


@pytest.mark.parametrize(
    ("done", "ranks", "remedy"),
    [
        (8, 3, "with 3 ranks it cannot be one: go on with a number of ranks that divides 8"),
        (30, 3, "choose them so that their product is one of 3, 6, 15, 30"),
        (18, 1, "choose them so that their product is one of 1, 2, 3, 6, 9, 18"),
    ],
)
def test_the_remedy_for_a_step_that_would_begin_in_another_works(done: int, ranks: int, remedy: str) -> None:
    position, manifest_config = SimpleNamespace(sequences=done), dict[str, Any]()
    manifest = SimpleNamespace(position=position, identity={}, config=manifest_config)
    checkpoint: Any = SimpleNamespace(folder=Path("run/checkpoints/step-000001"), manifest=manifest)
    train: Any = SimpleNamespace(sequences_per_step=4 * ranks, world_size=ranks)
    with pytest.raises(ConfigError, match=f"{done} sequences of the epoch are done.*ranks = {4 * ranks}; {remedy}$"):
        check_fit(checkpoint, TrainConfig(), {}, train, print)


@pytest.mark.parametrize(
    ("changes", "now", "message"),
    [
        ({"eval_split": 0.2}, {"data": "b"}, "data is b and was a (changed settings: eval_split 0.05 -> 0.2)"),
        ({"logging_steps": 3}, {"data": "b"}, "data is b and was a (no setting has changed: the files have)"),
        ({"quant_type": "fp4"}, {"base": "b"}, "base is b and was a (changed settings: quant_type nf4 -> fp4)"),
        ({"seed": 1}, {"seed": 1}, "seed is 1 and was 0"),
    ],
)
def test_another_run_is_told_by_the_settings_that_made_it(
    changes: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    then = TrainConfig(eval_split=0.05, quant_type="nf4", seed=0)
    manifest = SimpleNamespace(identity={"data": "a", "base": "a", "seed": 0}, config=to_dict(then))
    checkpoint: Any = SimpleNamespace(folder=Path("step-000006"), manifest=manifest)
    with pytest.raises(CheckpointError) as refused:
        check_identity(checkpoint, dataclasses.replace(then, **changes), now)
    assert f"step-000006: belongs to another run: {message}; set it back" in str(refused.value)

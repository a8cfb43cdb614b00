"""Whether a run can go on from a checkpoint with other settings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.resume import check_fit


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

"""Which evaluation is the best, and when what was trained until then is kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fsdp_qlora.adapters import trained_step, write_adapter
from fsdp_qlora.best import BestFolder, best_step
from fsdp_qlora.distributed import Ranks


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({}, 0),
        ({0: 3.0, 4: 1.0, 8: 2.0}, 4),
        ({0: 3.0, 4: 1.0, 8: 1.0}, 4),
        ({0: math.nan, 4: 1.0, 8: 0.5}, 8),
        ({4: math.nan, 2: math.nan}, 2),
    ],
)
def test_best_step(losses: dict[int, float], expected: int) -> None:
    assert best_step({step: {"eval_loss": loss} for step, loss in losses.items()}) == expected


@pytest.mark.parametrize(
    ("held", "losses", "step", "expected"),
    [
        (None, {0: 3.0}, 0, 0),
        (0, {0: 3.0, 4: 2.0}, 4, 4),
        (0, {0: 3.0, 4: 4.0}, 4, 0),
        (0, {0: 3.0, 4: 3.0}, 4, 0),
        (4, {0: 3.0, 4: 2.0}, 4, 4),
        (0, {0: math.nan, 4: 9.0}, 4, 4),
        # the best evaluation was that of step 4, of which nothing is left
        (None, {0: 3.0, 4: 1.0, 8: 2.0}, 8, 8),
        (0, {0: 3.0, 4: 1.0, 8: 2.0}, 8, 8),
        (2, {0: 3.0, 4: 1.0}, 4, 4),  # held by a run that is not this one
    ],
)
def test_what_the_folder_holds_decides(
    ranks: Ranks, tmp_path: Path, held: int | None, losses: dict[int, float], step: int, expected: int
) -> None:
    def save(folder: Path, step: int) -> None:
        folder.mkdir(exist_ok=True)
        write_adapter(folder, {}, {}, step)

    best = BestFolder(tmp_path / "best", save)
    if held is not None:
        save(best.folder, held)
    best.keep(step, {step: {"eval_loss": loss} for step, loss in losses.items()})
    assert best.step() == trained_step(best.folder) == expected

"""Which evaluation gave the lowest loss, and keeping what was trained until then (--keep_best)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.adapters import trained_step
from fsdp_qlora.distributed import from_main

Evaluations = Mapping[int, Mapping[str, Any]]
"""The values of the evaluations so far, by step."""


def best_step(evaluations: Evaluations) -> int:
    """Return the step with the lowest loss, the first of several; 0 without any evaluation."""
    return min(evaluations, key=lambda step: _order(evaluations, step), default=0)


def _order(evaluations: Evaluations, step: int) -> tuple[float, int]:
    loss = evaluations[step]["eval_loss"]
    return (math.inf if math.isnan(loss) else loss), step


@dataclass(frozen=True)
class BestFolder:
    """The folder of the best adapter or model. Every rank must call its methods.

    Attributes:
        save: writes what is trained, as it is now, into a folder, noting the step there.
    """

    folder: Path
    save: Callable[[Path, int], None]

    def step(self) -> int | None:
        """Return the step of what the folder holds; None if it holds nothing."""
        return from_main(trained_step(self.folder))

    def keep(self, step: int, evaluations: Evaluations) -> None:
        """Save what is trained, which was evaluated at `step`, unless the folder holds what is as good.

        What it holds decides, not which evaluation was the best: a run may have been killed before it saved that, or gone
        on from before it.
        """
        kept = self.step()
        if kept is None or kept not in evaluations or _order(evaluations, step) < _order(evaluations, kept):
            self.save(self.folder, step)

"""What `train` says at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsdp_qlora.commands.train import _say_summary
from fsdp_qlora.config import TrainConfig


@pytest.mark.parametrize("is_kept", [False, True])
def test_the_best_adapter_named_is_the_one_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_kept: bool
) -> None:
    losses = {"train_loss": 1.0, "eval_loss_before": 3.0, "eval_loss_after": 2.0, "best_step": 4 if is_kept else None}
    summary = {"steps": 8, "tokens": 800, "seconds": 2.0, "tokens_per_second": 400.0, **losses}
    _say_summary(TrainConfig(keep_best=True), summary, tmp_path / "adapter")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("best: ")]
    assert lines == ([f"best: {tmp_path / 'best'}, of step 4"] if is_kept else [])

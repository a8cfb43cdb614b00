"""What `train` says at its end."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from fsdp_qlora.build import save_tokenizer
from fsdp_qlora.commands.train import _say_summary
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.errors import CheckpointError


@pytest.mark.parametrize("is_kept", [False, True])
def test_the_best_adapter_named_is_the_one_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_kept: bool
) -> None:
    losses = {"train_loss": 1.0, "eval_loss_before": 3.0, "eval_loss_after": 2.0, "best_step": 4 if is_kept else None}
    summary = {"steps": 8, "tokens": 800, "seconds": 2.0, "tokens_per_second": 400.0, **losses}
    _say_summary(TrainConfig(keep_best=True), summary, tmp_path / "adapter")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("best: ")]
    assert lines == ([f"best: {tmp_path / 'best'}, of step 4"] if is_kept else [])


class Tokenizer:
    """Writes two files, or only part of them, as the tokenizers library does on a full disk."""

    def __init__(self, text: str, fails: bool = False) -> None:
        self.text, self.fails = text, fails

    def save_pretrained(self, folder: Path) -> None:
        (folder / "additional_chat_templates").mkdir(parents=True, exist_ok=True)
        (folder / "additional_chat_templates" / "tools.jinja").write_text(self.text)
        (folder / "tokenizer.json").write_text(self.text[: 1 if self.fails else None])
        if self.fails:
            raise Exception("No space left on device (os error 28)")


def test_a_tokenizer_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    names = ("tokenizer.json", "additional_chat_templates/tools.jinja")
    for text, fails, expected in (("old", False, "old"), ("new", True, "old"), ("newer", False, "newer")):
        refused = pytest.raises(CheckpointError, match=r"No space left on device .*; free space and start again")
        with refused if fails else contextlib.nullcontext():
            save_tokenizer(Tokenizer(text, fails), folder)  # type: ignore[arg-type]
        assert [(folder / name).read_text() for name in names] == [expected, expected]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

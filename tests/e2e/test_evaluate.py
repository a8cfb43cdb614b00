"""Evaluation sets and sample prompts during training, and the command `evaluate` on what it left."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fsdp_qlora import announce
from fsdp_qlora.commands import evaluate as scoring
from fsdp_qlora.commands import train as finetune
from fsdp_qlora.config import EvaluateConfig, TrainConfig
from fsdp_qlora.distributed import process_group
from tests.e2e.conftest import rows
from tests.ranks import run_ranks

ANSWERS = 24


def train(settings: dict[str, Any]) -> str:
    """Return what a rank prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        finetune.run(TrainConfig(**settings))
    return printed.getvalue()


def score(settings: dict[str, Any]) -> tuple[dict[str, float], list[tuple[str, str, str]]]:
    config = EvaluateConfig(context_length=64, device="cpu", **settings)
    with process_group("full", 60, device="cpu") as ranks:
        figures, answers = scoring.score(config, ranks)
    return figures, [(one.question, one.answer, one.reference) for one in answers]


@pytest.fixture(scope="module")
def trained(base: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned its dataset by heart, evaluated on it and on another."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "prompts.txt").write_text("What is the colour of snow?\nTell me the colour of coal.\n")
    other = folder / "other.jsonl"
    other.write_text(json.dumps({"text": "The colour of snow is white."}) + "\n")
    settings = {
        "model": str(base),
        "dataset": str(dataset),
        "eval_dataset": f"seen={dataset},other={other}",
        "sample_prompts": str(folder / "prompts.txt"),
        "max_new_tokens": 20,
        "output_dir": str(folder / "run"),
        "context_length": 64,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 60,
        "lr": 1e-2,
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "activation_checkpointing": "none",
    }
    printed, of_other_rank = run_ranks(train, 2, settings)
    (folder / "printed.txt").write_text(printed)
    assert of_other_rank == ""
    return folder / "run"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_logs_every_set_and_the_answers(trained: Path) -> None:
    evaluations = {line["step"]: line for line in metrics(trained) if "eval_loss" in line}
    assert list(evaluations) == [0, 60]
    for figure in ("eval_loss", "perplexity", "token_accuracy"):
        assert {figure, f"{figure}/seen", f"{figure}/other"} <= set(evaluations[60])
    assert evaluations[60]["token_accuracy/seen"] > 0.95 > 0.5 > evaluations[0]["token_accuracy/seen"]
    samples = {line["step"]: line["samples"] for line in metrics(trained) if "samples" in line}
    assert list(samples) == [0, 60]
    assert samples[60] == [
        {"prompt": "What is the colour of snow?", "answer": "The colour of snow is white."},
        {"prompt": "Tell me the colour of coal.", "answer": "The colour of coal is black."},
    ]
    assert samples[0][0]["answer"] != samples[60][0]["answer"]


def test_training_shows_every_set_and_the_answers(trained: Path) -> None:
    lines = trained.with_name("printed.txt").read_text().splitlines()
    last = metrics(trained)[-2]
    (shown,) = [line for line in lines if line.startswith("step 60: eval loss")]
    losses = [last[f"eval_loss{of_set}"] for of_set in ("", "/seen", "/other")]
    assert shown.startswith("step 60: eval loss {:.4f} (seen {:.4f}, other {:.4f}), perplexity".format(*losses))
    assert "step 60: 'Tell me the colour of coal.' -> 'The colour of coal is black.'" in lines


def test_the_command_finds_what_training_found(trained: Path, dataset: Path) -> None:
    settings = {"adapter": str(trained), "dataset": str(dataset), "exact_match": True}
    ((figures, answers),) = run_ranks(score, 1, settings)
    last = metrics(trained)[-2]
    for figure in ("eval_loss", "perplexity", "token_accuracy"):
        assert figures[figure] == pytest.approx(last[f"{figure}/seen"], rel=1e-5)
    assert len(answers) == ANSWERS == len(rows())
    assert sum(answer == reference for _, answer, reference in answers) >= ANSWERS - 2
    for offload_blocks in (0, 9):
        for others in run_ranks(score, 2, {**settings, "offload_blocks": offload_blocks}):
            assert others[1] == answers
            assert others[0] == pytest.approx(figures, rel=1e-5)


def test_the_base_alone_and_a_file_of_answers(
    base: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announce, "INTERVAL_S", 0.0)
    path = tmp_path / "answers.jsonl"
    config = EvaluateConfig(
        model=str(base),
        dataset=str(dataset),
        context_length=64,
        exact_match=True,
        max_new_tokens=3,
        save_answers=str(path),
        device="cpu",
    )
    scoring.run(config)
    out, err = capsys.readouterr()
    assert "evaluating: 0 of " in err
    assert f"answering: 16 of {ANSWERS}, " in err
    assert "token accuracy: 0." in out
    assert f"exact match: 0.0000 (0 of {ANSWERS})" in out
    saved = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(saved) == ANSWERS
    assert saved[0]["question"] == "What is the colour of grass?"
    assert (saved[0]["reference"], saved[0]["exact"]) == ("The colour of grass is green.", False)


def test_early_stopping_and_the_best_adapter(base: Path, dataset: Path, tmp_path: Path) -> None:
    """What is evaluated contradicts what is trained on: the loss falls while the form is learned, and rises then."""
    wrong = tmp_path / "wrong.jsonl"
    answers = {"green": "white", "white": "black", "black": "red", "red": "blue", "blue": "yellow", "yellow": "green"}
    text = dataset.read_text()
    wrong.write_text(
        "".join(re.sub(r"(?<=is )\w+(?=\.)", lambda m: answers[m[0]], line) for line in text.splitlines(True))
    )
    settings = {
        "model": str(base),
        "dataset": str(dataset),
        "eval_dataset": str(wrong),
        "output_dir": str(tmp_path / "run"),
        "context_length": 64,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 200,
        "eval_steps": 5,
        "early_stopping_patience": 2,
        "keep_best": True,
        "lr": 1e-2,
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "activation_checkpointing": "none",
    }
    printed, _ = run_ranks(train, 2, settings)
    losses = {line["step"]: line["eval_loss"] for line in metrics(tmp_path / "run") if "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 10 < 200, "two evaluations without a lower loss"
    assert f"stopped at step {best + 10}: the lowest loss is that of step {best}\n" in printed
    assert f"best: {tmp_path / 'run' / 'best'}, of step {best}\n" in printed
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["result"]["steps"], record["result"]["best_step"]) == (best + 10, best)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{best + 10:06}"]
    for folder, step in (("best", best), ("adapter", best + 10)):
        ((figures, _),) = run_ranks(score, 1, {"adapter": str(tmp_path / "run" / folder), "dataset": str(wrong)})
        assert figures["eval_loss"] == pytest.approx(losses[step], rel=1e-5)
    assert "completed: nothing to do" in train(settings)

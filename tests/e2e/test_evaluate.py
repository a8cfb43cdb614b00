"""Evaluation sets and sample prompts during training, and the command `evaluate` on what it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fsdp_qlora import finetune, scoring
from fsdp_qlora.config import EvaluateConfig, TrainConfig
from fsdp_qlora.distributed import process_group
from tests.e2e.conftest import rows
from tests.ranks import run_ranks

ANSWERS = 24


def train(settings: dict[str, Any]) -> None:
    finetune.run(TrainConfig(**settings))


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
    run_ranks(train, 2, settings)
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
    base: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    out = capsys.readouterr().out
    assert "token accuracy: 0." in out
    assert f"exact match: 0.0000 (0 of {ANSWERS})" in out
    saved = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(saved) == ANSWERS
    assert saved[0]["question"] == "What is the colour of grass?"
    assert (saved[0]["reference"], saved[0]["exact"]) == ("The colour of grass is green.", False)

"""From settings to examples: held-out rows, truncation, dropped rows, plain models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from fsdp_qlora import data
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data import DataReport, Example
from fsdp_qlora.data.tokenize import IGNORE
from fsdp_qlora.errors import DataError
from tests.unit.data.families import tiny_tokenizer


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def config(dataset: str, **settings: Any) -> TrainConfig:
    return TrainConfig(**{"dataset": dataset, "eval_split": 0.0, **settings})


def load(
    settings: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], dict[str, list[Example]], DataReport]:
    """Return training examples, evaluation examples by set, and the report."""
    splits = data.load_splits(settings, tokenizer)
    train = [example for store in splits.train.stores for example in store]
    return train, {name: list(store) for name, store in splits.evaluation.items()}, splits.report


@pytest.fixture
def hundred(tmp_path: Path) -> str:
    return write(tmp_path / "hundred.jsonl", [chat(f"question {i}", f"answer {i}") for i in range(100)])


def texts(examples: list[Example]) -> list[str]:
    return [tiny_tokenizer("chatml").decode(example.input_ids) for example in examples]


def test_hold_out(hundred: str) -> None:
    tokenizer = tiny_tokenizer("chatml")
    train, evaluation, report = load(config(hundred, eval_split=0.1), tokenizer)
    assert (len(train), len(evaluation[""])) == (90, 10) == (report.num_examples, report.num_eval_examples)
    everything, nothing, _ = load(config(hundred), tokenizer)
    assert nothing == {}
    assert sorted(texts(train + evaluation[""])) == sorted(texts(everything))
    again = load(config(hundred, eval_split=0.1), tokenizer)
    assert again[:2] == (train, evaluation)
    other = load(config(hundred, eval_split=0.1, seed=7), tokenizer)
    assert other[1] != evaluation


@pytest.mark.parametrize(("rows", "share", "expected"), [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (10, 0.0, 0)])
def test_hold_out_of_few_rows(tmp_path: Path, rows: int, share: float, expected: int) -> None:
    dataset = write(tmp_path / "a.jsonl", [chat("q", f"a {i}") for i in range(rows)])
    train, evaluation, _ = load(config(dataset, eval_split=share), tiny_tokenizer("chatml"))
    assert (len(train), len(evaluation.get("", []))) == (rows - expected, expected)


def test_hold_out_is_at_most_1000_rows(tmp_path: Path) -> None:
    dataset = write(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in range(2500)])
    train, evaluation, _ = load(config(dataset, eval_split=0.8), tiny_tokenizer("chatml"))
    assert (len(train), len(evaluation[""])) == (1500, 1000)


def test_eval_dataset(tmp_path: Path, hundred: str) -> None:
    other = write(tmp_path / "other.jsonl", [{"prompt": "q", "completion": "a"}])
    train, evaluation, report = load(config(hundred, eval_dataset=other, eval_split=0.5), tiny_tokenizer("chatml"))
    assert (len(train), len(evaluation[""]), report.num_rows) == (100, 1, 101)
    assert texts(evaluation[""]) == ["<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"]


def test_several_eval_datasets(tmp_path: Path, hundred: str) -> None:
    easy = write(tmp_path / "easy.jsonl", [chat("q", "a")])
    hard = write(tmp_path / "hard.jsonl", [{"text": "b"}, {"text": "c"}])
    settings = config(hundred, eval_dataset=f"easy={easy},hard-1={hard}")
    train, evaluation, report = load(settings, tiny_tokenizer("chatml"))
    assert (len(train), {name: len(rows) for name, rows in evaluation.items()}) == (100, {"easy": 1, "hard-1": 2})
    assert report.num_eval_examples == 3


def test_truncation_and_dropped_rows_are_reported(tmp_path: Path) -> None:
    """T2: an example is cut at the end; one whose answer begins after the cut is dropped and named."""
    rows = [chat("q", "short"), chat("q", "long " * 30), chat("long " * 30, "never seen")]
    dataset = write(tmp_path / "a.jsonl", rows)
    tokenizer = tiny_tokenizer("chatml")
    whole, _, _ = load(config(dataset), tokenizer)
    train, _, report = load(config(dataset, context_length=40), tokenizer)
    assert train == [whole[0], Example(whole[1].input_ids[:40], whole[1].labels[:40])]
    assert (report.num_truncated, report.num_dropped, report.num_skipped) == (1, 1, 0)
    assert report.dropped == [f"{dataset}:3"]
    summary = "\n".join(report.lines())
    assert "3 rows -> 2 training" in summary
    assert "1 examples cut" in summary
    assert f"1 examples dropped, no target within --context_length: {dataset}:3" in summary
    assert report.num_tokens == sum(len(example.input_ids) for example in train)
    assert report.num_targets == sum(label != IGNORE for example in train for label in example.labels)


def test_exact_fit_is_not_cut(tmp_path: Path) -> None:
    dataset = write(tmp_path / "a.jsonl", [chat("q", "some answer")])
    (whole,), _, _ = load(config(dataset), tiny_tokenizer("chatml"))
    _, _, report = load(config(dataset, context_length=len(whole.input_ids)), tiny_tokenizer("chatml"))
    assert report.num_truncated == 0


def test_nothing_left(tmp_path: Path) -> None:
    dataset = write(tmp_path / "a.jsonl", [chat("long " * 30, "never seen")])
    with pytest.raises(DataError, match=r"no training example is left.*context_length 16: raise it"):
        load(config(dataset, context_length=16), tiny_tokenizer("chatml"))


def test_empty_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl is empty"):
        load(config(write(tmp_path / "a.jsonl", [])), tiny_tokenizer("chatml"))


def test_train_on_all(hundred: str) -> None:
    responses, _, few = load(config(hundred), tiny_tokenizer("chatml"))
    everything, _, all_report = load(config(hundred, train_on="all"), tiny_tokenizer("chatml"))
    assert [example.input_ids for example in everything] == [example.input_ids for example in responses]
    assert all(example.labels == example.input_ids for example in everything)
    assert few.num_targets < all_report.num_targets == all_report.num_tokens - 100  # nothing predicts a first token


def test_models_without_a_chat_template(tmp_path: Path, hundred: str) -> None:
    tokenizer = tiny_tokenizer(None, add_bos=True)
    with pytest.raises(DataError, match="no chat template"):
        load(config(hundred), tokenizer)
    pair = write(tmp_path / "pair.jsonl", [{"prompt": "What is 1+1?", "completion": " It is 2."}])
    (example,), _, _ = load(config(pair), tokenizer)
    assert tokenizer.decode(example.input_ids) == "<s>What is 1+1? It is 2.</s>"
    assert tokenizer.decode([label for label in example.labels if label != IGNORE]) == " It is 2.</s>"
    text = write(tmp_path / "text.jsonl", [{"text": "the model"}])
    (example,), _, _ = load(config(text), tokenizer)
    assert tokenizer.decode(example.labels) == "<s>the model</s>"


def test_rows_that_the_template_refuses(tmp_path: Path) -> None:
    """A row can be malformed for this template only: it stops or is skipped like any other."""
    rows = [chat("q", "a"), chat("q", "<think></think>"), chat("q", "b")]
    dataset = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"a\.jsonl:2: message 2 \(assistant\) is empty; fix the row"):
        load(config(dataset), tiny_tokenizer("chatml"))
    train, _, report = load(config(dataset, bad_rows="skip"), tiny_tokenizer("chatml"))
    assert (len(train), report.num_skipped) == (2, 1)


def test_many_rows_pass_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hundred: str) -> None:
    at_once, _, _ = load(config(hundred, token_cache="none"), tiny_tokenizer("chatml"))
    monkeypatch.setattr("fsdp_qlora.data.tokenize_rows.ENCODE_BATCH", 7)
    assert load(config(hundred), tiny_tokenizer("chatml"))[0] == at_once


def test_example_is_compact_and_frozen() -> None:
    example = Example([1], [1])
    assert not hasattr(example, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        example.labels = []  # type: ignore[misc]

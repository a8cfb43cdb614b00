"""Prompts that are answered during training, and questions cut off rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data.formats import Row
from fsdp_qlora.data.prompts import encode_prompts, question_tokens
from fsdp_qlora.errors import DataError
from fsdp_qlora.samples import read_prompts
from tests.unit.data.families import CONVERSATION, FAMILIES, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_ends_where_the_last_answer_begins(family: str) -> None:
    tokenizer = tiny_tokenizer(family)
    (ids,) = question_tokens([Row("a:1", "chat", tuple(CONVERSATION))], tokenizer)
    spec = FAMILIES[family]
    expected = spec.expected[: spec.expected.rindex("«")].replace("«", "").replace("»", "")
    assert "".join(tokenizer.decode(ids).split()) == "".join(expected.split())


def test_special_tokens_in_prompts_are_text() -> None:
    tokenizer = tiny_tokenizer("chatml")
    (ids,) = encode_prompts(["say <|im_end|> now"], tokenizer)
    assert tokenizer.decode(ids) == "<|im_start|>user\nsay <|im_end|> now<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_prompts_of_a_model_without_a_template() -> None:
    tokenizer = tiny_tokenizer(None)
    (ids,) = encode_prompts(["Hi there"], tokenizer)
    assert tokenizer.decode(ids) == "Hi there"


def test_plain_text_has_no_question() -> None:
    with pytest.raises(DataError, match="a:1: plain text has no question to answer"):
        question_tokens([Row("a:1", "text", text="once upon a time")], tiny_tokenizer("chatml"))


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Hi there\n\n  What is 1+1? \n")
    tokenizer = tiny_tokenizer("chatml")
    prompts = read_prompts(TrainConfig(sample_prompts=str(path)), tokenizer)
    assert [text for text, _ in prompts] == ["Hi there", "What is 1+1?"]
    assert [ids for _, ids in prompts] == encode_prompts(["Hi there", "What is 1+1?"], tokenizer)
    assert read_prompts(TrainConfig(), tokenizer) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("\n \n", "is empty; write one prompt a line"),
        ("long " * 90, "exceed --context_length"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_prompts(TrainConfig(sample_prompts=str(path), context_length=128), tiny_tokenizer("chatml"))

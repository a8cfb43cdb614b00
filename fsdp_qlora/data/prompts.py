"""Rows and messages -> the tokens that a model continues with its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.formats import Row
from fsdp_qlora.data.templates import special_tokens
from fsdp_qlora.data.tokenize import Encoder, start_of_last_answer
from fsdp_qlora.data.tokenize_rows import make_renderer, to_document
from fsdp_qlora.errors import DataError


def encode_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of users' messages: in the chat template, or as they are where a model has none."""
    kind: Literal["chat", "completion"] = "chat" if tokenizer.chat_template else "completion"
    # the answer is cut off again
    rows = [
        Row(f"prompt {number}", kind, ({"role": "user", "content": text}, {"role": "assistant", "content": "x"}))
        for number, text in enumerate(texts, 1)
    ]
    return question_tokens(rows, tokenizer)


def question_tokens(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of each row up to where its last answer begins, just as training sees them.

    Raises:
        DataError: a row that the chat template refuses, or one of plain text, which has no answer.
    """
    renderer = make_renderer(rows, tokenizer)
    encoder = Encoder(tokenizer, renderer.control_tokens if renderer else special_tokens(tokenizer))
    examples = encoder.encode([to_document(row, renderer) for row in rows])
    questions = []
    for row, example in zip(rows, examples, strict=True):
        if isinstance(example, DataError):
            raise DataError(f"{row.where}: {example}")
        question = example.input_ids[: start_of_last_answer(example.labels)]
        if not question:
            raise DataError(f"{row.where}: plain text has no question to answer; give conversations")
        questions.append(question)
    return questions

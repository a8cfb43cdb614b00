"""Checked rows -> examples, a batch at a time."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.data import RowSettings
from fsdp_qlora.data.chats import texts_of
from fsdp_qlora.data.formats import Row
from fsdp_qlora.data.report import DataReport
from fsdp_qlora.data.templates import REASONING_TAG, ChatRenderer, Document, Piece, special_tokens
from fsdp_qlora.data.tokenize import IGNORE, Encoder, Example
from fsdp_qlora.errors import DataError

ENCODE_BATCH = 1000
"""Documents that the tokenizer gets at once; it spreads them over threads."""


def tokenize_rows(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, config: RowSettings, report: DataReport
) -> Iterator[Example]:
    """Tokenise rows and cut them to context_length; examples without a target are dropped and counted.

    Raises:
        DataError: a conversation that the chat template cannot render (unless such rows are skipped), or no template.
    """
    encoder: Encoder | None = None
    renderer: ChatRenderer | None = None
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, ENCODE_BATCH)):
        if encoder is None:
            renderer = make_renderer(batch, tokenizer)
            control_tokens = renderer.control_tokens if renderer else special_tokens(tokenizer)
            encoder = Encoder(tokenizer, control_tokens, config.train_on)
            control = re.compile("|".join(sorted(map(re.escape, control_tokens), key=len, reverse=True)))
        documents: list[Document] = []
        places: list[str] = []
        for row in batch:
            try:
                documents.append(to_document(row, renderer))
                places.append(row.where)
            except DataError as error:
                report.reject(row.where, str(error))
            else:
                count_texts(row, control, report)
        for where, example in zip(places, encoder.encode(documents), strict=True):
            if isinstance(example, DataError):
                report.reject(where, str(example))
                continue
            report.lengths.append(len(example.input_ids))
            cut = truncate(example, config.context_length)
            if all(label == IGNORE for label in cut.labels[1:]):
                report.drop(where)
                continue
            report.num_truncated += cut is not example
            yield cut


def make_renderer(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> ChatRenderer | None:
    """Return what renders rows by the chat template: conversations always, completions where there is one."""
    needed = any(row.kind == "chat" or (row.kind == "completion" and tokenizer.chat_template) for row in rows)
    return ChatRenderer(tokenizer) if needed else None


def to_document(row: Row, renderer: ChatRenderer | None) -> Document:
    """Return a row's text pieces: a templated conversation, prompt + completion, or plain text.

    Control tokens in plain text are taken as such, as its author may have applied a template already.
    """
    if row.kind == "text":
        return Document((Piece(row.text, True, True),), add_special_tokens=True, append_eos=True)
    if renderer is not None:
        return renderer.render(row.messages, row.tools)
    pieces = tuple(Piece(message["content"], False, message["role"] == "assistant") for message in row.messages)
    return Document(pieces, add_special_tokens=True, append_eos=True)


def count_texts(row: Row, control: re.Pattern[str], report: DataReport) -> None:
    """Count what the report warns of: a system message, and control tokens inside the texts."""
    report.num_system += row.kind == "chat" and row.messages[0]["role"] == "system"
    text = REASONING_TAG.sub("", row.text + "\n".join(texts_of(list(row.messages))))
    if inside := set(control.findall(text)):
        report.written_out.update(inside)
        report.first_written_out = report.first_written_out or row.where


def truncate(example: Example, context_length: int) -> Example:
    """Return the first context_length tokens; the example itself if it is no longer."""
    if len(example.input_ids) <= context_length:
        return example
    return Example(example.input_ids[:context_length], example.labels[:context_length])

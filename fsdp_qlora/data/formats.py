"""Rows of the common dataset forms -> checked conversations or texts. A new form is one function and its table row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fsdp_qlora.config.data import RowSettings
from fsdp_qlora.data.chats import RowError, check_conversation, string_of, texts_of, tools_of, turns_of
from fsdp_qlora.data.demo import demo_rows
from fsdp_qlora.data.readers import MAX_ROW_BYTES, read_raw, too_long
from fsdp_qlora.data.report import DataReport
from fsdp_qlora.data.templates import Message
from fsdp_qlora.errors import DataError

DEMO_DATASETS: dict[str, tuple[Literal["train", "test"], int]] = {"demo": ("train", 2000), "demo-test": ("test", 200)}
"""Split and number of rows of the demo datasets; their questions differ."""


@dataclass(frozen=True, slots=True)
class Row:
    """One checked row."""

    where: str
    """`file:line`, for messages about it."""

    kind: Literal["chat", "completion", "text"]

    messages: tuple[Message, ...] = ()
    """A conversation in the order that chats.FOLLOWS allows, ending with an answer; a completion has two messages."""

    text: str = ""
    """The text of a kind='text' row."""

    tools: tuple[dict[str, Any], ...] = ()
    """Descriptions of the tools that may be called, in JSON's types."""


class Content(NamedTuple):
    """What a format makes of a row's columns."""

    kind: Literal["chat", "completion", "text"]
    messages: list[Message]
    text: str = ""
    tools: tuple[dict[str, Any], ...] = ()


def load_rows(dataset: str, dataset_format: str, report: DataReport, *, seed: int = 0) -> list[Row]:
    """Read and check a whole dataset; see iter_rows."""
    return list(iter_rows(dataset, dataset_format, report, seed=seed))


def rows_of(dataset: str, config: RowSettings, report: DataReport) -> Iterator[Row]:
    """Yield the rows of a dataset as the settings say; see iter_rows."""
    return iter_rows(dataset, config.dataset_format, report, seed=config.seed, hub_streaming=config.hub_streaming)


def iter_rows(
    dataset: str, dataset_format: str, report: DataReport, *, seed: int = 0, hub_streaming: bool = False
) -> Iterator[Row]:
    """Yield the rows of a dataset, checked, as they are read.

    Args:
        dataset: path of a .jsonl, .json, .csv or .parquet file, hub id, or a key of DEMO_DATASETS.
        dataset_format: a key of FORMATS, or 'auto' to choose by the columns of the first readable row.
        report: counts rows and, if it says so, lets malformed ones pass.
        seed: of the demo questions.
        hub_streaming: keep nothing of a hub dataset on disk.

    Raises:
        DataError: a malformed row that is not to be skipped (`file:line: reason`), an unknown form, no usable row.
    """
    if dataset in DEMO_DATASETS:
        for number, columns in enumerate(demo_rows(*DEMO_DATASETS[dataset], seed), 1):
            report.num_rows += 1
            yield Row(f"{dataset}:{number}", "chat", tuple(read_messages(columns).messages))
        return
    num_read, num_good = 0, 0
    first_problem = ""
    for raw in read_raw(dataset, hub_streaming=hub_streaming):
        num_read += 1
        report.num_rows += 1
        problem = raw.problem
        if not problem:
            if dataset_format == "auto":
                dataset_format = detect_format(raw.columns, raw.where)
            try:
                row = check_row(raw.where, FORMATS[dataset_format](raw.columns))
            except RowError as error:
                problem = str(error)
            else:
                num_good += 1
                yield row
        if problem:
            report.reject(raw.where, problem)
            first_problem = first_problem or f"{raw.where}: {problem}"
    if not num_read:
        raise DataError(f"dataset {dataset} is empty; it needs at least one row")
    if not num_good:
        raise DataError(f"dataset {dataset}: none of its rows is usable, the first: {first_problem}")


def detect_format(columns: dict[str, object], where: str) -> str:
    """Return the first format whose columns are all there.

    Raises:
        DataError: no format fits.
    """
    for name, needed in COLUMNS.items():
        if all(column in columns for column in needed):
            return name
    known = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in COLUMNS.items())
    separators = [mark for mark in (";", "\t") if len(columns) == 1 and mark in next(iter(columns))]
    remedy = f"separate the columns by commas, not by {separators[0]!r}" if separators else "rename them"
    raise DataError(f"{where}: the columns {', '.join(columns) or '(none)'} fit no known form ({known}); {remedy}")


def check_row(where: str, content: Content) -> Row:
    """Check what every form has to fulfil: size, clean text, order of roles.

    Raises:
        RowError: naming the first rule that is broken.
    """
    texts = texts_of(content.messages) + [content.text] * (content.kind == "text")
    size = sum(map(len, texts))
    if size > MAX_ROW_BYTES:
        raise RowError(too_long(size))
    for text in texts:
        check_text(text)
    if content.kind == "text":
        if not content.text.strip():
            raise RowError("text is empty")
        return Row(where, "text", text=content.text)
    messages = content.messages
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]  # an empty system column says: none
    check_conversation(messages)
    return Row(where, content.kind, tuple(messages), tools=content.tools)


def check_text(text: str) -> None:
    """Raise RowError if text holds what no tokenizer or template can take."""
    if "\0" in text:
        raise RowError("holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"invalid UTF-8 or unpaired surrogate at character {error.start + 1}") from error


def read_messages(columns: dict[str, object]) -> Content:
    """{"messages": [{"role", "content"}, ...]}, and "tools" if there are any; see chats.py for tool calls and reasoning."""
    return Content("chat", turns_of(columns, "messages", "role", "content"), tools=tools_of(columns))


def read_sharegpt(columns: dict[str, object]) -> Content:
    """{"conversations": [{"from", "value"}, ...]}, and "system" and "tools" if there are any."""
    messages = turns_of(columns, "conversations", "from", "value")
    if system := string_of(columns, "system", optional=True):
        messages.insert(0, {"role": "system", "content": system})
    return Content("chat", messages, tools=tools_of(columns))


def read_alpaca(columns: dict[str, object]) -> Content:
    """{"instruction", "input" (may be missing, null or empty), "output"}."""
    parts = [string_of(columns, "instruction"), string_of(columns, "input", optional=True)]
    question = "\n\n".join(part for part in parts if part.strip())
    answer = string_of(columns, "output")
    return Content("chat", [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def read_prompt_completion(columns: dict[str, object]) -> Content:
    """{"prompt", "completion"}."""
    prompt, completion = string_of(columns, "prompt"), string_of(columns, "completion")
    return Content("completion", [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])


def read_text(columns: dict[str, object]) -> Content:
    """{"text"}."""
    return Content("text", [], string_of(columns, "text"))


FORMATS: dict[str, Callable[[dict[str, object]], Content]] = {
    "messages": read_messages,
    "sharegpt": read_sharegpt,
    "alpaca": read_alpaca,
    "prompt_completion": read_prompt_completion,
    "text": read_text,
}

COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Columns by which dataset_format='auto' knows a form, in the order in which it looks."""

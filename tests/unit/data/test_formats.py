"""Rows of every form; T1: malformed rows stop with file:line and reason, or are counted and listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fsdp_qlora.data.formats import Row, load_rows
from fsdp_qlora.data.report import DataReport
from fsdp_qlora.errors import DataError

QUESTION = {"role": "user", "content": "Why?"}
ANSWER = {"role": "assistant", "content": "Because."}
GOOD = {"messages": [QUESTION, ANSWER]}


def line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def chat(*turns: object) -> bytes:
    """Return a line of the 'messages' form; a pair is a role and a content."""
    messages = [{"role": turn[0], "content": turn[1]} if isinstance(turn, tuple) else turn for turn in turns]
    return line({"messages": messages})


def load(path: Path, dataset_format: str = "auto") -> list[Row]:
    return load_rows(str(path), dataset_format, DataReport())


@pytest.mark.parametrize(
    ("dataset_format", "columns", "expected"),
    [
        ("messages", GOOD, [QUESTION, ANSWER]),
        (
            "messages",
            {"messages": [{"role": "system", "content": ""}, QUESTION, ANSWER]},  # an empty system message is none
            [QUESTION, ANSWER],
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "Because."},
                ]
            },
            [{"role": "system", "content": "Be brief."}, QUESTION, ANSWER],
        ),
        ("alpaca", {"instruction": "Why?", "input": "", "output": "Because."}, [QUESTION, ANSWER]),
        ("alpaca", {"instruction": "Why?", "output": "Because."}, [QUESTION, ANSWER]),
        (
            "alpaca",
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
        ("prompt_completion", {"prompt": "Why?", "completion": "Because."}, [QUESTION, ANSWER]),
    ],
)
def test_forms(tmp_path: Path, dataset_format: str, columns: object, expected: list[dict[str, str]]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(line(columns))
    for chosen in (dataset_format, "auto"):
        (row,) = load(path, chosen)
        assert list(row.messages) == expected
        assert row.kind == ("completion" if dataset_format == "prompt_completion" else "chat")
        assert row.where == f"{path}:1"


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(line({"text": " Once upon a time\n"}))
    assert load(path) == [Row(f"{path}:1", "text", text=" Once upon a time\n")]


MALFORMED = {
    "bad JSON": (b'{"messages": [\n', r"invalid JSON at column 15: .*; a line holds one whole object"),
    "cut JSON": (line(GOOD)[:-5] + b"\n", "invalid JSON"),
    "deep JSON": (b"[" * 100_000 + b"\n", "invalid JSON"),
    "no object": (b"[1, 2]\n", "expected a JSON object, found a list"),
    "missing column": (line({"other": 1}), "column 'messages' is missing"),
    "messages no list": (line({"messages": "hi"}), "'messages' must be a list, found a string"),
    "message no object": (chat("hi"), "message 1 must be an object, found a string"),
    "content no string": (chat(("user", 5), ANSWER), "message 1: 'content' must be a string, found a number"),
    "content null": (chat(QUESTION, ("assistant", None)), "message 2: 'content' must be a string, found null"),
    "missing content": (chat({"role": "user"}, ANSWER), "message 1: column 'content' is missing"),
    "unknown role": (chat(QUESTION, ("robot", "x")), "message 2: unknown role 'robot'"),
    "empty conversation": (chat(), "the conversation is empty"),
    "no answer": (chat(QUESTION), "no assistant message"),
    "blank answer": (chat(QUESTION, ("assistant", " \n")), r"message 2 \(assistant\) is empty"),
    "blank question": (chat(("user", ""), ANSWER), r"message 1 \(user\) is empty"),
    "answer first": (
        chat(ANSWER, QUESTION),
        "message 1 is from assistant, expected user or system: roles out of order",
    ),
    "two questions": (chat(QUESTION, QUESTION, ANSWER), "message 2 is from user, expected assistant"),
    "late system": (chat(QUESTION, ("system", "x"), ANSWER), "message 2 is from system, expected assistant"),
    "question last": (chat(QUESTION, ANSWER, QUESTION), "the last message is from user"),
    "10 MB row": (chat(QUESTION, ("assistant", "x" * 10_000_000)), r"row of 10\.0 MB, the limit is 8 MB"),
    "10 MB in another column": (line(GOOD | {"log": "x" * 10_000_000}), r"row of 10\.0 MB, the limit is 8 MB"),
    "invalid UTF-8": (chat(QUESTION, ("assistant", "abc")).replace(b"abc", b"\xff\xfe"), "invalid UTF-8 at byte"),
    "unpaired surrogate": (
        chat(QUESTION, ("assistant", "\ud800")),
        "invalid UTF-8 or unpaired surrogate at character 1",
    ),
    "NUL": (chat(QUESTION, ("assistant", "a\0b")), "holds a NUL character"),
    "raw NUL": (chat(QUESTION, ("assistant", "ab")).replace(b"ab", b"a\0b"), "invalid JSON"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_rows_stop_with_their_line(tmp_path: Path, name: str) -> None:
    content, reason = MALFORMED[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(line(GOOD) + b"\n" + content + line(GOOD))
    with pytest.raises(DataError, match=rf"data\.jsonl:3: {reason}.*--bad_rows skip"):
        load(path)


def test_malformed_rows_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"".join(content + line(GOOD) for content, _ in MALFORMED.values()))
    report = DataReport(bad_rows="skip")
    rows = load_rows(str(path), "messages", report)
    assert len(rows) == len(MALFORMED) == report.num_skipped
    assert report.num_rows == 2 * len(MALFORMED)
    assert len(report.skipped) == 10
    assert report.skipped[1].startswith(f"{path}:3: invalid JSON")
    assert report.skipped[1] in "\n".join(report.lines())


@pytest.mark.parametrize(
    ("dataset_format", "columns", "reason"),
    [
        ("sharegpt", {"conversations": [{"from": "human", "value": 1}]}, "message 1: 'value' must be a string"),
        ("sharegpt", {"conversations": [{"from": "robot", "value": "x"}]}, "unknown role 'robot'"),
        ("alpaca", {"instruction": "Why?"}, "column 'output' is missing"),
        ("alpaca", {"instruction": "Why?", "input": ["x"], "output": "a"}, "'input' must be a string, found a list"),
        ("alpaca", {"instruction": "Why?", "output": " "}, "is empty"),
        ("prompt_completion", {"prompt": "Why?", "completion": ["x"]}, "'completion' must be a string"),
        ("text", {"text": {"a": 1}}, "'text' must be a string, found an object"),
        ("text", {"text": "  "}, "text is empty"),
        ("text", {"text": "a\0"}, "NUL"),
    ],
)
def test_malformed_rows_of_other_forms(tmp_path: Path, dataset_format: str, columns: object, reason: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(line(columns))
    with pytest.raises(DataError, match=rf":1: .*{reason}"):
        load(path, dataset_format)


def test_long_rows_of_files_without_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": "fine"}, {"text": "x" * 10_000_000}]))
    with pytest.raises(DataError, match=r"data\.json:2: row of 10\.0 MB, the limit is 8 MB"):
        load(path)


def test_unknown_columns(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(line({"question": "a", "reply": "b"}))
    with pytest.raises(DataError, match=r":1: the columns question, reply fit no known form \(messages: messages; "):
        load(path)


def test_csv_with_other_separators(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("instruction;output\na;b\n")
    with pytest.raises(DataError, match=r"separate the columns by commas, not by ';'"):
        load(path)


def test_only_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"{\n{\n")
    with pytest.raises(DataError, match=r"none of its rows is usable, the first: .*data\.jsonl:1: invalid JSON"):
        load_rows(str(path), "auto", DataReport(bad_rows="skip"))


def test_demo_rows_are_conversations() -> None:
    pytest.importorskip("reasoning_gym")
    report = DataReport()
    rows = load_rows("demo", "auto", report, seed=1)
    assert len(rows) == report.num_rows == 2000
    assert {row.kind for row in rows} == {"chat"}
    assert rows[0].where == "demo:1"

"""The documentation's links, flags and samples hold."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from fsdp_qlora.data import formats
from fsdp_qlora.data.chats import RowError
from fsdp_qlora.data.formats import COLUMNS, load_rows
from fsdp_qlora.data.report import DataReport
from scripts import check_docs

DATA_PAGE = check_docs.ROOT / "docs" / "data.md"


def test_the_pages_have_no_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_docs.main() == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[x](gone.md)", "link to gone.md: no such file"),
        ("# Here\n[x](#there)", "link to #there: no such heading"),
        ("![x](../../outside.png)", "no such file"),
        ("`--learning_rat 1`", "--learning_rat: no such setting"),
        ("```bash\nfsdp-qlora trian --lr 1\n```", "fsdp-qlora trian: no such command"),
        ("see `tests/gone.py`", "tests/gone.py: no such file"),
    ],
)
def test_problems_are_found(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "README.md").write_text(text)
    (found,) = check_docs.problems(tmp_path / "README.md", tmp_path)
    assert problem in found


def test_good_pages_pass(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# One, *two* & `three`\n[up](../README.md) [web](https://example.org/x)")
    (tmp_path / "README.md").write_text(
        "[a](docs/a.md#one-two--three) `fsdp-qlora train --lr 1`\n```\n[x](no-link)\n```"
    )
    assert check_docs.main(tmp_path) == 0


def program_texts() -> str:
    """Return all string literals of the package, with {} for what is filled in."""
    texts = []
    for path in (check_docs.ROOT / "fsdp_qlora").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_messages_to_look_up_are_those_of_the_program() -> None:
    """Four words in a row that the program writes, at least: the rest may be a user's names."""
    page = (check_docs.ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [*re.findall(r"`([^`]+)`", page), *re.findall(r"(?m)^    (?! )(.+)$", page)]
    filled_in = re.compile(r"\.\.\.|\d[\d.,]*")
    known, messages = (
        program_texts(),
        [words for text in quoted if len(words := filled_in.sub("{}", text).split()) >= 5],
    )
    runs = {" ".join(words): [" ".join(words[i : i + 4]) for i in range(len(words) - 3)] for words in messages}
    assert len(runs) > 25
    assert [message for message, parts in runs.items() if not any(part in known for part in parts)] == []


def samples() -> list[str]:
    return re.findall(r"```json\n(.*?)```", DATA_PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_there_is_a_sample_of_every_form() -> None:
    keys = [set(json.loads(sample)) for sample in samples()]
    assert [name for name, columns in COLUMNS.items() if not any(set(columns) <= found for found in keys)] == []


@pytest.mark.parametrize("sample", samples(), ids=range(len(samples())))
def test_samples_of_rows_are_read(tmp_path: Path, sample: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(sample)
    assert len(load_rows(str(path), "auto", DataReport())) == 1


def test_the_example_of_a_new_format_works() -> None:
    page = (check_docs.ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = dict(vars(formats))
    exec(example, names)
    content = names["read_question_answer"]({"question": "q", "answer": "a"})
    assert formats.check_row("file:1", content).messages[-1] == {"role": "assistant", "content": "a"}
    with pytest.raises(RowError, match="column 'answer' is missing"):
        names["read_question_answer"]({"question": "q"})

"""The data report: figures, histogram, samples with their mask, and warnings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fsdp_qlora.commands import data as data_report
from fsdp_qlora.config import DataConfig
from fsdp_qlora.data import formats
from fsdp_qlora.data.survey import Bin, Survey, histogram, survey
from tests.unit.data.families import CONVERSATION, FAMILIES, tiny_tokenizer
from tests.unit.data.test_splits import chat, write


def look(path: Path, rows: list[dict[str, Any]], family: str = "chatml", **settings: Any) -> Survey:
    config = DataConfig(dataset=write(path / "rows.jsonl", rows), **{"eval_split": 0.0, **settings})
    return survey(config, tiny_tokenizer(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_shows_all_tokens_and_marks_the_targets(tmp_path: Path, family: str) -> None:
    (sample,) = look(tmp_path, [{"messages": CONVERSATION}], family).samples
    spec = FAMILIES[family]
    shown = "".join(f"«{text}»" if is_target else text for text, is_target in sample.runs)
    # Phi-3's special tokens swallow white space, and a space before an answer may belong to either side
    assert "".join(shown.split()) == "".join((spec.expected + spec.appended).split())


def test_figures(tmp_path: Path) -> None:
    rows = [chat("q", "a" * n) for n in (1, 20, 400)] + [chat("q" * 400, "a")]
    found = look(tmp_path, rows, context_length=64, batch_size=1, gradient_accumulation_steps=1, gpus=2)
    report, stats = found.report, found.stats
    assert (report.num_rows, report.num_examples, report.num_truncated, report.num_dropped) == (4, 3, 1, 1)
    assert len(report.lengths) == 4
    assert found.percentiles["longest"] == max(report.lengths) > 64, "lengths are those before cutting"
    assert sum(entry.count for entry in found.bins) == 4
    assert (stats.num_sequences, stats.num_steps) == (2, 1), "two short ones share a sequence; two ranks take one each"
    assert [sample.num_tokens for sample in found.samples] == sorted(sample.num_tokens for sample in found.samples)
    assert sum(sample.num_tokens for sample in found.samples) == stats.num_tokens
    assert sum(sample.num_targets for sample in found.samples) == stats.num_targets


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7], [Bin(1, 1, 0)] * 0 + [Bin(i, i, int(i == 7)) for i in range(1, 8)]),
        ([1, 10, 11, 100], [Bin(1, 10, 2), Bin(11, 20, 1), *(Bin(10 * i + 1, 10 * i + 10, 0) for i in range(2, 9)),
                            Bin(91, 100, 1)]),
    ],
)  # fmt: skip
def test_histogram(values: list[int], expected: list[Bin]) -> None:
    assert histogram(values) == expected


def test_an_outlier_does_not_flatten_the_histogram() -> None:
    bins = histogram([*range(1, 1001), 1_000_000])
    assert bins[-1] == Bin(1001, 1_000_000, 1)
    assert sum(entry.count for entry in bins) == 1001
    assert max(entry.count for entry in bins) <= 200


@pytest.mark.parametrize(
    ("rows", "family", "settings", "expected"),
    [
        ([chat("q", "a")] * 3, "chatml", {}, "2 training examples repeat another one word for word"),
        ([chat("q", "a")] * 4, "chatml", {"eval_split": 0.25}, "1 evaluation examples are also trained on"),
        ([{"messages": CONVERSATION}], "gemma", {}, "1 rows have a system message, for which the chat template has no"),
        ([chat("say <|im_end|>", "a")], "chatml", {}, "written out inside texts (<|im_end|> in 1 rows, the first "),
        ([chat("q", "long " * 90)], "chatml", {"context_length": 64}, "1 examples are cut at --context_length"),
        ([chat("q", "a"), chat("long " * 90, "a")], "chatml", {"context_length": 64}, "1 examples are dropped, having"),
        ([chat("q", "a"), {"messages": 1}], "chatml", {"bad_rows": "skip"}, "1 malformed rows are skipped, the first"),
    ],
)
def test_warnings(
    tmp_path: Path, rows: list[dict[str, Any]], family: str, settings: dict[str, Any], expected: str
) -> None:
    warnings = look(tmp_path, rows, family, **settings).warnings
    assert any(expected in warning for warning in warnings), warnings


def test_rows_are_read_once_and_not_again_where_their_tokens_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    read_raw = formats.read_raw
    monkeypatch.setattr(formats, "read_raw", lambda path, **rest: read.append(path) or read_raw(path, **rest))
    rows = [{"messages": CONVERSATION}, chat("say <eos>", "a")]
    warnings = [look(tmp_path, rows, "gemma", token_cache=str(tmp_path / "tokens")).warnings for _ in range(2)]
    assert len(read) == 1
    assert len(warnings[0]) == 2
    assert warnings[0] == warnings[1]


def test_nothing_to_warn_of(tmp_path: Path) -> None:
    assert look(tmp_path, [chat("q", "a"), chat("q", "b")]).warnings == ()


def test_the_command_prints_marks_and_saves_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_report, "load_tokenizer", lambda folder: tiny_tokenizer("chatml"))
    monkeypatch.setattr(data_report, "resolve_config", lambda *args, **kwargs: tmp_path)
    page = tmp_path / "page.html"
    rows = [chat("is <b>[red]1</b> < 2?\x1b[2J", "yes & " + "very " * 400 + "sure")]
    config = DataConfig(dataset=write(tmp_path / "r.jsonl", rows), save_html=str(page), context_length=4096)
    data_report.run(config)
    out = capsys.readouterr().out
    assert "<|im_start|>user\nis <b>[red]1</b> < 2?\\x1b[2J<|im_end|>" in out, "texts are neither markup nor commands"
    assert "<|im_start|>assistant\n{+yes & very" in out
    assert re.search(r"\[\.\.\. [\d,]+ characters \.\.\.\].*sure<\|im_end\|>\+}", out)
    html = page.read_text()
    assert "is &lt;b&gt;[red]1&lt;/b&gt; &lt; 2?" in html
    assert "<mark>yes &amp; very" in html
    assert not re.search(r"""(src|href)=["']?(?!["']?data:)|url\(|@import""", html), "the page fetches nothing"

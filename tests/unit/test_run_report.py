"""The page about runs: what it shows, and that it needs nothing but itself."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fsdp_qlora import cli
from fsdp_qlora.commands import report as run_report
from fsdp_qlora.config import ReportConfig
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.report.charts import Series, running_mean, svg
from fsdp_qlora.report.run_data import read_run

METRICS: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 3.0, "perplexity": 20.1},
    {"step": 1, "loss": 2.5, "lr": 1e-4, "peak_gpu_gib": 0.0},
    {"step": 2, "loss": 1.5, "lr": 2e-4, "peak_gpu_gib": 0.0},
    {"step": 2, "eval_loss": 1.25, "samples": [{"prompt": "2 < 3?", "answer": "<script>yes"}]},
]


def make_run(folder: Path, metrics: list[dict[str, Any]] = METRICS, **config: Any) -> Path:
    folder.mkdir()
    record = {"command": "python train.py --lr 1", "config": {"lr": 1.0, "seed": 3, **config}, "world_size": 2}
    (folder / "run.json").write_text(json.dumps({**record, "result": {"steps": 2, "eval_loss_after": 1.25}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics))
    return folder


class Page(HTMLParser):
    """The texts of a page's table rows, and its links."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[str] = []
        self.in_row = False
        self.charts: list[str] = []
        self.links: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag == "tr":
            self.rows.append("")
            self.in_row = True
        if tag == "svg":
            self.charts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_row = self.in_row and tag != "tr"

    def handle_data(self, data: str) -> None:
        if self.in_row:
            self.rows[-1] = " ".join([self.rows[-1], data.strip()]).strip()
        if self.charts:
            self.charts[-1] += data.strip() + " "


def test_one_run(tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    run_report.run(
        ReportConfig(runs=str(make_run(tmp_path / "mine")), output=str(output), png_dir=str(tmp_path / "png"))
    )
    page = Page(output)
    assert [row for row in page.rows if row[:3] in ("eva", "lr ")] == ["evaluation loss, after 1.2500", "lr 1.0"]
    titles = ["Training loss", "Evaluation loss", "Perplexity", "Learning rate"]
    assert len(page.charts) == 4, "no chart of GPU memory, which is 0 throughout"
    assert [title for title, chart in zip(titles, page.charts, strict=True) if title not in chart] == []
    assert "&lt;script&gt;yes" in page.source
    assert "<script" not in page.source
    names = ["evaluation-loss.png", "learning-rate.png", "perplexity-evaluation.png", "training-loss.png"]
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "png").iterdir())


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    run_report.run(ReportConfig(runs=str(make_run(tmp_path / "mine")), output=str(output)))
    page = Page(output)
    assert [link for link in page.links if not link.startswith(("#", "data:"))] == []
    assert not re.search(r"url\((?!#)|@import|@font-face", page.source)


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    named = [{"step": 1, "loss": 2.0, "eval_loss/easy": 1.0, "eval_loss/hard": 2.0}]
    folders = [make_run(tmp_path / "first"), make_run(tmp_path / "second", named, lr=0.5)]
    output = tmp_path / "page.html"
    cli.main(["report", *map(str, folders), "--output", str(output)])
    page = Page(output)
    assert page.rows.count("lr 1.0 0.5") == 2, "among those that differ, and among all"
    assert page.rows.count("seed 3 3") == 1
    evaluation = next(chart for chart in page.charts if "Evaluation loss" in chart)
    assert [name in evaluation for name in ("first", "second, easy", "second, hard")] == [True] * 3
    assert "var(--series-1)" in page.source


def test_series() -> None:
    assert running_mean([1, 2, 3, 4, 5], 2) == [1, 1.5, 2.5, 3.5, 4.5]


def test_charts_take_their_colours_from_the_page() -> None:
    chart = svg("title", [Series("a", 0, False, range(300), range(300)), Series("b", 7, True, [1], [2.0])])
    used = set(re.findall(r"(?:stroke|fill): (#\w+|var[^;\"]*)", chart))
    assert used == {"var(--ink)", "var(--faint)", "var(--line)", "var(--series-0)", "var(--series-1)"}


def test_a_run_that_was_resumed_or_is_being_written(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine", [*METRICS, {"step": 2, "loss": 1.0}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    run = read_run(folder)
    assert run.series("loss") == ([1, 2], [2.5, 1.0])
    assert run.series("eval_loss") == ([0, 2], [3.0, 1.25])


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere holds no run.json; give the --output_dir of a training run"):
        read_run(tmp_path / "nowhere")
    folder = make_run(tmp_path / "mine")
    (folder / "metrics.jsonl").write_text('{"step"\n{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl:1: invalid JSON"):
        read_run(folder)
    with pytest.raises(ConfigError, match="cannot be written"):
        run_report.run(ReportConfig(runs=str(make_run(tmp_path / "b")), output=str(tmp_path / "no" / "page.html")))

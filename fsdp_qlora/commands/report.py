"""The command `report`: one page about one run, or several side by side."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fsdp_qlora.config import ReportConfig
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.pages import write_page
from fsdp_qlora.report.charts import PALETTE, Series, save_png, svg
from fsdp_qlora.report.run_data import RunData, read_run
from fsdp_qlora.settings import show

CHARTS = {
    "loss": "Training loss",
    "eval_loss": "Evaluation loss",
    "perplexity": "Perplexity (evaluation)",
    "token_accuracy": "Token accuracy (evaluation)",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Tokens per second, all ranks",
    "peak_gpu_gib": "Peak GPU memory, GiB",
}
"""Title of the chart of each number; 'NAME/SET' is that number on an evaluation set of that name."""

RESULTS = {
    "steps": "steps",
    "tokens": "tokens",
    "seconds": "seconds",
    "tokens_per_second": "tokens per second",
    "train_loss": "training loss, last step",
    "eval_loss_before": "evaluation loss, before",
    "eval_loss_after": "evaluation loss, after",
    "peak_gpu_gib": "peak GPU memory, GiB",
}


def run(config: ReportConfig) -> None:
    """Write the page; the command line's `report`.

    Raises:
        ConfigError: a folder that holds no run, a missing package, or a file that cannot be written.
    """
    folders = [Path(folder.strip()) for folder in config.runs.split(",")]
    runs = [read_run(folder) for folder in folders]
    charts = {CHARTS[name]: chart for name in CHARTS if (chart := series_of(runs, name))}
    write_page(
        config.output,
        "run.html",
        title=", ".join(one.name for one in runs),
        runs=[(one.name, one.record) for one in runs],
        charts=[Markup(svg(title, chart)) for title, chart in charts.items()],
        num_colours=len(PALETTE),
        results=table([(title, [one.result.get(name) for one in runs]) for name, title in RESULTS.items()]),
        settings=settings_rows(runs),
        samples=[(one.name, one.samples) for one in runs if one.samples],
        commands=[(one.name, one.record.get("command", "")) for one in runs],
    )
    print(f"page: {config.output}")
    if config.png_dir is not None:
        save_pngs(Path(config.png_dir), charts)


def series_of(runs: Sequence[RunData], name: str) -> list[Series]:
    """Return the lines of a chart: of every run and, for numbers of named evaluation sets, of every set.

    A chart that would be 0 throughout (GPU memory on a CPU) has none.
    """
    chart = []
    for place, one in enumerate(runs):
        for nth, key in enumerate(key for key in one.names() if key == name or key.startswith(f"{name}/")):
            label = one.name + key.removeprefix(name).replace("/", ", ")
            steps, values = one.series(key)
            colour = place if len(runs) > 1 else nth
            chart.append(Series(label, colour, dashed=len(runs) > 1 and nth > 0, steps=steps, values=values))
    return chart if any(any(one.values) for one in chart) else []


def table(rows: Sequence[tuple[str, Sequence[Any]]]) -> list[tuple[str, list[str]]]:
    """Return the rows that say something, as text."""
    return [(name, [_text(value) for value in values]) for name, values in rows if any(values)]


def settings_rows(runs: Sequence[RunData]) -> list[tuple[str, list[str], bool]]:
    """Return every setting of any run, its value in each, and whether they differ."""
    configs = [one.record.get("config", {}) for one in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    rows = [(name, [show(config.get(name)) for config in configs]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows]


def save_pngs(folder: Path, charts: dict[str, list[Series]]) -> None:
    """Save every chart as a picture named by its title."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--png_dir={folder} cannot be made ({error.strerror}); choose another") from error
    for title, chart in charts.items():
        words = title.lower().replace(",", "").replace("(", "").replace(")", "").split()
        save_png(folder / f"{'-'.join(words)}.png", title, chart)
    print(f"pictures: {shlex.quote(str(folder))}")


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)

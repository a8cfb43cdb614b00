"""Line charts by matplotlib: SVG that takes its colours from the page it stands in, and PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fsdp_qlora.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a07800", "#56a0d0")
"""Colours of series on white (after Okabe and Ito: told apart by colour-blind people); run.html has those of pages."""

NUM_SMOOTHED = 100
"""A series of more points is shown faint, under its running mean over a fiftieth of it."""

_INK, _FAINT, _LINE = "#010101", "#010102", "#010103"
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--faint)", _LINE: "var(--line)"} | {
    f"#0102{i:02x}": f"var(--series-{i})" for i in range(len(PALETTE))
}
"""Stand-ins for colours in SVG, and the CSS variables that replace them."""


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    colour: int
    """Which colour of the palette; others begin again."""

    dashed: bool
    steps: Sequence[int]
    values: Sequence[float]


def svg(title: str, series: Sequence[Series]) -> str:
    """Return a chart as an <svg> element without fixed size, whose colours are CSS variables.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = _draw(title, series, tuple(_VARIABLES)[3:], (_INK, _FAINT, _LINE))
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[^"]*pt"', "", text, count=2)
    text = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "system-ui, sans-serif", text)
    return re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], text)


def save_png(path: Path, title: str, series: Sequence[Series]) -> None:
    """Save a chart on white; ConfigError if matplotlib is missing or the file cannot be written."""
    figure = _draw(title, series, PALETTE, ("#1c1c1a", "#66655f", "#dfdedb"))
    try:
        figure.savefig(path, dpi=200)
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be written ({error.strerror}); choose another folder") from error


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return at each place the mean of the last `window` values, or of as many as there are."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    means: list[float] = ((sums[ends] - sums[starts]) / (ends - starts)).tolist()
    return means


def _draw(title: str, series: Sequence[Series], palette: Sequence[str], theme: tuple[str, str, str]) -> Figure:
    """Draw a chart; `theme` are the colours of text, of labels and of lines."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("charts need matplotlib; pip install matplotlib") from error
    ink, faint, line = theme
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.subplots()
    for one in series:
        colour, dashes = palette[one.colour % len(palette)], "--" if one.dashed else "-"
        if len(one.values) > NUM_SMOOTHED:
            axes.plot(one.steps, one.values, color=colour, alpha=0.25, linewidth=0.8)
            mean = running_mean(one.values, len(one.values) // 50)
            axes.plot(one.steps, mean, color=colour, linestyle=dashes, label=one.label)
        else:
            marker = "o" if len(one.values) <= 30 else ""
            axes.plot(
                one.steps, one.values, color=colour, linestyle=dashes, marker=marker, markersize=3, label=one.label
            )
    axes.set_title(title, color=ink, fontsize=12, loc="left", fontweight="bold")
    axes.set_xlabel("step", color=faint, fontsize=11)
    axes.tick_params(labelsize=11, colors=faint, length=0)
    axes.grid(color=line, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.locator_params(axis="x", integer=True, nbins=6)
    axes.locator_params(axis="y", nbins=6)
    if len(series) > 1:
        axes.legend(fontsize=11, labelcolor=ink, frameon=False)
    return figure

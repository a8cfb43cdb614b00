"""The command `data`: what training would learn from a dataset, on the terminal and as a page."""

from __future__ import annotations

import os
import unicodedata

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from fsdp_qlora.build import load_tokenizer
from fsdp_qlora.config import DataConfig
from fsdp_qlora.data.survey import Sample, Survey, survey
from fsdp_qlora.data.templates import use_template
from fsdp_qlora.models.hub import resolve_config
from fsdp_qlora.pages import write_page

BAR_WIDTH = 40
SHOWN_CHARACTERS = 1200
"""Of a run of text that is longer, this many characters are shown, from its beginning and its end."""

MARKS = ("{+", "+}")
"""Around what counts in the loss where there are no colours."""


def run(config: DataConfig) -> None:
    """Print the report; the command line's `data`.

    Raises:
        ModelError: the model cannot be found or has no tokenizer.
        DataError: a dataset or row that cannot be used.
        ConfigError: the page cannot be written.
    """
    tokenizer = load_tokenizer(resolve_config(config.model, config.revision, tokenizer=True))
    use_template(tokenizer, config.chat_template)
    found = survey(config, tokenizer)
    console = Console(highlight=False, soft_wrap=True)
    console.print(escape("\n".join(summary(config, found))))
    console.print()
    for line in bars(found):
        console.print(line)
    for number, sample in enumerate(found.samples, 1):
        console.print(f"\n[bold]sample {number}[/]: {sample.num_tokens} tokens, {sample.num_targets} count in the loss")
        console.print(marked(sample, coloured=console.is_terminal), end="")
    if found.samples:
        legend = "[bold green]green[/]" if console.is_terminal else f"between {MARKS[0]} and {MARKS[1]}"
        console.print(f"\nwhat counts in the loss is {legend}")
    for warning in found.warnings:
        console.print(f"[yellow]warning[/]: {escape(warning)}")
    if config.save_html is not None:
        write_page(config.save_html, "data.html", **page_values(config, found))
        console.print(f"page: {escape(config.save_html)}")


def summary(config: DataConfig, found: Survey) -> list[str]:
    """Return the figures, one statement a line."""
    report, stats = found.report, found.stats
    per_step = config.batch_size * config.gradient_accumulation_steps * config.gpus
    filling = "packed" if config.packing else "padded"
    return [
        f"rows:      {report.num_rows:,} read, {report.num_skipped:,} malformed ones skipped",
        f"examples:  {report.num_examples:,} to train on, {report.num_eval_examples:,} to evaluate;"
        f" {report.num_truncated:,} cut at {config.context_length} tokens, {report.num_dropped:,} dropped",
        f"tokens:    {stats.num_tokens:,} to train on, {stats.num_targets:,}"
        f" ({stats.num_targets / stats.num_tokens:.1%}) count in the loss",
        "lengths:   " + ", ".join(f"{name} {value:,}" for name, value in found.percentiles.items()) + " tokens",
        f"sequences: {stats.num_sequences:,}, {filling} and {stats.efficiency:.1%} filled",
        f"steps:     {stats.num_steps:,} an epoch, each of {config.batch_size} sequences x"
        f" {config.gradient_accumulation_steps} micro-batches x {config.gpus} GPUs = {per_step} sequences,"
        f" {stats.num_tokens / stats.num_steps:,.0f} tokens on average",
    ]


def bars(found: Survey) -> list[str]:
    """Return the histogram of lengths, one line a bin."""
    labels = [f"{entry.low:,} - {entry.high:,}" for entry in found.bins]
    most = max(entry.count for entry in found.bins)
    return [
        f"{label:>{max(map(len, labels))}} {'#' * -(-BAR_WIDTH * entry.count // most):<{BAR_WIDTH}} {entry.count:,}"
        for label, entry in zip(labels, found.bins, strict=True)
    ]


def marked(sample: Sample, *, coloured: bool) -> Text:
    """Return a sample whose targets are green, or stand between MARKS."""
    text = Text()
    for part, is_target in sample.runs:
        shown = printable(shorten(part))
        if coloured:
            text.append(shown, "bold green" if is_target else "dim")
        else:
            text.append(MARKS[0] + shown + MARKS[1] if is_target else shown)
    return text


def printable(text: str) -> str:
    """Return a text whose control characters, by which a dataset could command the terminal, are written out as \\x1b."""
    return "".join(one if one in "\n\t" or unicodedata.category(one) != "Cc" else f"\\x{ord(one):02x}" for one in text)


def shorten(text: str) -> str:
    """Return beginning and end of a long text."""
    left_out = len(text) - SHOWN_CHARACTERS
    if left_out <= 0:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} [... {left_out:,} characters ...] {text[-half:]}"


def page_values(config: DataConfig, found: Survey) -> dict[str, object]:
    """Return what the page shows."""
    most = max(entry.count for entry in found.bins)
    return {
        "title": f"{os.path.basename(config.dataset)} for {os.path.basename(config.model.rstrip('/'))}",
        "figures": [line.split(":", 1) for line in summary(config, found)],
        "bins": [(f"{entry.low:,} - {entry.high:,}", entry.count, 100 * entry.count / most) for entry in found.bins],
        "samples": [
            (sample.num_tokens, sample.num_targets, [(shorten(part), is_target) for part, is_target in sample.runs])
            for sample in found.samples
        ],
        "warnings": found.warnings,
    }

"""What a run would learn from a dataset: counts, lengths, samples and warnings, from the tokenizer alone."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.command import DataConfig
from fsdp_qlora.data.loader import LoaderStats, make_loader
from fsdp_qlora.data.report import DataReport
from fsdp_qlora.data.splits import Splits, load_splits
from fsdp_qlora.data.store import Indices, Mixture, TokenStore
from fsdp_qlora.data.templates import ChatRenderer
from fsdp_qlora.data.tokenize import IGNORE, Example

MAX_BINS = 12


@dataclass(frozen=True)
class Bin:
    """One bar of a histogram: `count` values from `low` to `high`, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class Sample:
    """A training example as text: runs of tokens, each with whether they count in the loss."""

    num_tokens: int
    num_targets: int
    runs: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Survey:
    """All that the command `data` shows."""

    report: DataReport
    stats: LoaderStats
    bins: tuple[Bin, ...]
    percentiles: dict[str, int]
    """Tokens of an example before cutting, by name of the percentile."""

    samples: tuple[Sample, ...]
    warnings: tuple[str, ...]


def survey(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Survey:
    """Read, check and tokenise a dataset as training would.

    Raises:
        DataError: as in training.
    """
    splits = load_splits(config, tokenizer)
    train, report = splits.train, splits.report
    loader = make_loader(
        train,
        config,
        tokenizer,
        rank=0,
        world_size=config.gpus,
        accumulation=config.gradient_accumulation_steps,
        vocab_size=None,
    )
    lengths = np.array(report.lengths)
    names = {"shortest": 0, "median": 50, "95 %": 95, "longest": 100}
    warnings = [*_text_warnings(report, tokenizer), *_example_warnings(splits)]
    return Survey(
        report,
        loader.stats(),
        tuple(histogram(report.lengths)),
        {name: int(np.percentile(lengths, share)) for name, share in names.items()},
        tuple(render(tokenizer, example) for example in choose_samples(train.stores, config.num_samples)),
        tuple(warnings),
    )


def histogram(values: Sequence[int]) -> list[Bin]:
    """Count values of at least 1 in at most MAX_BINS bins of equal, round width, into which 99 % of them fall.

    What is larger has a bin of its own.
    """
    data = np.asarray(values)
    top = float(np.percentile(data, 99))
    widths = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    width = next(width for width in widths if width * MAX_BINS >= top)
    num_bins = -(-int(np.ceil(top)) // width)
    counts = np.bincount((data - 1) // width, minlength=num_bins)
    bins = [Bin(i * width + 1, (i + 1) * width, int(counts[i])) for i in range(num_bins)]
    larger = int(counts[num_bins:].sum())
    return [*bins, Bin(num_bins * width + 1, int(data.max()), larger)] if larger else bins


def choose_samples(stores: Sequence[TokenStore], num_samples: int) -> list[Example]:
    """Return examples evenly spread over the lengths, from the shortest to the longest."""
    mixture = Mixture(stores)
    order = np.argsort(mixture.lengths, kind="stable")
    places = np.linspace(0, len(order) - 1, min(num_samples, len(order))).round().astype(int)
    tokens = [mixture.tokens(int(order[place])) for place in places]
    return [Example(ids.tolist(), np.where(flags, ids, IGNORE).tolist()) for ids, flags in tokens]


def render(tokenizer: PreTrainedTokenizerBase, example: Example) -> Sample:
    """Return an example's text in runs.

    A run is what the decoded text grows by, as tokens decoded alone may lose white space. The first token is never a
    target, since nothing predicts it.
    """
    flags = [False, *(label != IGNORE for label in example.labels[1:])]
    ends = [i for i in range(1, len(flags)) if flags[i] != flags[i - 1]]
    runs: list[tuple[str, bool]] = []
    shown = 0
    for end in [*ends, len(flags)]:
        text = tokenizer.decode(example.input_ids[:end], clean_up_tokenization_spaces=False)
        runs.append((text[shown:], flags[end - 1]))
        shown = len(text)
    return Sample(len(flags), sum(flags), tuple(runs))


def _text_warnings(report: DataReport, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return warnings about texts and roles."""
    warnings = []
    if report.num_system and ChatRenderer(tokenizer).merges_system:
        warnings.append(
            f"{report.num_system:,} rows have a system message, for which the chat template has no place: it is put"
            " before the text of the first user message"
        )
    if report.written_out:
        counts = ", ".join(f"{token} in {count:,}" for token, count in report.written_out.most_common(5))
        warnings.append(
            f"special tokens are written out inside texts ({counts} rows, the first {report.first_written_out}): where the"
            " rows are plain text they act as such, elsewhere they are learned as ordinary characters"
        )
    return warnings


def _example_warnings(splits: Splits) -> list[str]:
    """Return warnings about what was lost, and what is there twice."""
    warnings, report = [], splits.report
    if report.num_dropped:
        warnings.append(
            f"{report.num_dropped:,} examples are dropped, having no token to learn within --context_length"
            f" ({', '.join(report.dropped)}): raise it, or shorten their questions"
        )
    if report.num_truncated:
        warnings.append(
            f"{report.num_truncated:,} examples are cut at --context_length: the model never sees how they end"
        )
    if report.num_skipped:
        warnings.append(f"{report.num_skipped:,} malformed rows are skipped, the first {report.skipped[0]}")
    keys = np.unique(np.concatenate([_keys(store) for store in splits.train.stores]))
    if repeated := report.num_examples - len(keys):
        warnings.append(f"{repeated:,} training examples repeat another one word for word: they count several times")
    if leaked := sum(int(np.isin(_keys(store), keys).sum()) for store in splits.evaluation.values()):
        warnings.append(f"{leaked:,} evaluation examples are also trained on: the evaluation loss will look too good")
    return warnings


def _keys(store: TokenStore) -> Indices:
    """Return a checksum of every example, of 8 bytes: there may be more examples than fit into RAM as a set."""
    keys = array("q")
    for i in range(len(store)):
        keys.frombytes(hashlib.blake2b(store.tokens(i)[0].tobytes(), digest_size=8).digest())
    return np.array(keys, dtype=np.int64)

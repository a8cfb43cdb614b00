"""From the settings to training and evaluation examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.formats import Row, load_rows
from fsdp_qlora.data.report import DataReport
from fsdp_qlora.data.templates import ChatRenderer, Document, Piece, special_tokens
from fsdp_qlora.data.tokenize import IGNORE, Encoder, Example
from fsdp_qlora.data_config import DataSettings, RowSettings, named_datasets
from fsdp_qlora.errors import DataError

MAX_EVAL_ROWS = 1000
ENCODE_BATCH = 1000
"""Documents that the tokenizer gets at once; it spreads them over threads."""


def load_splits(
    config: DataSettings, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Example], dict[str, list[Example]], DataReport]:
    """Read, check and tokenise the datasets of a run.

    All rows are checked before any is tokenised. The result depends on the settings, files and tokenizer only, so every
    rank gets the same.

    Returns:
        Training examples; evaluation examples by the name of their set (of eval_dataset, or held out by eval_split under
        ''), sets without any left out; each of at most context_length tokens and in the order of the file; and the counts.

    Raises:
        DataError: a dataset or row that cannot be used, or no training example left.
    """
    report = DataReport(bad_rows=config.bad_rows)
    train_rows, eval_rows = read_splits(config, report)
    train, evaluation = tokenize_splits(train_rows, eval_rows, tokenizer, config, report)
    return train, evaluation, report


def read_splits(config: DataSettings, report: DataReport) -> tuple[list[Row], dict[str, list[Row]]]:
    """Return the checked training rows, and evaluation rows by set; DataError for a dataset or row that cannot be used."""
    rows = load_rows(config.dataset, config.dataset_format, report, seed=config.seed)
    if config.eval_dataset is None:
        train_rows, held_out = hold_out(rows, config.eval_split, config.seed)
        return train_rows, {"": held_out}
    datasets = named_datasets(config.eval_dataset)
    return rows, {
        name: load_rows(dataset, config.dataset_format, report, seed=config.seed) for name, dataset in datasets.items()
    }


def tokenize_splits(
    train_rows: list[Row],
    eval_rows: Mapping[str, list[Row]],
    tokenizer: PreTrainedTokenizerBase,
    config: DataSettings,
    report: DataReport,
) -> tuple[list[Example], dict[str, list[Example]]]:
    """Return the examples of all splits and count them; DataError if none is left to train on."""
    train = tokenize_rows(train_rows, tokenizer, config, report)
    evaluation = {name: tokenize_rows(rows, tokenizer, config, report) for name, rows in eval_rows.items()}
    if not train:
        raise DataError(
            f"dataset {config.dataset}: no training example is left of {len(train_rows)} rows; no answer begins within "
            f"--context_length {config.context_length}: raise it"
        )
    report.num_examples = len(train)
    report.num_eval_examples = sum(map(len, evaluation.values()))
    report.num_tokens = sum(len(example.input_ids) for example in train)
    report.num_targets = sum(num_targets(example) for example in train)
    return train, {name: examples for name, examples in evaluation.items() if examples}


def hold_out(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into training and evaluation rows.

    A share above 0 holds out at least one row and leaves at least one, where there are two; at most MAX_EVAL_ROWS.
    """
    if share <= 0 or len(rows) < 2:
        return rows, []
    num_eval = min(max(1, round(len(rows) * share)), MAX_EVAL_ROWS, len(rows) - 1)
    held_out = set(np.random.default_rng(seed).permutation(len(rows))[:num_eval].tolist())
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [row for i, row in enumerate(rows) if i in held_out]


def tokenize_rows(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, config: RowSettings, report: DataReport
) -> list[Example]:
    """Tokenise rows and cut them to context_length; examples without a target are dropped and counted.

    Raises:
        DataError: a conversation that the chat template cannot render (unless such rows are skipped), or no template.
    """
    if not rows:
        return []
    renderer = make_renderer(rows, tokenizer)
    control_tokens = renderer.control_tokens if renderer else special_tokens(tokenizer)
    encoder = Encoder(tokenizer, control_tokens, config.train_on)
    examples: list[Example] = []
    for start in range(0, len(rows), ENCODE_BATCH):
        documents: list[Document] = []
        places: list[str] = []
        for row in rows[start : start + ENCODE_BATCH]:
            try:
                documents.append(to_document(row, renderer))
                places.append(row.where)
            except DataError as error:
                report.reject(row.where, str(error))
        for where, example in zip(places, encoder.encode(documents), strict=True):
            if isinstance(example, DataError):
                report.reject(where, str(example))
                continue
            report.lengths.append(len(example.input_ids))
            if num_targets(cut := truncate(example, config.context_length)):
                report.num_truncated += cut is not example
                examples.append(cut)
            else:
                report.drop(where)
    return examples


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


def truncate(example: Example, context_length: int) -> Example:
    """Return the first context_length tokens; the example itself if it is no longer."""
    if len(example.input_ids) <= context_length:
        return example
    return Example(example.input_ids[:context_length], example.labels[:context_length])


def num_targets(example: Example) -> int:
    """Return how many tokens count in the loss; nothing predicts the first one."""
    return len(example.labels) - 1 - example.labels[1:].count(IGNORE)


def check_vocabulary(examples: Sequence[Example], vocab_size: int) -> None:
    """Raise DataError if a token has no row in the embedding; looking it up would fail late, or give zeros."""
    largest = max(max(example.input_ids) for example in examples)
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer makes token {largest} of this data, and the model has {vocab_size} tokens;"
            " tokenizer files and config.json do not belong together: download the model again"
        )

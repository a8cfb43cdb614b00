"""From the settings to training and evaluation examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config.data import DataSettings, named_datasets, training_datasets, weights_of
from fsdp_qlora.data.cache import load_store
from fsdp_qlora.data.report import DataReport
from fsdp_qlora.data.store import Mixture, TokenStore, rounds_of
from fsdp_qlora.errors import DataError

MAX_EVAL_ROWS = 1000


@dataclass(frozen=True)
class Splits:
    """The data of a run."""

    train: Mixture
    evaluation: dict[str, TokenStore]
    """By the name of the set; '' for the one of --eval_dataset without a name, or held out by --eval_split."""

    report: DataReport


def load_splits(config: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Splits:
    """Read, check and tokenise the datasets of a run.

    The result depends on the settings, files and tokenizer only, so every rank gets the same. Examples have at most
    context_length tokens and the order of the file; sets without any are left out.

    Raises:
        DataError: a dataset or row that cannot be used, or a dataset without a training example left.
    """
    report = DataReport(bad_rows=config.bad_rows)
    datasets = training_datasets(config)
    stores = [load_store(dataset, config, tokenizer, report) for dataset in datasets]
    if config.eval_dataset is None:
        pairs = [hold_out(store, config.eval_split, config.seed) for store in stores]
        stores = [train for train, _ in pairs]
        evaluation = {"": join([held_out for _, held_out in pairs])}
    else:
        named = named_datasets(config.eval_dataset)
        evaluation = {name: load_store(dataset, config, tokenizer, report) for name, dataset in named.items()}
    weights = weights_of(config)
    for dataset, store, weight in zip(datasets, stores, weights, strict=True):
        if not len(store):
            raise DataError(
                f"dataset {dataset}: no training example is left; no answer begins within "
                f"--context_length {config.context_length}: raise it"
            )
        if not any(rounds_of(len(store), weight)):
            raise DataError(
                f"dataset {dataset}: its weight {weight:g} of {len(store)} examples rounds to none; give it a greater one"
                " in --dataset_weights, or leave it out of --dataset"
            )
    report.num_examples = sum(map(len, stores))
    report.num_eval_examples = sum(map(len, evaluation.values()))
    report.num_tokens = sum(int(store.lengths.sum()) for store in stores)
    report.num_targets = sum(int(store.num_targets.sum()) for store in stores)
    evaluation = {name: store for name, store in evaluation.items() if len(store)}
    return Splits(Mixture(stores, weights), evaluation, report)


def hold_out(store: TokenStore, share: float, seed: int) -> tuple[TokenStore, TokenStore]:
    """Split examples into those to train on and those to evaluate on.

    A share above 0 holds out at least one example and leaves at least one, where there are two; at most MAX_EVAL_ROWS.
    """
    if share <= 0 or len(store) < 2:
        return store, store.select(np.array([], dtype=np.int64))
    num_eval = min(max(1, round(len(store) * share)), MAX_EVAL_ROWS, len(store) - 1)
    held_out = np.sort(np.random.default_rng(seed).permutation(len(store))[:num_eval])
    return store.select(np.setdiff1d(np.arange(len(store)), held_out)), store.select(held_out)


def join(stores: list[TokenStore]) -> TokenStore:
    """Return the examples of several stores as one, in memory unless there is only one."""
    if len(stores) == 1:
        return stores[0]
    return TokenStore.from_examples(store[i] for store in stores for i in range(len(store)))


def check_vocabulary(store: TokenStore, vocab_size: int) -> None:
    """Raise DataError if a token has no row in the embedding; looking it up would fail late, or give zeros."""
    largest = store.largest_id
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer makes token {largest} of this data, and the model has {vocab_size} tokens;"
            " tokenizer files and config.json do not belong together: download the model again"
        )

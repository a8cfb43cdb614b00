"""Tokenised datasets in files: used again, never when something that matters has changed, and made by one process only."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fsdp_qlora import announce
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data import DataReport, Example, Loader, Mixture, TokenStore, cache, load_splits, store
from fsdp_qlora.data.loader import group_by_length
from fsdp_qlora.errors import DataError
from tests.ranks import run_ranks
from tests.unit.data.families import tiny_tokenizer
from tests.unit.data.test_splits import chat, write

EXAMPLES = [Example([n + 1] * n, [-100] + [n + 1] * (n - 1)) for n in (3, 1, 5, 2)]


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    return write(tmp_path / "rows.jsonl", [chat(f"question {i}", "answer " * (i + 1)) for i in range(20)])


def settings(dataset: str, folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(dataset=dataset, eval_split=0.0, token_cache=str(folder / "cache"), **changes)


def load(config: TrainConfig, family: str = "chatml") -> tuple[list[Example], DataReport]:
    splits = load_splits(config, tiny_tokenizer(family))
    return [example for part in splits.train.stores for example in part], splits.report


def test_files_hold_what_memory_holds(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CHUNK_EXAMPLES", 7)
    config = settings(dataset, tmp_path, context_length=64)
    first, report = load(config)
    again, same_report = load(config)
    in_memory = dataclasses.replace(config, token_cache="none")
    plain, plain_report = load(in_memory)
    assert first == again == plain
    digests = [load_splits(one, tiny_tokenizer("chatml")).train.digest() for one in (config, in_memory)]
    assert digests[0] == digests[1], "a run goes on whatever --token_cache says"
    assert report == same_report == plain_report
    assert report.num_truncated > 0


def test_long_readings_say_how_far_they_are(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(announce, "INTERVAL_S", 0.0)
    load(settings(dataset, tmp_path))
    assert f"reading {dataset}: 19 rows, 0 s so far" in capsys.readouterr().err


def test_the_second_run_reads_no_rows(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(dataset, tmp_path)
    first, _ = load(config)
    monkeypatch.setattr(cache, "rows_of", lambda *args, **kwargs: pytest.fail("rows are read again"))
    assert load(config)[0] == first
    with pytest.raises(pytest.fail.Exception):
        load(dataclasses.replace(config, context_length=1024))


@pytest.mark.parametrize(
    "changes",
    [
        {"context_length": 100},
        {"train_on": "all"},
        {"bad_rows": "skip"},
        {"dataset_format": "messages"},
        {"dataset": "demo"},
        {"dataset": "demo", "seed": 1},
    ],
)
def test_settings_that_matter_are_in_the_key(dataset: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    before, after = settings(dataset, tmp_path), dataclasses.replace(settings(dataset, tmp_path), **changes)
    keys = {cache.cache_key(config.dataset, config, tiny_tokenizer("chatml")) for config in (before, after)}
    assert len(keys) == 2


def test_rows_and_tokenizer_are_in_the_key(dataset: str, tmp_path: Path) -> None:
    config = settings(dataset, tmp_path)
    keys = [cache.cache_key(dataset, config, tiny_tokenizer(family)) for family in ("chatml", "llama3", "chatml")]
    tokenizer = tiny_tokenizer("chatml")
    template, tokenizer.chat_template = tokenizer.chat_template, "{{ messages }}"
    try:
        keys.append(cache.cache_key(dataset, config, tokenizer))
    finally:
        tokenizer.chat_template = template
    path = Path(dataset)
    path.write_text(path.read_text().replace("question 7", "question 8"))
    keys.append(cache.cache_key(dataset, config, tokenizer))
    assert keys[0] == keys[2]
    assert len(set(keys)) == 4


def test_a_bad_row_leaves_nothing_to_be_taken_for_the_dataset(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(chat("q", "a")) + "\nbroken\n")
    config = settings(str(path), tmp_path)
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows\.jsonl:2: invalid JSON"):
            load(config)


@pytest.mark.parametrize("name", ["input_ids.bin", "is_target.bin", "starts.npy", "num_targets.npy", "meta.json"])
def test_files_that_are_cut_short(dataset: str, tmp_path: Path, name: str) -> None:
    config = settings(dataset, tmp_path)
    load(config)
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"damaged tokens.*delete this folder"):
        load(config)
    shutil.rmtree(path.parent)
    load(config)


def test_a_cache_that_cannot_be_written(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"token_cache=.*cannot be used.*none to keep tokens in memory"):
        load(settings(dataset, tmp_path))


def tokenise_together(dataset: str, folder: Path) -> tuple[int, int]:
    examples, report = load(settings(dataset, folder))
    return len(examples), report.num_rows


def test_many_ranks_starting_at_once(dataset: str, tmp_path: Path) -> None:
    assert run_ranks(tokenise_together, 4, dataset, tmp_path) == [(20, 20)] * 4
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert not folder.name.endswith(".partial")


def test_examples_go_to_the_files_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never are more in memory than a chunk."""
    monkeypatch.setattr(store, "CHUNK_EXAMPLES", 2)
    pulled, chunks = 0, []

    def examples() -> Iterator[Example]:
        nonlocal pulled
        for example in EXAMPLES:
            pulled += 1
            yield example

    class Spy(TokenStore):
        @classmethod
        def from_examples(cls, examples: Iterable[Example]) -> TokenStore:
            chunks.append((pulled, len(list(examples))))
            return TokenStore.from_examples(examples)

    with monkeypatch.context() as patched:
        patched.setattr(store, "TokenStore", Spy)
        store.write_store(tmp_path / "store", examples(), lambda: {"seen": pulled})
    assert chunks == [(2, 2), (4, 2)]
    opened = TokenStore.open(tmp_path / "store")
    assert list(opened) == EXAMPLES
    assert isinstance(opened.tokens(0)[0].base, np.memmap)
    assert store.read_meta(tmp_path / "store")["seen"] == 4
    assert opened.largest_id == 6


def test_selected_examples() -> None:
    whole = TokenStore.from_examples(EXAMPLES)
    part = whole.select(np.array([2, 0]))
    assert list(part) == [EXAMPLES[2], EXAMPLES[0]]
    assert list(part.select(np.array([1]))) == [EXAMPLES[0]]
    assert part.lengths.tolist() == [5, 3]
    assert part.num_targets.tolist() == [4, 2]
    assert part.digest != whole.digest != TokenStore.from_examples(EXAMPLES[:3]).digest
    assert whole.digest == TokenStore.from_examples(EXAMPLES).digest


def test_weights_of_datasets(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(10)]) for name in "abc"]
    config = settings(",".join(paths), tmp_path, dataset_weights="1,0.3,2.5")
    tokenizer = tiny_tokenizer("chatml")
    splits = load_splits(config, tokenizer)
    common = {"batch_size": 2, "gradient_accumulation_steps": 1, "context_length": 16, "packing": False, "seed": 3}
    loaders = [Loader(splits.train, rank=r, world_size=2, shuffle=True, pad_token_id=0, **common) for r in (0, 1)]
    seen = []
    for epoch in (0, 1):
        batches = [b for loader in loaders for i in range(loader.num_steps(epoch)) for b in loader.step(epoch, i)]
        ids = [row[: row.index(tokenizer.eos_token_id)] for b in batches for row in b.input_ids.tolist() if any(row)]
        seen.append([tokenizer.decode(row) for row in ids])
        counts = {name: sum(text.startswith(name) for text in seen[-1]) for name in "abc"}
        assert counts == {"a": 10, "b": 3, "c": 25}
        assert {seen[-1].count(f"c {i}") for i in range(10)} == {2, 3}
        assert {seen[-1].count(f"a {i}") for i in range(10)} == {1}
    assert sorted(seen[0]) != sorted(seen[1]), "another part of b every epoch"
    assert loaders[0].stats().num_examples == 38
    unweighted = Loader(Mixture(splits.train.stores), rank=0, world_size=2, shuffle=True, pad_token_id=0, **common)
    assert loaders[0].digest() != unweighted.digest()


def test_weights_that_leave_nothing(dataset: str, tmp_path: Path) -> None:
    for datasets, weights in ((dataset, "0.02"), (f"demo,{dataset}", "1,0.02")):
        with pytest.raises(DataError, match=r"rows\.jsonl: its weight 0\.02 of 20 examples rounds to none"):
            load(settings(datasets, tmp_path, dataset_weights=weights))


def test_alike_lengths_come_near_each_other() -> None:
    lengths = np.random.default_rng(0).integers(1, 2000, size=9000)
    order = np.random.default_rng(1).permutation(9000)
    grouped = group_by_length(order, lengths, np.random.default_rng(2))
    assert sorted(grouped) == sorted(order)

    def padding(indices: np.ndarray) -> float:
        groups = [lengths[indices[i : i + 8]] for i in range(0, 9000, 8)]
        return 1 - lengths.sum() / sum(len(group) * group.max() for group in groups)

    assert padding(order) > 0.4
    assert padding(grouped) < 0.04
    assert abs(np.corrcoef(np.arange(9000), lengths[grouped])[0, 1]) < 0.1, "not from short to long"

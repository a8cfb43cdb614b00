"""Batches: each example once, the same order for every number of ranks, documents kept apart."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from fsdp_qlora import data
from fsdp_qlora.config import DataConfig
from fsdp_qlora.data.loader import Batch, Loader
from fsdp_qlora.data.packing import pack
from fsdp_qlora.data.tokenize import IGNORE, Example
from fsdp_qlora.run_folder import Progress
from fsdp_qlora.trainer import count_steps
from tests.unit.data.families import tiny_tokenizer

PAD = 7
CONTEXT = 64


def make_examples(number: int, seed: int = 0) -> list[Example]:
    """Return examples of random lengths: tokens encode the example, the first half (and id PAD once) is no target."""
    random = np.random.default_rng(seed)
    examples = []
    for i in range(number):
        ids = [1000 * (i + 1) + t for t in range(int(random.integers(2, 50)))]
        ids[-1] = PAD  # the end token may be the pad token: it stays a target
        half = len(ids) // 2
        examples.append(Example(ids, [IGNORE] * half + ids[half:]))
    return examples


def make_loader(examples: list[Example], **settings: Any) -> Loader:
    defaults: dict[str, Any] = {
        "batch_size": 2,
        "gradient_accumulation_steps": 3,
        "context_length": CONTEXT,
        "packing": True,
        "rank": 0,
        "world_size": 1,
        "seed": 5,
        "shuffle": True,
        "pad_token_id": PAD,
    }
    return Loader(examples, **(defaults | settings))


def documents(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """Cut a batch at its boundaries: (tokens, labels, positions) of each document, padding included."""
    bounds = batch.cu_seqlens.tolist()
    flat = [batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist(), batch.position_ids.flatten().tolist()]
    return [(flat[0][a:b], flat[1][a:b], flat[2][a:b]) for a, b in itertools.pairwise(bounds)]


def epoch_of(loaders: list[Loader], epoch: int) -> list[Batch]:
    """Return the micro-batches of all ranks in global order."""
    steps = {loader.num_steps(epoch) for loader in loaders}
    assert len(steps) == 1
    batches = []
    for index in range(steps.pop()):
        per_rank = [loader.step(epoch, index) for loader in loaders]
        batches += [micro for micros in zip(*per_rank, strict=True) for micro in micros]
    return batches


def is_padding(document: tuple[list[int], list[int], list[int]]) -> bool:
    return set(document[0]) == {PAD} and set(document[1]) == {IGNORE}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("number", [1, 2, 37, 100])
def test_global_order_does_not_depend_on_ranks_or_batches(number: int, packing: bool) -> None:
    examples = make_examples(number)
    layouts = [(1, 1, 1), (2, 1, 3), (4, 2, 2), (3, 2, 1)]  # world, batch, accumulation
    orders = []
    for world, batch_size, accumulation in layouts:
        loaders = [
            make_loader(
                examples,
                packing=packing,
                rank=rank,
                world_size=world,
                batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
            )
            for rank in range(world)
        ]
        batches = epoch_of(loaders, 0)
        assert all(batch.input_ids.shape[0] == batch_size for batch in batches)
        orders.append([tuple(d[0]) for batch in batches for d in documents(batch) if not is_padding(d)])
    assert all(order == orders[0] for order in orders)
    assert sorted(orders[0]) == sorted(tuple(example.input_ids) for example in examples)


def test_a_rank_s_sequences_are_where_the_contract_says() -> None:
    examples = make_examples(60)
    every = epoch_of([make_loader(examples, batch_size=1, gradient_accumulation_steps=1)], 0)
    world, batch_size, accumulation = 2, 2, 3
    for rank in range(world):
        loader = make_loader(
            examples, rank=rank, world_size=world, batch_size=batch_size, gradient_accumulation_steps=accumulation
        )
        for index in range(loader.num_steps(0) - 1):
            for m, batch in enumerate(loader.step(0, index)):
                first = (index * accumulation + m) * world * batch_size + rank * batch_size
                wanted = torch.cat([every[first + b].input_ids for b in range(batch_size)])
                assert torch.equal(batch.input_ids, wanted)


@pytest.mark.parametrize("packing", [True, False])
def test_documents_are_kept_apart(packing: bool) -> None:
    examples = {tuple(example.input_ids): example for example in make_examples(50)}
    for batch in epoch_of([make_loader(list(examples.values()), packing=packing)], 0):
        rows, length = batch.input_ids.shape
        assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.labels.shape == batch.position_ids.shape == (rows, length)
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0
        assert bounds[-1] == rows * length
        assert set(range(0, rows * length + 1, length)) <= set(bounds)
        assert batch.max_seqlen == max(b - a for a, b in itertools.pairwise(bounds))
        assert batch.num_targets == int((batch.labels != IGNORE).sum())
        for document in documents(batch):
            tokens, labels, positions = document
            assert positions == list(range(len(tokens)))
            assert labels[-1] == IGNORE
            if not is_padding(document):
                assert labels[:-1] == examples[tuple(tokens)].labels[1:]


def test_the_end_token_stays_a_target_when_it_is_the_pad_token() -> None:
    (batch,) = make_loader(make_examples(1), gradient_accumulation_steps=1, batch_size=1).step(0, 0)
    assert PAD in batch.labels


def test_row_lengths() -> None:
    examples = [Example([1] * n, [1] * n) for n in (3, 9, 17, 64)]
    settings: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 2, "shuffle": False}
    packed = make_loader(examples, **settings).step(0, 0)
    assert [batch.input_ids.shape for batch in packed] == [(2, 64), (2, 64)]
    padded = make_loader(examples, packing=False, **settings).step(0, 0)
    assert [batch.input_ids.shape for batch in padded] == [(2, 16), (2, 64)]
    short_context = make_loader(examples[:2], packing=False, context_length=10, **settings).step(0, 0)
    assert short_context[0].input_ids.shape == (2, 10)


def test_rows_are_equally_long_on_all_ranks() -> None:
    examples = [Example([1] * n, [1] * n) for n in (3, 40, 9, 5)]
    settings: dict[str, Any] = {"batch_size": 1, "gradient_accumulation_steps": 2, "shuffle": False, "packing": False}
    steps = [make_loader(examples, rank=rank, world_size=2, **settings).step(0, 0) for rank in range(2)]
    assert [[batch.input_ids.shape[1] for batch in step] for step in steps] == [[40, 16], [40, 16]]


@pytest.mark.parametrize("packing", [True, False])
def test_fewer_rows_than_ranks(packing: bool) -> None:
    """T1: one row for four ranks: all ranks run the same micro-batches, three of them on padding only."""
    example = Example([11, 12, 13], [IGNORE, 12, 13])
    loaders = [make_loader([example], packing=packing, rank=rank, world_size=4) for rank in range(4)]
    steps = [loader.step(0, 0) for loader in loaders]
    assert [loader.num_steps(0) for loader in loaders] == [1] * 4
    assert [len(step) for step in steps] == [3] * 4
    assert [sum(batch.num_targets for batch in step) for step in steps] == [2, 0, 0, 0]
    assert all(batch.input_ids.shape[0] == 2 for step in steps for batch in step)


def test_steps_can_be_read_in_any_order() -> None:
    """R4: (epoch, index) is all the state there is, also across an epoch's end."""
    examples = make_examples(80)
    straight = make_loader(examples)
    places = [(epoch, index) for epoch in range(3) for index in range(straight.num_steps(epoch))]
    stream = {place: straight.step(*place) for place in places}
    resumed = make_loader(examples)
    for place in reversed(places):
        for batch, wanted in zip(resumed.step(*place), stream[place], strict=True):
            assert torch.equal(batch.input_ids, wanted.input_ids)
            assert torch.equal(batch.cu_seqlens, wanted.cu_seqlens)


def test_epochs_and_seeds_shuffle_differently() -> None:
    examples = make_examples(40)

    def order(seed: int, epoch: int, shuffle: bool = True) -> list[tuple[int, ...]]:
        batches = epoch_of([make_loader(examples, seed=seed, shuffle=shuffle, packing=False)], epoch)
        return [tuple(d[0]) for batch in batches for d in documents(batch) if not is_padding(d)]

    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert order(1, 0) == order(1, 0)
    assert order(1, 0, shuffle=False) == order(2, 1, shuffle=False) == [tuple(e.input_ids) for e in examples]


def test_steps_out_of_range() -> None:
    loader = make_loader(make_examples(5))
    with pytest.raises(IndexError, match="which has 1 steps"):
        loader.step(0, 1)
    empty = make_loader([])
    assert empty.num_steps(0) == 0
    assert empty.stats().num_sequences == 0


def test_stats() -> None:
    examples = [Example([1] * n, [IGNORE, *[1] * (n - 1)]) for n in (32, 32, 64, 16)]
    packed = make_loader(examples, shuffle=False, batch_size=1, gradient_accumulation_steps=1).stats()
    assert (packed.num_examples, packed.num_tokens, packed.num_targets) == (4, 144, 140)
    assert (packed.num_sequences, packed.num_steps, packed.efficiency) == (3, 3, 144 / 192)
    padded = make_loader(examples, shuffle=False, packing=False).stats()
    assert (padded.num_sequences, padded.efficiency) == (4, 144 / 192)


def test_to_moves_every_tensor() -> None:
    (batch, *_) = make_loader(make_examples(5)).step(0, 0)
    moved = batch.to("meta")
    assert {getattr(moved, name).device.type for name in ("input_ids", "labels", "position_ids", "cu_seqlens")} == {
        "meta"
    }
    assert (moved.max_seqlen, moved.num_targets) == (batch.max_seqlen, batch.num_targets)


def test_padding_has_a_row_in_the_embedding() -> None:
    """A pad token added to a tokenizer is mostly the first number after the embedding's last row."""
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    assert end < pad

    def padding(vocab_size: int | None) -> int:
        made = data.make_loader(
            make_examples(1),
            DataConfig(dataset="demo", context_length=CONTEXT),
            tokenizer,
            rank=0,
            world_size=1,
            accumulation=1,
            vocab_size=vocab_size,
        )
        (batch,) = made.step(0, 0)
        return int(batch.input_ids[0, -1])

    assert [padding(size) for size in (None, pad + 1, pad, end)] == [pad, pad, end, 0]


def test_counting_the_steps_of_all_epochs_shows_life_and_leaves_the_first_epoch_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed: list[int] = []

    def noted(*arguments: Any) -> Any:
        packed.append(progress.beats)
        return pack(*arguments)

    monkeypatch.setattr("fsdp_qlora.data.loader.pack", noted)
    progress, loader = Progress(), make_loader(make_examples(60), batch_size=1, gradient_accumulation_steps=1)
    counted = count_steps(loader, range(1, 4), progress)
    assert packed == [1, 2, 3], "a beat before each epoch"
    loader.step(1, 0)
    assert packed == [1, 2, 3], "kept since it was counted"
    assert counted == sum(loader.num_steps(epoch) for epoch in (1, 2, 3))

"""Packing: nothing lost, nothing too long, little wasted."""

from __future__ import annotations

import numpy as np
import pytest

from fsdp_qlora.data.packing import NUM_OPEN_SEQUENCES, Sequences, packing_efficiency
from fsdp_qlora.data.packing import pack as sequence_of


def pack(lengths: list[int], context_length: int) -> list[list[int]]:
    """Return the documents of each sequence."""
    documents = np.arange(len(lengths))
    sequences = Sequences(documents, sequence_of(np.array(lengths, dtype=np.int64), context_length))
    return [row.tolist() for row in sequences.rows(0, len(sequences))]


@pytest.mark.parametrize("seed", range(20))
def test_every_document_once_and_no_sequence_too_long(seed: int) -> None:
    random = np.random.default_rng(seed)
    context_length = int(random.integers(1, 300))
    lengths = random.integers(1, context_length + 1, size=int(random.integers(0, 3000))).tolist()
    sequences = pack(lengths, context_length)
    assert sorted(i for sequence in sequences for i in sequence) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in sequence) <= context_length for sequence in sequences)
    assert pack(lengths, context_length) == sequences
    assert [sequence[0] for sequence in sequences] == sorted(sequence[0] for sequence in sequences)


def test_best_fit_chooses_the_fullest_that_has_room() -> None:
    assert pack([5, 8, 6, 2, 5, 4], 10) == [[0, 4], [1, 3], [2, 5]]


def test_mixed_lengths_fill_sequences() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 20_000).astype(int) + 1, 2048).tolist()
    assert packing_efficiency(lengths, len(pack(lengths, 2048)), 2048) > 0.98


def test_few_sequences_wait_at_a_time() -> None:
    """A document never joins a sequence that was opened long before it, so the order stays shuffled."""
    halves = [6] * (2 * NUM_OPEN_SEQUENCES)  # two never fit together
    sequences = pack([*halves, 4], 10)
    assert len(sequences) == len(halves)
    assert [len(halves)] == [i for sequence in sequences for i in sequence[1:]]
    assert next(i for i, sequence in enumerate(sequences) if len(sequence) == 2) >= NUM_OPEN_SEQUENCES


def test_efficiency() -> None:
    assert packing_efficiency([5, 5, 6], 2, 10) == 0.8
    assert packing_efficiency([], 0, 10) == 1.0

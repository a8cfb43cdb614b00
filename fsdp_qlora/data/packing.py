"""Packing: which documents share a sequence."""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

NUM_OPEN_SEQUENCES = 512
"""Sequences that wait for a document that fits; more waste less and mix the order over a longer stretch."""


class Sequences:
    """Which examples each sequence of an epoch holds; a few bytes an example, as there may be many millions.

    Args:
        examples: in the order in which sequences take them.
        sequence_of: the sequence of each, from 0 without a gap.
    """

    def __init__(self, examples: Indices, sequence_of: Indices) -> None:
        self.examples = examples[np.argsort(sequence_of, kind="stable")]
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(sequence_of))])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def rows(self, first: int, number: int) -> list[Indices]:
        """Return the examples of each of so many sequences, or of as many as there are."""
        bounds = self._starts[first : first + number + 1]
        return [self.examples[start:end] for start, end in itertools.pairwise(bounds)]

    def sums(self, values: Indices) -> Indices:
        """Return each sequence's sum of a value that every example has."""
        totals = np.concatenate([[0], np.cumsum(values[self.examples])])
        sums: Indices = np.diff(totals[self._starts])
        return sums


def pack(lengths: Indices, context_length: int) -> Indices:
    """Group documents into sequences of at most context_length tokens.

    Best fit in one pass: each document, in the given order, goes into the open sequence it leaves the least room in,
    or opens a new one; with too many open, the fullest is closed. Cost: O(log NUM_OPEN_SEQUENCES) a document.

    Args:
        lengths: tokens of each document, 1 to context_length.
        context_length: tokens of a sequence.

    Returns:
        The sequence of each document, numbered from 0 in the order in which they were opened. The result depends on the
        arguments only.
    """
    sequence_of = array("q")
    num_sequences = 0
    open_by_room: list[tuple[int, int]] = []  # (free tokens, sequence), sorted
    for document, length in enumerate(lengths.data):  # a list would hold an object for every document
        assert 0 < length <= context_length, f"document {document} has {length} tokens, context is {context_length}"
        best = bisect_left(open_by_room, (length, -1))
        if best < len(open_by_room):
            room, sequence = open_by_room.pop(best)
        else:
            room, sequence = context_length, num_sequences
            num_sequences += 1
            if len(open_by_room) == NUM_OPEN_SEQUENCES:
                open_by_room.pop(0)
        sequence_of.append(sequence)
        if room > length:
            insort(open_by_room, (room - length, sequence))
    return np.array(sequence_of, dtype=np.int64)


def packing_efficiency(lengths: Sequence[int] | Indices, num_sequences: int, context_length: int) -> float:
    """Return the share of the sequences' positions that hold a token of a document; 1.0 without sequences."""
    return sum(lengths) / (num_sequences * context_length) if num_sequences else 1.0

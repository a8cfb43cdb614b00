"""Packing: which documents share a sequence."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

NUM_OPEN_SEQUENCES = 512
"""Sequences that wait for a document that fits; more waste less and mix the order over a longer stretch."""


def pack(lengths: Sequence[int], context_length: int) -> list[list[int]]:
    """Group documents into sequences of at most context_length tokens.

    Best fit in one pass: each document, in the given order, goes into the open sequence it leaves the least room in,
    or opens a new one; with too many open, the fullest is closed. Cost: O(log NUM_OPEN_SEQUENCES) a document.

    Args:
        lengths: tokens of each document, 1 to context_length.
        context_length: tokens of a sequence.

    Returns:
        One list of indices into lengths per sequence, in the order in which sequences were opened; every index is
        there once. The result depends on the arguments only.
    """
    sequences: list[list[int]] = []
    open_by_room: list[tuple[int, int]] = []  # (free tokens, sequence), sorted
    for document, length in enumerate(lengths):
        assert 0 < length <= context_length, f"document {document} has {length} tokens, context is {context_length}"
        best = bisect_left(open_by_room, (length, -1))
        if best < len(open_by_room):
            room, sequence = open_by_room.pop(best)
            sequences[sequence].append(document)
        else:
            room, sequence = context_length, len(sequences)
            sequences.append([document])
            if len(open_by_room) == NUM_OPEN_SEQUENCES:
                open_by_room.pop(0)
        if room > length:
            insort(open_by_room, (room - length, sequence))
    return sequences


def packing_efficiency(lengths: Sequence[int], num_sequences: int, context_length: int) -> float:
    """Return the share of the sequences' positions that hold a token of a document; 1.0 without sequences."""
    return sum(lengths) / (num_sequences * context_length) if num_sequences else 1.0

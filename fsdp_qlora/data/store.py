"""Tokenised examples as flat arrays, in memory or mapped from files, so that a dataset need not fit into RAM."""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fsdp_qlora.data.tokenize import IGNORE, Example

CHUNK_EXAMPLES = 1000
"""Examples that are written to files at once."""

_IDS, _TARGETS, _STARTS, _COUNTS, _META = "input_ids.bin", "is_target.bin", "starts.npy", "num_targets.npy", "meta.json"

Indices = npt.NDArray[np.int64]


class TokenStore:
    """A sequence of examples.

    Args:
        input_ids, is_target: int32 and bool [tokens], of all examples one after the other; is_target as Example.labels says.
        starts: int64 [examples + 1], where each begins.
        num_targets: int64 [examples], tokens that count in the loss.
        chosen: which examples belong to this store; default: all.
        digest, largest_id: checksum of the arrays and largest token, where they are known.
    """

    def __init__(
        self,
        input_ids: npt.NDArray[np.int32],
        is_target: npt.NDArray[np.bool_],
        starts: Indices,
        num_targets: Indices,
        *,
        chosen: Indices | None = None,
        digest: str | None = None,
        largest_id: int | None = None,
    ) -> None:
        self._input_ids, self._is_target, self._starts, self._num_targets = input_ids, is_target, starts, num_targets
        self._chosen = np.arange(len(num_targets)) if chosen is None else chosen
        self._digest, self._largest_id = digest, largest_id

    @classmethod
    def from_examples(cls, examples: Iterable[Example]) -> TokenStore:
        """Return a store in memory."""
        ids, flags, lengths, counts = array("i"), array("b"), [0], []
        for example in examples:
            ids.extend(example.input_ids)
            flags.extend(label != IGNORE for label in example.labels)
            lengths.append(len(example.input_ids))
            counts.append(_count_targets(example))
        return cls(
            np.array(ids, dtype=np.int32),
            np.array(flags, dtype=np.bool_),
            np.cumsum(lengths, dtype=np.int64),
            np.array(counts, dtype=np.int64),
        )

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Return the store of a folder that `write_store` has made; its tokens stay in the files."""
        starts, num_targets = np.load(folder / _STARTS), np.load(folder / _COUNTS)
        shape = (int(starts[-1]),)
        if not shape[0]:
            return cls.from_examples([])
        ids = np.memmap(folder / _IDS, dtype=np.int32, mode="r", shape=shape)
        flags = np.memmap(folder / _TARGETS, dtype=np.bool_, mode="r", shape=shape)
        meta = read_meta(folder)
        return cls(ids, flags, starts, num_targets, digest=meta["digest"], largest_id=meta["largest_id"])

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, i: int) -> Example:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        ids, flags = self.tokens(i)
        return Example(ids.tolist(), np.where(flags, ids, IGNORE).tolist())

    def tokens(self, i: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Return the token ids of an example, and which are targets."""
        start, end = self._starts[self._chosen[i]], self._starts[self._chosen[i] + 1]
        return self._input_ids[start:end], self._is_target[start:end]

    @cached_property
    def lengths(self) -> Indices:
        """Tokens of each example."""
        lengths: Indices = np.diff(self._starts)[self._chosen]
        return lengths

    @property
    def num_targets(self) -> Indices:
        """Tokens of each example that count in the loss; nothing predicts the first one."""
        return self._num_targets[self._chosen]

    @property
    def largest_id(self) -> int:
        """The largest token id, of the examples that were not chosen too."""
        return int(self._input_ids.max(initial=0)) if self._largest_id is None else self._largest_id

    @cached_property
    def digest(self) -> str:
        """A checksum of the examples."""
        whole = self._digest or "".join(map(_checksum, (self._input_ids, self._is_target, self._starts)))
        return hashlib.sha256(whole.encode() + self._chosen.tobytes()).hexdigest()

    def select(self, indices: Indices) -> TokenStore:
        """Return the store of some of the examples; the tokens are shared."""
        chosen = self._chosen[indices]
        return TokenStore(
            self._input_ids,
            self._is_target,
            self._starts,
            self._num_targets,
            chosen=chosen,
            digest=self._digest,
            largest_id=self._largest_id,
        )


def write_store(folder: Path, examples: Iterable[Example], meta: Callable[[], dict[str, Any]]) -> None:
    """Write examples to a new folder as they come, and beside them what `meta()` returns when all have come."""
    folder.mkdir(parents=True)
    starts, counts = array("q", [0]), array("q")
    ids_digest, targets_digest, largest_id = hashlib.sha256(), hashlib.sha256(), 0
    iterator = iter(examples)
    with (folder / _IDS).open("wb") as ids_file, (folder / _TARGETS).open("wb") as targets_file:
        while chunk := list(itertools.islice(iterator, CHUNK_EXAMPLES)):
            part = TokenStore.from_examples(chunk)
            for values, file, running in (
                (part._input_ids, ids_file, ids_digest),
                (part._is_target, targets_file, targets_digest),
            ):
                file.write(values.tobytes())
                running.update(values.tobytes())
            largest_id = max(largest_id, part.largest_id)
            starts.extend((part._starts[1:] + starts[-1]).tolist())
            counts.extend(part._num_targets.tolist())
    np.save(folder / _STARTS, np.array(starts, dtype=np.int64))
    np.save(folder / _COUNTS, np.array(counts, dtype=np.int64))
    # as TokenStore.digest has it, so that a run can go on with its tokens in memory
    digest = ids_digest.hexdigest() + targets_digest.hexdigest() + _checksum(np.array(starts))
    content = {"digest": digest, "largest_id": largest_id, **meta()}
    (folder / _META).write_text(json.dumps(content), encoding="utf-8")


def read_meta(folder: Path) -> dict[str, Any]:
    """Return what `write_store` got as meta, and the digest."""
    meta: dict[str, Any] = json.loads((folder / _META).read_text(encoding="utf-8"))
    return meta


class Mixture:
    """Examples of several stores, numbered one store after the other, each seen `weight` times an epoch.

    A weight of 2.5 means: all of its examples twice, and a half of them, another one every epoch, a third time.
    """

    def __init__(self, stores: Sequence[TokenStore], weights: Sequence[float] = ()) -> None:
        self.stores = list(stores)
        self.weights = list(weights) or [1.0] * len(self.stores)
        self._firsts = np.cumsum([0, *map(len, self.stores)])
        self.lengths: Indices = np.concatenate([store.lengths for store in self.stores])
        self.num_targets: Indices = np.concatenate([store.num_targets for store in self.stores])

    def tokens(self, i: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Return the token ids of an example, and which are targets."""
        part = int(np.searchsorted(self._firsts, i, side="right")) - 1
        return self.stores[part].tokens(i - int(self._firsts[part]))

    def members(self, random: np.random.Generator) -> Indices:
        """Return the examples of an epoch, unshuffled."""
        found = []
        for first, store, weight in zip(self._firsts[:-1], self.stores, self.weights, strict=True):
            whole, rest = rounds_of(len(store), weight)
            found += [np.arange(len(store)) + first] * whole
            if rest:
                found.append(np.sort(random.permutation(len(store))[:rest]) + first)
        return np.concatenate(found).astype(np.int64)

    def digest(self) -> str:
        """Return a checksum of examples and weights."""
        return hashlib.sha256(repr([(store.digest, w) for store, w in self._pairs()]).encode()).hexdigest()

    def _pairs(self) -> list[tuple[TokenStore, float]]:
        return list(zip(self.stores, self.weights, strict=True))


def rounds_of(num_examples: int, weight: float) -> tuple[int, int]:
    """Return how often an epoch goes through all examples of a dataset, and through how many of them once more."""
    whole = int(weight)
    return whole, round((weight - whole) * num_examples)


def _count_targets(example: Example) -> int:
    """Return how many tokens count in the loss; nothing predicts the first one."""
    return len(example.labels) - 1 - example.labels[1:].count(IGNORE)


def _checksum(values: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()

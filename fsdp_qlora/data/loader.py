"""Batches for one rank: every step is computed from (epoch, index) alone, so resuming needs no other state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.packing import Sequences, pack, packing_efficiency
from fsdp_qlora.data.store import Indices, Mixture, TokenStore
from fsdp_qlora.data.tokenize import IGNORE, Example

GROUP, BLOCK = 4096, 64
"""See group_by_length."""

ROW_MULTIPLE = 8
"""Rows of unpacked batches are padded to a multiple of this, which matmul kernels like."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: B rows of T positions, each row a series of documents that fills it."""

    input_ids: torch.Tensor
    """[B, T] int64; padding holds pad_token_id."""

    labels: torch.Tensor
    """[B, T] int64, shifted: labels[b, t] is the target predicted at position t, -100 where there is none."""

    position_ids: torch.Tensor
    """[B, T] int64, from 0 in every document."""

    cu_seqlens: torch.Tensor
    """[n + 1] int32: where documents begin among the B * T positions, then B * T. A row's padding is a document."""

    max_seqlen: int
    """Tokens of the longest document, padding included."""

    num_targets: int
    """Labels that are not -100."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on device."""
        return Batch(
            self.input_ids.to(device),
            self.labels.to(device),
            self.position_ids.to(device),
            self.cu_seqlens.to(device),
            self.max_seqlen,
            self.num_targets,
        )


@dataclass(frozen=True)
class LoaderStats:
    """What one epoch holds, over all ranks."""

    num_examples: int
    num_tokens: int
    num_targets: int
    num_sequences: int
    num_steps: int
    efficiency: float
    """Share of the sequences' positions that hold tokens of examples."""


class LoaderSettings(Protocol):
    """The settings that make_loader reads, of whatever command."""

    @property
    def batch_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def packing(self) -> bool: ...
    @property
    def seed(self) -> int: ...


class Loader:
    """Deals tokenised examples to ranks and micro-batches.

    The order of an epoch is a permutation from (seed, epoch), the same for every number of ranks; packing runs on that
    order. One optimizer step takes the next batch_size x gradient_accumulation_steps x world_size sequences; rows
    missing at the end of an epoch are all padding without targets, so each example is seen exactly once an epoch, or as
    often as the weight of its dataset says. Without packing, examples of alike lengths come near each other.

    Args:
        examples: tokenised examples of 1 to context_length tokens.
        batch_size: rows of a micro-batch.
        gradient_accumulation_steps: micro-batches of a step.
        context_length: with packing the length of every row, without it the longest allowed.
        packing: several examples a row, or one.
        rank, world_size: which share of each step to return.
        seed, shuffle: shuffle=False keeps the order of examples.
        pad_token_id: token at positions without an example.
    """

    def __init__(
        self,
        examples: Iterable[Example] | Mixture,
        *,
        batch_size: int,
        gradient_accumulation_steps: int,
        context_length: int,
        packing: bool,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        pad_token_id: int,
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.batch_size = batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.context_length = context_length
        self.packing = packing
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.pad_token_id = pad_token_id
        self._examples = examples if isinstance(examples, Mixture) else Mixture([TokenStore.from_examples(examples)])
        self._lengths = self._examples.lengths
        assert ((self._lengths > 0) & (self._lengths <= context_length)).all(), "examples must fit the context"
        self._planned_epoch = -1
        self._sequences = Sequences(np.array([], dtype=np.int64), np.array([], dtype=np.int64))

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimizer step takes over all ranks."""
        return self.batch_size * self.gradient_accumulation_steps * self.world_size

    def digest(self) -> str:
        """Return a checksum of the examples and of all that decides their order, the same for every number of ranks."""
        digest = hashlib.sha256(repr((self.context_length, self.packing, self.seed, self.shuffle)).encode())
        digest.update(self._examples.digest().encode())
        return digest.hexdigest()[:16]

    def num_steps(self, epoch: int) -> int:
        """Return the optimizer steps of an epoch; with packing it can differ a little between epochs."""
        return -(-len(self._plan(epoch)) // self.sequences_per_step)

    def step(self, epoch: int, index: int) -> list[Batch]:
        """Return this rank's micro-batches of optimizer step `index` (from 0) of an epoch.

        Raises:
            IndexError: index is not below num_steps(epoch).
        """
        if not 0 <= index < self.num_steps(epoch):
            raise IndexError(f"step {index} of epoch {epoch}, which has {self.num_steps(epoch)} steps")
        sequences = self._plan(epoch)
        batches = []
        for micro in range(self.gradient_accumulation_steps):
            global_micro = index * self.gradient_accumulation_steps + micro
            first = global_micro * self.world_size * self.batch_size
            everyone = sequences.rows(first, self.world_size * self.batch_size)
            rows = everyone[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
            # the same on all ranks, which work in step with each other anyway, so that they can exchange equal pieces
            row_length = self._row_length(max((int(self._lengths[row].sum()) for row in everyone), default=0))
            batches.append(self._collate(rows, row_length))
        return batches

    def examples(self, epoch: int, index: int) -> list[int]:
        """Return which examples, by their place in the list given, an optimizer step takes over all ranks."""
        first = index * self.sequences_per_step
        return [example for row in self._plan(epoch).rows(first, self.sequences_per_step) for example in row.tolist()]

    def stats(self, epoch: int = 0) -> LoaderStats:
        """Return what an epoch holds, for the lines printed at the start."""
        sequences = self._plan(epoch)
        lengths = sequences.sums(self._lengths).tolist()
        if self.packing:
            efficiency = packing_efficiency(lengths, len(sequences), self.context_length)
        else:
            together = self.batch_size * self.world_size
            groups = [lengths[i : i + together] for i in range(0, len(lengths), together)]
            padded = sum(len(group) * self._row_length(max(group)) for group in groups)
            efficiency = sum(lengths) / padded if padded else 1.0
        return LoaderStats(
            num_examples=len(sequences.examples),
            num_tokens=sum(lengths),
            num_targets=int(self._examples.num_targets[sequences.examples].sum()),
            num_sequences=len(sequences),
            num_steps=self.num_steps(epoch),
            efficiency=efficiency,
        )

    def _plan(self, epoch: int) -> Sequences:
        """Return the epoch's sequences in global order; those of the latest epoch are kept."""
        if epoch != self._planned_epoch:
            random = np.random.default_rng((self.seed, epoch))
            order = self._examples.members(random)
            if self.shuffle:
                order = random.permutation(order)
                if not self.packing:
                    order = group_by_length(order, self._lengths, random)
            alone = np.arange(len(order))
            sequence_of = pack(self._lengths[order], self.context_length) if self.packing else alone
            self._sequences = Sequences(order, sequence_of)
            self._planned_epoch = epoch
        return self._sequences

    def _row_length(self, longest: int) -> int:
        """Return T of a micro-batch whose longest row holds `longest` tokens."""
        if self.packing:
            return self.context_length
        rounded = -(-max(longest, 1) // ROW_MULTIPLE) * ROW_MULTIPLE
        return min(rounded, self.context_length)

    def _collate(self, rows: list[Indices], row_length: int) -> Batch:
        """Build a batch of rows, each of several examples; those missing become rows of padding."""
        shape = (self.batch_size, row_length)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORE, dtype=np.int64)
        position_ids = np.empty(shape, dtype=np.int64)
        lengths: list[int] = []
        for b in range(self.batch_size):
            t = 0
            for example in rows[b].tolist() if b < len(rows) else []:
                ids, is_target = self._examples.tokens(example)
                n = len(ids)
                input_ids[b, t : t + n] = ids
                labels[b, t : t + n - 1] = np.where(is_target[1:], ids[1:], IGNORE)
                position_ids[b, t : t + n] = np.arange(n)
                lengths.append(n)
                t += n
            if t < row_length:
                position_ids[b, t:] = np.arange(row_length - t)
                lengths.append(row_length - t)
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(position_ids),
            cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
            max_seqlen=max(lengths),
            num_targets=int((labels != IGNORE).sum()),
        )


def group_by_length(order: Indices, lengths: Indices, random: np.random.Generator) -> Indices:
    """Bring examples of alike lengths near each other, so that little is padded, and keep the order random otherwise.

    Runs of GROUP examples are sorted and cut into blocks of BLOCK, which are shuffled; the number of ranks plays no part.
    """
    grouped = []
    for start in range(0, len(order), GROUP):
        part = order[start : start + GROUP]
        part = part[np.argsort(lengths[part], kind="stable")]
        blocks = [part[i : i + BLOCK] for i in range(0, len(part), BLOCK)]
        grouped += [blocks[i] for i in random.permutation(len(blocks))]
    return np.concatenate(grouped)


def make_loader(
    examples: Iterable[Example] | Mixture,
    config: LoaderSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rank: int,
    world_size: int,
    accumulation: int | None,
    vocab_size: int | None,
) -> Loader:
    """Return the loader of one rank: of training data in random order, or of evaluation data (accumulation=None).

    Args:
        vocab_size: rows of the model's embedding; None where no model will see the batches.
    """
    # a pad token is often added to a tokenizer without a row for it in the embedding
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    usable = (token for token in candidates if token is not None and (vocab_size is None or token < vocab_size))
    return Loader(
        examples,
        batch_size=config.batch_size,
        gradient_accumulation_steps=accumulation or 1,
        context_length=config.context_length,
        packing=config.packing,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        shuffle=accumulation is not None,
        pad_token_id=next(usable, 0),
    )

"""What happened to the rows of a dataset on their way to examples."""

from __future__ import annotations

import base64
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from fsdp_qlora.errors import DataError

NUM_LISTED = 10
"""Rows of a kind that are listed one by one; more are only counted."""

BadRows = Literal["stop", "skip"]


@dataclass
class DataReport:
    """Counts over the training and evaluation rows of a run; nothing is left out of them silently."""

    bad_rows: BadRows = "stop"
    """What reject() does, from the setting of that name."""

    num_rows: int = 0
    """Rows read, bad ones included."""

    num_skipped: int = 0
    """Malformed rows left out (only with bad_rows='skip')."""

    skipped: list[str] = field(default_factory=list)
    """`file:line: reason` of the first of them."""

    lengths: array[int] = field(default_factory=lambda: array("q"))
    """Tokens of every example before it was cut at context_length; dropped ones included."""

    num_truncated: int = 0
    """Examples cut at context_length."""

    num_dropped: int = 0
    """Examples left out because no target token was left within context_length."""

    dropped: list[str] = field(default_factory=list)
    """`file:line` of the first of them."""

    num_system: int = 0
    """Conversations that begin with a system message."""

    written_out: Counter[str] = field(default_factory=Counter)
    """In how many rows a control token of the tokenizer is written out inside a text."""

    first_written_out: str = ""
    """`file:line` of the first of them."""

    num_examples: int = 0
    """Training examples."""

    num_eval_examples: int = 0

    num_tokens: int = 0
    """Tokens of the training examples."""

    num_targets: int = 0
    """Tokens of the training examples that count in the loss."""

    def add(self, other: DataReport) -> None:
        """Add what happened to the rows of another dataset."""
        self.num_rows += other.num_rows
        self.num_skipped += other.num_skipped
        self.num_truncated += other.num_truncated
        self.num_dropped += other.num_dropped
        self.num_system += other.num_system
        self.written_out.update(other.written_out)
        self.first_written_out = self.first_written_out or other.first_written_out
        self.skipped = (self.skipped + other.skipped)[:NUM_LISTED]
        self.dropped = (self.dropped + other.dropped)[:NUM_LISTED]
        self.lengths.extend(other.lengths)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return {**vars(self), "lengths": base64.b64encode(self.lengths.tobytes()).decode()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> DataReport:
        """Return the report that to_dict was made of."""
        lengths = array("q", base64.b64decode(content["lengths"]))
        return cls(**{**content, "lengths": lengths, "written_out": Counter(content["written_out"])})

    def reject(self, where: str, reason: str) -> None:
        """Count a malformed row, or stop.

        Raises:
            DataError: with `where: reason`, if bad rows stop the run.
        """
        if self.bad_rows == "stop":
            raise DataError(f"{where}: {reason}; fix the row, or leave such rows out with --bad_rows skip")
        self.num_skipped += 1
        if len(self.skipped) < NUM_LISTED:
            self.skipped.append(f"{where}: {reason}")

    def drop(self, where: str) -> None:
        """Count an example that has no target token."""
        self.num_dropped += 1
        if len(self.dropped) < NUM_LISTED:
            self.dropped.append(where)

    def lines(self) -> list[str]:
        """Return a short summary, one statement a line."""
        share = self.num_targets / max(self.num_tokens, 1)
        lines = [
            f"data: {self.num_rows:,} rows -> {self.num_examples:,} training and {self.num_eval_examples:,} evaluation "
            f"examples; {self.num_tokens:,} training tokens, {self.num_targets:,} ({share:.0%}) of them targets"
        ]
        if self.num_truncated:
            lines.append(f"data: {self.num_truncated:,} examples cut at --context_length")
        if self.num_dropped:
            listed = ", ".join(self.dropped) + (", ..." if self.num_dropped > len(self.dropped) else "")
            lines.append(f"data: {self.num_dropped:,} examples dropped, no target within --context_length: {listed}")
        if self.num_skipped:
            lines.append(f"data: {self.num_skipped:,} malformed rows skipped, the first {len(self.skipped)}:")
            lines += [f"  {entry}" for entry in self.skipped]
        return lines

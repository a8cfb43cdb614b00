"""What a check of the doctor returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was looked at.
        status: 'problem' if a run would fail, 'warning' if it would be slow or may fail.
        found: what was seen, with units.
        remedy: what to do; empty if all is well.
    """

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Finding:
    return Finding(name, "ok", found)


def warning(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, "warning", found, remedy)


def problem(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, "problem", found, remedy)

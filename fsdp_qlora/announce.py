"""Lines that say how far something slow is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

INTERVAL_S = 10.0
"""Seconds between two lines; what takes less says nothing."""


def announced(items: Iterable[T], text: Callable[[int], str], shown: bool = True) -> Iterator[T]:
    """Yield the items, and every INTERVAL_S write a line to stderr, where it is in nobody's way.

    Args:
        text: what to say of the number of items that are done; the seconds so far are added.
        shown: false: only yield, as on all ranks but one.
    """
    started = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if shown and now - said >= INTERVAL_S:
            said = now
            print(f"{text(done)}, {now - started:.0f} s so far", file=sys.stderr, flush=True)
        yield item

"""Threads that read what will be loaded next, so that it is in the page cache by then and the disk never waits."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

PIECE_BYTES = 4 << 20
"""What a thread reads at a time."""

AHEAD_BYTES = 256 << 20
"""How far the threads go before the loader follows: more would fill page cache that the machine may need."""

Run = tuple[Path, int, int]
"""A file, the place of a byte in it, and how many bytes to read from there on."""


class ReadAhead:
    """Reads runs of bytes, in their order and at most AHEAD_BYTES ahead of the loader, and throws them away.

    What the loader gets is what it reads itself: a thread that meets an error ends, and the loader finds the same error.
    """

    def __init__(self, runs: Iterable[Run], num_threads: int) -> None:
        self._pieces = _pieces(runs)
        self._moved = threading.Condition()
        self._given = self._loaded = 0
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(num_threads)]

    def __enter__(self) -> ReadAhead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._moved:
            self._closed = True
            self._moved.notify_all()
        for thread in self._threads:
            thread.join()

    def loaded(self, num_bytes: int) -> None:
        """Say that the loader has read so many more bytes of the runs."""
        with self._moved:
            self._loaded += num_bytes
            self._moved.notify_all()

    def _next(self) -> Run | None:
        """Return the next piece once it is near enough, or None if nothing is left to do."""
        with self._moved:
            for piece in self._pieces:
                self._given += piece[2]
                end = self._given
                while end - self._loaded > AHEAD_BYTES and not self._closed:
                    self._moved.wait()
                if self._closed:
                    return None
                if end > self._loaded:  # else the loader was faster
                    return piece
            return None

    def _work(self) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        try:
            while (piece := self._next()) is not None:
                path, position, size = piece
                with path.open("rb", buffering=0) as file:
                    os.preadv(file.fileno(), [buffer[:size]], position)
        except OSError:
            return


def _pieces(runs: Iterable[Run]) -> Iterator[Run]:
    for path, start, size in runs:
        for position in range(start, start + size, PIECE_BYTES):
            yield path, position, min(PIECE_BYTES, start + size - position)

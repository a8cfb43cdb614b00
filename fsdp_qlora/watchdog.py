"""The time limit of everything ranks do together: when nothing moves any more, say which rank hangs where, and end.

torch's own time limits name a collective and no rank, and differ between backends. Here a thread of every rank tells the
others through the process group's store, every few seconds, that it lives and what its main thread is at.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

from torch._C._distributed_c10d import Store

from fsdp_qlora.activation_checkpointing import Block
from fsdp_qlora.run_folder import Progress

PACKAGE = str(Path(__file__).parent)

TICK_S = 0.25
GRACE_S = 30
"""How much longer torch's own time limits are, so that this one speaks first."""

ENDING_S = 20
"""Time that a process may take to leave the group once its work is done or has failed."""


class Watchdog:
    """Watches one process for the length of a `with` block.

    Args:
        progress: what is watched: its `beats` must grow within its `limit_s`.

    Attributes:
        exit_code: of the process if the time is over.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.exit_code = 1
        self._tell: Callable[[str], None] = print
        self._rank, self._world_size = 0, 1
        self._clock = 0.0
        self._beats, self._moved_at = -1, 0.0
        self._heard: dict[int, tuple[str, float]] = {}
        self._answered_at = time.monotonic()
        self._over = threading.Event()
        self._main = threading.main_thread().ident or 0

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def connect(self, rank: int, world_size: int, store: Store | None, tell: Callable[[str], None]) -> None:
        """Begin to exchange signs of life with the other ranks.

        Args:
            store: used by nobody else; None for a world of one.
            tell: called with the reason when the time is over, before the process ends.
        """
        self._rank, self._world_size, self._tell = rank, world_size, tell
        if store is not None:
            threading.Thread(target=self._talk, args=(store,), daemon=True, name="heartbeat").start()

    def _interval(self) -> float:
        return min(4.0, self.progress.limit_s / 10)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(TICK_S):
            now = time.monotonic()
            # a process that was stopped and continued must not take the time in between for a hang
            self._clock += min(now - last, 4 * TICK_S)
            last = now
            if self.progress.beats != self._beats:
                self._beats, self._moved_at = self.progress.beats, self._clock
            if self._clock - self._moved_at > self.progress.limit_s:
                self._end()

    def _talk(self, store: Store) -> None:
        """Tell the others what this rank is at and note what they say; a store that is gone or hangs ends only this."""
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        self._heard = dict.fromkeys(others, (json.dumps([0, "starting"]), time.monotonic()))
        number, speaking = 0, set[int]()
        while True:
            number += 1
            try:
                store.set(_key(self._rank), json.dumps([number, self.where()]))
                speaking |= {rank for rank in others if rank in speaking or store.check([_key(rank)])}
                said = store.multi_get([_key(rank) for rank in sorted(speaking)])
            except RuntimeError:
                return
            self._answered_at = time.monotonic()
            for rank, value in zip(sorted(speaking), said, strict=True):
                text = value.decode()
                if self._heard[rank][0] != text:
                    self._heard[rank] = (text, time.monotonic())
            if self._over.wait(self._interval()):
                return

    def _end(self) -> None:
        """Say what every rank is at and end the process, unless something moves while that is found out."""
        progress, asked_at = self.progress, time.monotonic()
        time.sleep(2.2 * self._interval())
        if progress.beats != self._beats:
            return
        first = (
            f"no progress for {progress.limit_s:.0f} s at step {progress.step} ({progress.doing});"
            f" rank {self._rank} is {self.where()}{self._block()}"
        )
        self._tell("\n".join([first, *self._others(asked_at)]))
        os._exit(self.exit_code)

    def _others(self, asked_at: float) -> list[str]:
        """Return a line on each other rank: what it is at, or that nothing was heard of it since a moment."""
        lines, now = [], time.monotonic()
        if self._world_size > 1 and self._answered_at < asked_at:
            holder = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
            lines.append(
                f"{holder}, which passes on the ranks' signs of life, has not answered for"
                f" {now - self._answered_at:.0f} s: stopped, killed or cut off"
            )
        for rank, (text, heard_at) in sorted(self._heard.items()):
            where = json.loads(text)[1]
            if heard_at < asked_at:
                lines.append(
                    f"rank {rank} has given no sign of life for {now - heard_at:.0f} s: stopped, killed or cut off;"
                    f" it was {where}"
                )
            else:
                lines.append(f"rank {rank} is {where}")
        return lines

    def where(self) -> str:
        """Return what the main thread is at: the function it waits in, and the line of this package that called it."""
        inner, ours = "", ""
        for frame in self._frames():
            name = frame.f_code.co_filename
            inner = inner or frame.f_code.co_name
            if name.startswith(PACKAGE):
                ours = f", called by {Path(name).name}:{frame.f_lineno} {frame.f_code.co_name}"
                break
        return f"in {inner}{ours}" if inner else "ending"

    def _block(self) -> str:
        """Name the decoder block that the main thread is in; only at the end, as looking at locals keeps them alive."""
        modules = (frame.f_locals.get("self") for frame in self._frames())
        return next((f" (block {module.index})" for module in modules if isinstance(module, Block)), "")

    def _frames(self) -> Iterator[FrameType]:
        frame = sys._current_frames().get(self._main)
        while frame is not None:
            yield frame
            frame = frame.f_back


def _key(rank: int) -> str:
    return f"watchdog/{rank}"

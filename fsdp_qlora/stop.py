"""Signals that ask a run to end: after the first one the run saves and ends by itself, a later one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

END = b"\0"
"""What ends the thread; no signal has the number 0."""

REPEAT_S = 2.0
"""Signals this soon after the first are the same request: launchers forward what the terminal or scheduler has already
sent to every process."""


def _ignore(*_: object) -> None:
    """Handle a signal in Python, which has nothing left to do."""


class Stop:
    """Handles the signals for the length of a `with` block.

    Python runs signal handlers on the main thread only, and not while that waits inside a collective; so a thread reads the
    signals from a pipe that the interpreter's C code fills.

    Schedulers send their signals to all processes of a job. The main thread blocks them, which children inherit: compile
    workers of torch and compilers, without which a step cannot end, and services of trackers. The thread does not.

    Args:
        speaks: whether this rank says what it received.

    Attributes:
        received: name of the first signal, or None.
        is_starting: whether there is nothing to save yet.
    """

    def __init__(self, speaks: bool) -> None:
        self.received: str | None = None
        self.is_starting = True
        self._speaks = speaks

    def __enter__(self) -> Stop:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _ignore) for number in SIGNALS}
        self._thread = threading.Thread(target=self._watch, daemon=True, name="signals")
        self._thread.start()
        self._mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._writer, END)  # closing would not do while a forked child holds the pipe open
        self._thread.join()
        os.close(self._writer)
        os.close(self._reader)

    def is_asked(self) -> bool:
        """Return whether the run is to end; for the main thread.

        LLVM takes the signals over when Triton first compiles a kernel, and drops SIGUSR1, so they are taken back here. What
        arrives between the two, within the first step, is lost.
        """
        for number in SIGNALS:
            signal.signal(number, _ignore)
        return self.received is not None

    def is_ending_start(self) -> bool:
        """Return whether the run is to end although it has not begun to train."""
        return self.is_starting and self.is_asked()

    def _watch(self) -> None:
        first = 0.0
        while True:
            numbers = os.read(self._reader, 64)
            for number in numbers:
                if number == END[0]:
                    return
                if number not in SIGNALS:
                    continue
                name, now = signal.Signals(number).name, time.monotonic()
                if self.received is None:
                    self.received, first = name, now
                    if self._speaks:
                        print(
                            f"{name}: the run saves and ends; send it again to end at once", file=sys.stderr, flush=True
                        )
                elif now - first > REPEAT_S:
                    os._exit(128 + number)

"""Faults that tests build into a rank. Each takes the rank last, so that functools.partial makes a jobs.Fault of it."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

PLACES = ("load", "first step", "later step", "save")


def kill_after_step(step: int, rank: int) -> None:
    """kill -9 right after an optimizer step, before anything of it is saved."""
    from fsdp_qlora.trainer import Trainer

    log_step = Trainer._log_step

    def log_and_die(self: Trainer, metrics: object, result: object, done: int, *arguments: object) -> None:
        log_step(self, metrics, result, done, *arguments)  # type: ignore[arg-type]
        if done + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._log_step = log_and_die  # type: ignore[method-assign, assignment]


def fail_at(place: str, kind: str, victim: int | None, rank: int) -> None:
    """Let one rank, or all (None), fail in one of PLACES, in one of the ways of KINDS."""
    if victim in (rank, None):
        _at(place, KINDS[kind])


def _raise() -> None:
    raise RuntimeError("something broke")


def _signal(*numbers: int, pause_s: float = 0.0) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(pause_s)


KINDS: dict[str, Callable[[], None]] = {
    "kill": functools.partial(_signal, signal.SIGKILL),
    "raise": _raise,
    "exit": functools.partial(os._exit, 0),
    "pause": functools.partial(_signal, signal.SIGSTOP),
    "SIGTERM": functools.partial(_signal, signal.SIGTERM),
    "SIGINT": functools.partial(_signal, signal.SIGINT),
    "SIGUSR1": functools.partial(_signal, signal.SIGUSR1),
    "SIGTERM, forwarded again": functools.partial(_signal, signal.SIGTERM, signal.SIGTERM, pause_s=0.2),
    "SIGTERM twice": functools.partial(_signal, signal.SIGTERM, signal.SIGTERM, pause_s=2.3),
}


def _at(place: str, action: Callable[[], None]) -> None:
    """Call the action once, in the middle of a place of the run."""
    from fsdp_qlora import saver, trainer
    from fsdp_qlora.weights.loader import Loader

    if place == "load":
        _before(Loader, "_load_unit", 2, action)
    elif place == "save":
        _before(saver, "write_tensors", 1, action)  # in the thread that writes
    elif place == "evaluation":
        _before(trainer.Trainer, "evaluate", 1, action)
    else:
        # after backward, while the others wait for this rank in the exchange of the gradient norm
        _before(trainer, "clip_gradients", 1 if place == "first step" else 4, action)


def _before(owner: Any, name: str, call: int, action: Callable[[], None]) -> None:
    """Do the action before the given call (from 1) of a function."""
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            action()
        return function(*arguments, **named)

    setattr(owner, name, wrapped)

"""Faults that tests build into a rank. Each takes the rank last, so that functools.partial makes a jobs.Fault of it."""

from __future__ import annotations

import os
import signal


def kill_after_step(step: int, rank: int) -> None:
    """kill -9 right after an optimizer step, before anything of it is saved."""
    from fsdp_qlora.trainer import Trainer

    log_step = Trainer._log_step

    def log_and_die(self: Trainer, metrics: object, result: object, done: int, *arguments: object) -> None:
        log_step(self, metrics, result, done, *arguments)  # type: ignore[arg-type]
        if done + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._log_step = log_and_die  # type: ignore[method-assign, assignment]

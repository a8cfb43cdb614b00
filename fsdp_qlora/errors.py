"""The errors a user can meet. Each message names the value, the rule and the remedy in one line."""

from __future__ import annotations

import os
import sys
import traceback

from fsdp_qlora.redact import redact


class FsdpQloraError(Exception):
    """Base of every error this package raises for users, files and data; the command line prints it without a traceback."""

    exit_code = 1

    rank_local: bool = False
    """Set where only this rank saw the error, so that the command line prints it although it is not rank 0."""

    is_reported: bool = False
    """Set where it was already printed."""


class ConfigError(FsdpQloraError):
    """A setting, or a combination of settings, that cannot work; the message lists every problem found."""

    exit_code = 2


class ModelError(FsdpQloraError):
    """A model that cannot be found, downloaded or handled (unknown family, no LoRA target matches, ...)."""


class WeightsError(FsdpQloraError):
    """A base checkpoint that is incomplete, damaged or of an unsupported form; names the file and the tensor."""


class DataError(FsdpQloraError):
    """A dataset or a row that cannot be used; names file, line and reason."""


class CheckpointError(FsdpQloraError):
    """An adapter or training checkpoint that is incomplete or does not fit the run."""


class TrainingError(FsdpQloraError):
    """A run that must stop: non-finite loss or gradients, a rank that failed."""


class Interrupted(FsdpQloraError):
    """A signal asked the run to end in the middle of something whose result is given up; no failure."""

    exit_code = 0


def describe(error: FsdpQloraError) -> str:
    """Return the message, with the rank where others than the first failed alone."""
    rank = os.environ.get("RANK", "0")
    return f"rank {rank}: {error}" if error.rank_local and rank != "0" else str(error)


def report(error: FsdpQloraError, debug: bool = False) -> None:
    """Print an error, unless it was printed: one that all ranks share on rank 0, one of a single rank there.

    Args:
        debug: with its traceback.
    """
    if not error.is_reported and (os.environ.get("RANK", "0") == "0" or error.rank_local):
        show(describe(error), "".join(traceback.format_exception(error)) if debug else "")
    error.is_reported = True


def show(message: str, trace: str = "") -> None:
    """Print an error message, after its traceback if there is one."""
    lines = "\n".join(f"error: {line}" for line in message.splitlines())
    print(redact(trace + lines), file=sys.stderr, flush=True)

"""What surrounds a training run: its folder, signals, time limits, and one account of how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from fsdp_qlora.compile_workers import end_compile_workers
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks, agree_on_errors, from_main, process_group
from fsdp_qlora.errors import FsdpQloraError, Interrupted, TrainingError, describe, report, show
from fsdp_qlora.profiling import check_profiling
from fsdp_qlora.quant.fp8 import check_device
from fsdp_qlora.run_folder import Progress, Status, take, write_exit
from fsdp_qlora.stop import Stop
from fsdp_qlora.watchdog import ENDING_S, GRACE_S, Watchdog


@dataclass
class Session:
    """A run in this process.

    Attributes:
        progress: to be kept up to date by whoever does something.
        owns_folder: whether the output folder is this run's.
    """

    config: TrainConfig
    ranks: Ranks
    stop: Stop
    progress: Progress
    owns_folder: bool = False
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.ranks.is_main:
            print(text, flush=True)

    def begin_training(self) -> None:
        """Note that from now on signals mean: finish the step and save."""
        self.stop.is_starting = False
        self.progress.limit_s = step_timeout(self.config)
        self.progress.beat("training")

    def write_exit(self, status: Status, reason: str) -> bool:
        """Write exit.json as well as the disk allows; return whether this rank is the first to tell."""
        if not self.owns_folder:
            return True
        try:
            return write_exit(self.output, status, self.progress, reason)
        except OSError as error:
            print(f"warning: exit.json cannot be written ({error.strerror})", file=sys.stderr, flush=True)
            return True

    def time_is_over(self, reason: str) -> None:
        """Say that nothing moves any more, unless another rank has."""
        if self.write_exit("failed", reason):
            show(reason)


def step_timeout(config: TrainConfig) -> int:
    """Return the time limit of a step in seconds."""
    return config.timeout_s if config.step_timeout_s is None else config.step_timeout_s


def run_session(config: TrainConfig, train: Callable[[Session], bool]) -> None:
    """Call `train` with everything around it set up, and tell how it ended.

    Args:
        train: returns False if a signal ended it early.
    """
    progress = Progress()  # joining the group has a time limit of its own
    longest_s = max(config.timeout_s, step_timeout(config)) + GRACE_S
    with (
        Stop(speaks=os.environ.get("RANK", "0") == "0") as stop,
        Watchdog(progress) as watchdog,
        process_group(config.sharding, longest_s) as joined,
        contextlib.ExitStack() as stack,
    ):
        ranks = dataclasses.replace(joined, is_interrupted=stop.is_ending_start)
        session = Session(config, ranks, stop, progress, stack=stack)
        progress.limit_s = config.timeout_s
        progress.beat()
        watchdog.connect(ranks.rank, ranks.world_size, _own_store(ranks), session.time_is_over)
        try:
            _tell_end(session, train)
            watchdog.exit_code = 0
        except FsdpQloraError as error:
            # here, where a launcher's SIGTERM after the first rank's end is still held off
            report(error, config.debug)
            raise
        finally:
            end_compile_workers()
            # leaving the group can hang where a rank is gone
            progress.limit_s = ENDING_S
            progress.beat("ending")


def _own_store(ranks: Ranks) -> Store | None:
    """Return a connection of its own to the store of the process group, as one that waits blocks all who share it."""
    if ranks.world_size == 1:
        return None
    own: Store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    return own


def _take_folder(session: Session) -> bool:
    """Reserve the output folder until the session ends; return whether there is nothing to do."""
    config, ranks, finished = session.config, session.ranks, False
    with agree_on_errors(ranks, "preparing the output folder"):
        check_profiling(config, ranks.device)
        if config.compute_dtype == "fp8":
            check_device(ranks.device)
        if ranks.is_main:
            lock, finished = take(config)
            session.stack.callback(lock.release)
    if finished:
        session.say(f"{config.output_dir} holds this run, completed: nothing to do (--overwrite starts it over)")
    session.owns_folder = not from_main(finished)
    return not session.owns_folder


def _tell_end(session: Session, train: Callable[[Session], bool]) -> None:
    """Train, and tell in exit.json how it ended."""
    ranks, progress = session.ranks, session.progress
    try:
        if _take_folder(session):
            return
        completed = train(session)
    except Interrupted:
        completed = False
    except FsdpQloraError as error:
        session.write_exit("failed", describe(error))
        raise
    except Exception as error:  # whatever libraries raise; the first rank to fail says so, the others only follow
        reason = f"rank {ranks.rank} failed at step {progress.step} ({progress.doing}): {type(error).__name__}: {error}"
        if session.write_exit("failed", reason):
            show(reason, traceback.format_exc())
        failure = TrainingError(reason)
        failure.is_reported = True
        raise failure from error
    if not ranks.is_main:
        return
    if completed:
        session.write_exit("completed", "all steps are done")
        return
    session.write_exit("preempted", f"{session.stop.received or 'a signal to another rank'} during {progress.doing}")
    saved = "nothing was trained yet" if progress.saved_step is None else f"saved at step {progress.saved_step}"
    session.say(f"stopped by a signal at step {progress.step}, {saved}; the same command goes on from there")

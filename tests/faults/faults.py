"""Faults that tests build into a rank. Each takes the rank last, so that functools.partial makes a jobs.Fault of it."""

from __future__ import annotations

import errno
import functools
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
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


def nothing(rank: int) -> None:
    """Do nothing."""


def fail_at(place: str, kind: str, victim: int, marker: Path, rank: int) -> None:
    """Let one rank fail in one of PLACES, in one of the ways of KINDS, after touching a file to tell when."""

    def fail() -> None:
        marker.touch()
        KINDS[kind]()

    if rank == victim:
        _at(place, fail)


def _raise() -> None:
    raise RuntimeError("something broke")


def _signal(*numbers: int, pause_s: float = 0.0) -> None:
    """Send signals to this process, with time for the thread that reads them."""
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(pause_s)


KINDS: dict[str, Callable[[], None]] = {
    "kill": functools.partial(_signal, signal.SIGKILL),
    "raise": _raise,
    "exit": functools.partial(os._exit, 0),
    "pause": functools.partial(_signal, signal.SIGSTOP),
    "SIGTERM": functools.partial(_signal, signal.SIGTERM, pause_s=0.5),
    "SIGINT": functools.partial(_signal, signal.SIGINT, pause_s=0.5),
    "SIGUSR1": functools.partial(_signal, signal.SIGUSR1, pause_s=0.5),
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
        _before(trainer, "evaluate", 1, action)
    else:
        # after backward, while the others wait for this rank in the exchange of the gradient norm
        _before(trainer, "gradient_norm", 1 if place == "first step" else 4, action)


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


def signal_in_evaluation(batch: int, victim: int, counts: Path, rank: int) -> None:
    """SIGTERM to one rank in the given batch (from 1) of all its evaluations; every rank writes how many it computes."""
    from fsdp_qlora import evaluation

    forward, calls = evaluation.forward, 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        counts.with_suffix(f".{rank}").write_text(str(calls))
        if rank == victim and calls == batch:
            _signal(signal.SIGTERM, pause_s=0.5)  # time for the thread that reads signals
        return forward(*arguments)

    evaluation.forward = counted


def nan_in_gradient(step: int, victim: int, rank: int) -> None:
    """Write a NaN into one gradient of one rank."""
    from fsdp_qlora import trainer
    from fsdp_qlora.optim import local

    measure, calls = trainer.gradient_norm, 0

    def poisoned(root: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == victim and calls == step:
            gradient = next(parameter.grad for parameter in root.parameters() if parameter.grad is not None)
            local(gradient)[0, 0] = float("nan")
        return measure(root)

    trainer.gradient_norm = poisoned


def skip_collective(step: int, victim: int, rank: int) -> None:
    """One rank leaves out the exchange of the gradient norm of a step, as code does that asks for its rank first."""
    import torch.distributed as dist

    from fsdp_qlora import trainer

    measure, all_reduce, calls = trainer.gradient_norm, dist.all_reduce, 0

    def measured(root: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == victim and calls == step:
            dist.all_reduce = lambda *_, **__: None
        try:
            return measure(root)
        finally:
            dist.all_reduce = all_reduce

    trainer.gradient_norm = measured


def kill_in_save(save: int, moment: int, victim: int | None, rank: int) -> None:
    """kill -9 at a moment of a save: before, in the middle of, or after one of its operations on the disk.

    Args:
        save: which save, from 1.
        moment: counts through the operations; larger than their number: no kill.
    """
    if victim not in (rank, None):
        return
    watch_disk(save, lambda number: _signal(signal.SIGKILL) if number == moment else None)


class HalfWrites:
    """A file that has a moment in the middle of every write."""

    def __init__(self, file: Any, moment: Callable[[], None]) -> None:
        self.file, self.moment = file, moment

    def __enter__(self) -> HalfWrites:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.moment()
        self.file.write(data[len(data) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def watch_disk(save: int, act: Callable[[int], None]) -> Callable[[], int]:
    """Call `act` with the number of every moment of a save; return how to learn how many there were."""
    from fsdp_qlora import files, saver

    seen, saves, active = 0, 0, False

    def moment() -> None:
        nonlocal seen
        if active:
            seen += 1
            act(seen)

    def counted(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            moment()
            result = function(*arguments, **named)
            moment()
            return result

        setattr(owner, name, wrapped)

    start, finish, path_open = saver.Saver.start, saver.Saver.finish, Path.open

    def counted_start(self: Any, position: Any) -> None:
        nonlocal saves, active
        finish(self)
        saves += 1
        active = saves == save
        start(self, position)

    def counted_finish(self: Any) -> None:
        nonlocal active
        wrote = self._writing is not None
        finish(self)
        active = active and not wrote

    def open_half(self: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        file = path_open(self, mode, *arguments, **named)
        return HalfWrites(file, moment) if active and mode == "wb" else file

    saver.Saver.start, saver.Saver.finish = counted_start, counted_finish  # type: ignore[method-assign]
    Path.open = open_half  # type: ignore[method-assign, assignment]
    files.CHUNK_BYTES = 16384
    for owner, name in ((os, "fsync"), (os, "mkdir"), (os, "rename"), (os, "rmdir"), (os, "unlink"), (os, "replace")):
        counted(owner, name)
    return lambda: seen


def disk_full(save: int, share: float, victim: int, rank: int) -> None:
    """Let the disk of one rank be full once it has written a share of its bytes of a save; 0: no byte of it fits.

    Save 0, of which no byte can be written, is the look at the disk before training.
    """
    if rank != victim:
        return
    if share == 0:
        usage = shutil.disk_usage
        _nth(save + 1, shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
        return
    from fsdp_qlora import files, saver

    write, saves, files.CHUNK_BYTES = saver.write_tensors, 0, 4096

    def limited(path: Path, tensors: Any, metadata: Any) -> Any:
        nonlocal saves
        saves += path.name.startswith("rank-")
        limit = share * sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        if saves == save:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
        try:
            return write(path, tensors, metadata)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    saver.write_tensors = limited


def read_only(step: int, rank: int) -> None:
    """Let the folder of checkpoints be on a disk that is read-only by a step (root may write to any folder)."""
    make = Path.mkdir

    def refused(self: Path, *arguments: Any, **named: Any) -> None:
        if f"step-{step:06d}" in str(self):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        make(self, *arguments, **named)

    Path.mkdir = refused  # type: ignore[method-assign]


def _nth(call: int, owner: Any, name: str, other: Callable[..., Any]) -> None:
    """Replace the given call (from 1) of a function by another function."""
    function, calls = getattr(owner, name), 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return (other if calls == call else function)(*arguments, **named)

    setattr(owner, name, wrapped)


def say_the_token(token: str, rank: int) -> None:
    """Let training fail with an error whose text holds a secret of the environment, as some clients' errors do."""
    os.environ.update(HF_TOKEN=token, WANDB_API_KEY=token)
    from fsdp_qlora import trainer

    def fail(*_: object) -> float:
        raise RuntimeError(f"401 for https://user:{token}@hub.example")

    _nth(5, trainer, "gradient_norm", fail)

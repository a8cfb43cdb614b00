"""The folder of a run: who may use it, what an earlier run left in it, and exit.json for schedulers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from fsdp_qlora.adapters import trained_step
from fsdp_qlora.checkpoint import FOLDER, checkpoint_folders, put_aside_later, remove_leftovers
from fsdp_qlora.config import TrainConfig, to_dict
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.files import fsync_folder, write_file, write_new
from fsdp_qlora.redact import redact

Status = Literal["completed", "preempted", "failed"]

LOCK, METRICS, RECORD, EXIT = ".lock", "metrics.jsonl", "run.json", "exit.json"
ADAPTER, MODEL, BEST = "adapter", "model", "best"
_NAMES = re.compile(
    r"(metrics\.jsonl|run\.json|best)(\.partial)?|exit\.json(\.\w+\.partial)?|checkpoints|wandb|tensorboard"
    r"|profile-rank-\d+\.json\.gz|memory-rank-\d+\.pickle"
)
"""What a run leaves that ended before its first checkpoint: nothing is lost if the next one starts over."""

RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""Environment variables in which torchrun (--max-restarts) and SLURM (requeue) count the restarts of a job."""


@dataclass
class Progress:
    """How far the run is, for exit.json and error messages.

    Attributes:
        step, num_steps: optimizer steps done, and in all (None: not known yet).
        saved_step: step of the newest checkpoint (None: there is none).
        doing: what the run is at.
        beats, limit_s: a count that goes up whenever something is done, and the seconds in which it must.
        spent: seconds by what the run was at before.
    """

    step: int = 0
    num_steps: int | None = None
    saved_step: int | None = None
    doing: str = "start-up"
    beats: int = 0
    limit_s: float = math.inf
    spent: dict[str, float] = field(default_factory=lambda: {"imports": process_seconds()})
    _since: float = field(default_factory=time.monotonic)

    def beat(self, doing: str | None = None) -> None:
        """Note that something was done, and what comes next."""
        if doing is not None and doing != self.doing:
            now = time.monotonic()
            self.spent[self.doing] = self.spent.get(self.doing, 0.0) + now - self._since
            self.doing, self._since = doing, now
        self.beats += 1

    @contextlib.contextmanager
    def alone(self, doing: str) -> Iterator[None]:
        """Do something that waits for no other rank, for the length of a `with` block: it may take as long as it takes."""
        self.beat(doing)
        limit_s, self.limit_s = self.limit_s, math.inf
        try:
            yield
        finally:
            self.limit_s = limit_s
            self.beat()


def process_seconds() -> float:
    """Return the age of this process in seconds; 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return 0.0


def take(config: TrainConfig) -> tuple[FileLock, bool]:
    """Create the output folder, or take over an earlier run's as --resume and --overwrite say.

    Returns:
        The lock that keeps other processes out until it is released or this process ends; and whether the folder holds a
        completed run of the same settings, so that there is nothing to do.

    Raises:
        ConfigError: it cannot be written, is used by a running process, or holds what this run must not touch.
    """
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = {entry.name for entry in folder.iterdir()} - {LOCK}
    except OSError as error:
        raise ConfigError(f"output_dir '{folder}' cannot be used ({error.strerror}); choose another") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"output_dir '{folder}' is not writable; choose another")
    for name in sorted(entries):
        if (folder / name).is_symlink() and (name in (ADAPTER, MODEL) or _NAMES.fullmatch(name)):
            raise ConfigError(f"output_dir '{folder}': {name} is a symbolic link; a run's files stay inside its folder")
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"output_dir '{folder}' is in use by a running process; choose another, or stop it"
        ) from error
    try:
        finished = _check(config, folder, entries)
        if not finished:
            _clear(folder)
    except ConfigError:
        lock.release()
        raise
    return lock, finished


def _check(config: TrainConfig, folder: Path, entries: set[str]) -> bool:
    """Return whether the folder holds a completed run of these settings; ConfigError if it must not be used."""
    if starts_over(config) or not entries:
        return False
    start = where_to_start(config)
    if start != "none":
        if checkpoint_folders(folder):
            return start == "auto" and _is_completed(config, folder)
        if all(_NAMES.fullmatch(name) for name in entries):
            return False
    raise ConfigError(f"output_dir '{folder}' is not empty; choose another, or replace its results with --overwrite")


def starts_over(config: TrainConfig) -> bool:
    """Return whether --overwrite still holds: not when the job was started again after it did what it says."""
    restarted = any(int(os.environ.get(name) or 0) > 0 for name in RESTARTS)
    return config.overwrite and not (restarted and _recorded(Path(config.output_dir)).get("overwrite", False))


def where_to_start(config: TrainConfig) -> str:
    """Return what --resume comes to in the output folder as it is: 'auto', 'none', or the path of a checkpoint or run.

    A path elsewhere is for the first start only: with checkpoints of its own, the same command goes on from those.
    """
    if starts_over(config):
        return "none"
    folder = Path(config.output_dir)
    if config.resume not in ("auto", "none") and checkpoint_folders(folder):
        inside = Path(config.resume).resolve().is_relative_to(folder.resolve())
        return config.resume if inside else "auto"
    return config.resume


def _is_completed(config: TrainConfig, folder: Path) -> bool:
    try:
        status = json.loads((folder / EXIT).read_text())["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    before = _recorded(folder)
    now = {name: value for name, value in to_dict(config).items() if name not in ("resume", "overwrite", "debug")}
    result = folder / (MODEL if config.train_type == "full" else ADAPTER)
    return status == "completed" and result.is_dir() and now.items() <= before.items()


def _recorded(folder: Path) -> dict[str, Any]:
    """Return the settings of the run that the folder holds; {} if none began to train."""
    try:
        settings: dict[str, Any] = json.loads((folder / RECORD).read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return settings


def _clear(folder: Path) -> None:
    """Delete what must not be taken for this run's: the last exit.json and half-written checkpoints."""
    try:
        for path in folder.glob(f"{EXIT}*"):
            path.unlink()
        remove_leftovers(folder)
    except OSError as error:
        raise ConfigError(f"output_dir '{folder}': {error.filename} cannot be deleted ({error.strerror})") from error


def start_over(folder: Path) -> None:
    """Delete an earlier run's checkpoints and results, now that a new run is about to train its first step."""
    for path in [*checkpoint_folders(folder), folder / ADAPTER, folder / MODEL, folder / BEST]:
        if path.exists():
            shutil.rmtree(path)


def go_on_in(folder: Path, step: int, run_id: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Remove what is of later steps than the one that the run goes on from; return the metrics so far."""
    recorded = keep_metrics(folder, step)
    for name in put_aside_later(folder, step, run_id):
        say(f"a damaged checkpoint is put aside as {folder / FOLDER / name}")
    later = drop_later_best(folder, step)
    if later is not None:
        say(f"{folder / BEST} deleted: it was of step {later}, from which the run does not go on")
    return recorded


def keep_metrics(folder: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of metrics.jsonl after a step, which will be trained again; return the others."""
    path = folder / METRICS
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a killed process may be cut short
            continue
        if record["step"] <= step:
            kept.append(record)
    write_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
    return kept


def drop_later_best(folder: Path, step: int) -> int | None:
    """Delete the best adapter or model if it is of a step after this one, which will be trained again; return that step."""
    best = trained_step(folder / BEST)
    if best is None or best <= step:
        return None
    shutil.rmtree(folder / BEST)
    return best


def write_exit(folder: Path, status: Status, progress: Progress, reason: str) -> bool:
    """Write exit.json, which tells schedulers how the run ended; return False if another rank of this run already has."""
    content = {
        "status": status,
        "step": progress.step,
        "num_steps": progress.num_steps,
        "saved_step": progress.saved_step,
        "reason": redact(reason),
    }
    partial = folder / f"{EXIT}.{uuid.uuid4().hex}.partial"
    write_new(partial, [(json.dumps(content) + "\n").encode()])
    try:
        os.link(partial, folder / EXIT)  # unlike a rename, fails where the file exists
    except FileExistsError:
        return False
    finally:
        partial.unlink()
    fsync_folder(folder)
    return True

"""What a run says of itself: metrics.jsonl always, its progress, trackers if asked for. None of it can stop the run."""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fsdp_qlora.config import TrainConfig

TRACKER_LIMIT_S = 60
"""How long a tracker may hold up training before it is switched off."""


class Logger(Protocol):
    """A sink of metrics."""

    def log(self, record: dict[str, Any], step: int) -> None:
        """Take one record of numbers."""

    def log_samples(self, samples: list[dict[str, str]], step: int) -> None:
        """Take answers to prompts, each {"prompt", "answer"}."""

    def close(self) -> None:
        """Finish; nothing is logged afterwards."""


class JsonlLogger:
    """One JSON object a line, flushed at once.

    Args:
        append: go on with the file of an earlier session.
    """

    def __init__(self, path: Path, append: bool = False) -> None:
        self._file: TextIO = path.open("a" if append else "w", encoding="utf-8")

    def log(self, record: dict[str, Any], step: int) -> None:
        """Append a line."""
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **record}) + "\n")
        self._file.flush()

    def log_samples(self, samples: list[dict[str, str]], step: int) -> None:
        """Append a line."""
        self.log({"samples": samples}, step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandbLogger:
    """Weights & Biases, offline where WANDB_MODE says so. The login comes from the environment, never from flags."""

    def __init__(self, config: TrainConfig, settings: dict[str, Any]) -> None:
        import wandb

        name = config.run_name or Path(config.output_dir).name
        quiet = wandb.Settings(init_timeout=30, console="off", disable_git=True, silent=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fsdp_qlora"),
            name=name,
            dir=config.output_dir,
            config=settings,
            settings=quiet,
        )

    def log(self, record: dict[str, Any], step: int) -> None:
        """Send a record."""
        self._run.log(record, step=step)

    def log_samples(self, samples: list[dict[str, str]], step: int) -> None:
        """Send a table."""
        import wandb

        rows = [[sample["prompt"], sample["answer"]] for sample in samples]
        self._run.log({"samples": wandb.Table(columns=["prompt", "answer"], data=rows)}, step=step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


class TensorboardLogger:
    """Event files for TensorBoard in the run's folder."""

    def __init__(self, config: TrainConfig, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(config.output_dir) / "tensorboard"))
        self._writer.add_text("settings", f"```\n{json.dumps(settings, indent=2)}\n```")

    def log(self, record: dict[str, Any], step: int) -> None:
        """Write a record."""
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)

    def log_samples(self, samples: list[dict[str, str]], step: int) -> None:
        """Write texts."""
        for number, sample in enumerate(samples, 1):
            self._writer.add_text(f"sample {number}", f"**{sample['prompt']}**\n\n{sample['answer']}", step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class InThread:
    """A tracker whose calls all run in one thread: some wait for a network forever, some keep what they need per thread.

    Raises:
        TimeoutError: making the tracker, or a call, took longer than TRACKER_LIMIT_S.
    """

    def __init__(self, make: Callable[[], Logger]) -> None:
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="tracker").start()
        self._tracker: Logger = self._call(make)

    def log(self, record: dict[str, Any], step: int) -> None:
        """Have the tracker take a record."""
        self._call(lambda: self._tracker.log(record, step))

    def log_samples(self, samples: list[dict[str, str]], step: int) -> None:
        """Have the tracker take answers."""
        self._call(lambda: self._tracker.log_samples(samples, step))

    def close(self) -> None:
        """Have the tracker finish."""
        self._call(lambda: self._tracker.close())

    def _call(self, action: Callable[[], Any]) -> Any:
        answer: Future[Any] = Future()
        self._calls.put((action, answer))
        if not wait([answer], TRACKER_LIMIT_S).done:
            raise TimeoutError(f"no answer in {TRACKER_LIMIT_S} s")
        return answer.result()

    def _work(self) -> None:
        while True:
            action, answer = self._calls.get()
            try:
                answer.set_result(action())
            except Exception as error:  # raised again in the thread that asked
                answer.set_exception(error)


LOGGERS: dict[str, Callable[[TrainConfig, dict[str, Any]], Logger]] = {
    "wandb": WandbLogger,
    "tensorboard": TensorboardLogger,
}
"""Trackers by the name --log_to gives them."""


class Metrics:
    """All sinks of a run's metrics on rank 0; does nothing on the other ranks.

    Args:
        config: the run's settings.
        settings: what trackers store as the run's configuration.
        num_steps: optimizer steps of the run.
        enabled: whether this is rank 0.
        resumed: go on with the metrics of an earlier session.
    """

    def __init__(
        self, config: TrainConfig, settings: dict[str, Any], num_steps: int, enabled: bool, resumed: bool = False
    ) -> None:
        self._sinks: dict[str, Logger] = {}
        self._progress: Progress | None = None
        self._save_steps = config.save_steps
        self.enabled = enabled
        if not enabled:
            return
        # The run's own record waits for a file system that stalls; --step_timeout_s ends what never moves.
        self._sinks["metrics.jsonl"] = JsonlLogger(Path(config.output_dir) / "metrics.jsonl", resumed)
        for name in map(str.strip, config.log_to.split(",") if config.log_to != "none" else []):
            try:
                self._sinks[name] = InThread(functools.partial(LOGGERS[name], config, settings))
            except Exception as error:  # a tracker may fail in any way of its own; the run goes on
                self._warn(name, error)
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=Console(stderr=True),
                expand=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=num_steps)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._everywhere(lambda sink: sink.close())

    def log(self, record: dict[str, Any], step: int) -> None:
        """Send a record of numbers to every sink."""
        self._everywhere(lambda sink: sink.log(record, step))

    def log_samples(self, samples: list[dict[str, str]], step: int) -> None:
        """Send answers to every sink and show them."""
        self._everywhere(lambda sink: sink.log_samples(samples, step))
        for sample in samples:
            self.show(f"step {step}: {sample['prompt']!r} -> {sample['answer']!r}")

    def show(self, line: str) -> None:
        """Print a line, above the bar on a terminal."""
        if self._progress is not None:
            self._progress.console.print(line, highlight=False, markup=False)
        elif self.enabled:
            print(line, flush=True)

    def progress(self, record: dict[str, Any], step: int, num_steps: int, seconds_left: float) -> None:
        """Show where the run is: a bar on a terminal, a line elsewhere."""
        memory = f"  {record['peak_gpu_gib']:.1f} GiB" if record["peak_gpu_gib"] else ""
        rate = f"{record['tokens_per_second']:,.0f} tok/s{memory}"
        if self._progress is not None:
            every = self._save_steps or num_steps
            saves = f"saves at {min(num_steps, (step // every + 1) * every)}" if step < num_steps else "saving"
            description = f"loss {record['loss']:.4f}  {rate}  {saves}"
            self._progress.update(self._task, completed=step, description=description)
            return
        self.show(
            f"step {step}/{num_steps}  loss {record['loss']:.4f}  grad norm {record['grad_norm']:.2f}"
            f"  lr {record['lr']:.2e}  {rate}  {seconds_left / 60:.1f} min left"
        )

    def _everywhere(self, action: Callable[[Logger], None]) -> None:
        """Do it with every sink; one that fails is left out from then on."""
        for name, sink in list(self._sinks.items()):
            try:
                action(sink)
            except Exception as error:  # see above
                self._warn(name, error)
                del self._sinks[name]

    def _warn(self, name: str, error: Exception) -> None:
        warnings.warn(
            f"{name} failed and is switched off ({type(error).__name__}: {error}); training goes on", stacklevel=3
        )


def memory_gib(device: torch.device) -> float:
    """Return the peak GPU memory reserved by this process in GiB, 0 on the CPU."""
    return torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0

"""Where time and memory go: a trace of a few steps, and the history of the GPU's memory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.errors import ConfigError

SKIPPED_STEPS, PROFILED_STEPS = 3, 3
"""The first steps compile and allocate; the ones after them are alike."""

HISTORY_ENTRIES = 200_000


def check_profiling(config: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError for a memory history of a device that keeps none."""
    if config.memory_snapshot and device.type != "cuda":
        raise ConfigError(
            f"--memory_snapshot: only GPUs keep a history of their memory, and this run is on the {device.type};"
            " leave it out"
        )


@contextlib.contextmanager
def profiling(config: TrainConfig, ranks: Ranks, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Record, for the length of a `with` block, what --profile and --memory_snapshot ask for.

    Steps are counted by those of the optimizer.
    """
    with contextlib.ExitStack() as stack:
        if config.profile:
            stack.enter_context(
                _trace(Path(config.output_dir) / f"profile-rank-{ranks.rank}.json.gz", ranks, optimizer)
            )
        if config.memory_snapshot:
            stack.enter_context(
                _memory_history(Path(config.output_dir) / f"memory-rank-{ranks.rank}.pickle", optimizer)
            )
        yield


@contextlib.contextmanager
def _trace(path: Path, ranks: Ranks, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if ranks.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=SKIPPED_STEPS - 1, warmup=1, active=PROFILED_STEPS, repeat=1),
        on_trace_ready=lambda finished: finished.export_chrome_trace(str(path)),
    )
    with profiler:
        hook = optimizer.register_step_post_hook(lambda *_: profiler.step())
        try:
            yield
        finally:
            hook.remove()
    if profiler.step_num <= SKIPPED_STEPS:
        warnings.warn(f"--profile: no step was traced, as the first {SKIPPED_STEPS} never are", stacklevel=2)


@contextlib.contextmanager
def _memory_history(path: Path, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Write the history after the profiled steps, or at an error before: running out of memory is one."""
    steps = 0

    def save() -> None:
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
        torch.cuda.memory._record_memory_history(enabled=None)

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == SKIPPED_STEPS + PROFILED_STEPS:
            save()

    torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)
    hook = optimizer.register_step_post_hook(count)
    try:
        yield
    finally:
        hook.remove()
        if steps < SKIPPED_STEPS + PROFILED_STEPS:
            save()

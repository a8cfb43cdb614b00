"""Downloads once per node, or once per cluster where the nodes share the cache; the other ranks wait."""

from __future__ import annotations

import datetime
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from fsdp_qlora.distributed import Ranks, agree_on_errors, from_main, sum_over_ranks
from fsdp_qlora.errors import WeightsError

REMINDER_S = 30.0
"""How often rank 0 says that it is still waiting."""


def fetch_once(fetch: Callable[[], object], cache: Path | None, ranks: Ranks, timeout_s: int) -> None:
    """Call `fetch` on one process of each node, or on rank 0 alone where all nodes see the same cache.

    Args:
        fetch: fills the cache; may take hours.
        cache: folder that is filled; None if the model is local and `fetch` only looks at it.
        timeout_s: time limit of this wait, which a download may need longer than steps of training.

    Raises:
        FsdpQloraError, on every rank, if `fetch` fails on any.
    """
    if ranks.world_size == 1:
        fetch()
        return
    filled_by_main = cache is not None and _is_filled_by_main(cache, ranks)
    fetches = ranks.local_rank == 0 and not filled_by_main
    # gloo's limit is that of the group: collectives of training must not be given hours
    waiting = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
    with _reminders(ranks), agree_on_errors(ranks, "fetching the model", waiting):
        if fetches:
            fetch()
    dist.destroy_process_group(waiting)


def _is_filled_by_main(cache: Path, ranks: Ranks) -> bool:
    """Return whether this is not rank 0 and sees in `cache` a file that rank 0 makes there. For all ranks to call."""
    file = cache / from_main(f".fsdp-qlora-{uuid.uuid4().hex}")
    with agree_on_errors(ranks, "preparing the cache"):
        if ranks.is_main:
            try:
                cache.mkdir(parents=True, exist_ok=True)
                file.touch()
            except OSError as error:
                raise WeightsError(
                    f"{cache} cannot be written ({error.strerror}); free space or set HF_HOME to another folder"
                ) from error
    seen = file.exists()
    sum_over_ranks(0)  # all have looked
    if ranks.is_main:
        file.unlink()
    return seen and not ranks.is_main


@contextmanager
def _reminders(ranks: Ranks) -> Iterator[None]:
    """Let rank 0 print a line now and then while it is inside the block."""
    done = threading.Event()
    started = time.monotonic()

    def remind() -> None:
        while not done.wait(REMINDER_S):
            print(f"waiting until every node has the model: {time.monotonic() - started:.0f} s so far", flush=True)

    thread = threading.Thread(target=remind, daemon=True, name="reminders")
    if ranks.is_main:
        thread.start()
    try:
        yield
    finally:
        done.set()

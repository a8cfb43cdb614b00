"""Updates of what rests in CPU memory, block after block in a thread, while the GPU begins the next forward."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn


class HostUpdates:
    """Runs one optimizer after another in a thread; a block's forward waits for its own, and for the next one.

    For the next one too, as FSDP gathers the block after the one that computes.

    Args:
        blocks: all decoder blocks in the order of their forward, already with FSDP's hooks: the wait comes before those.
        optimizers: by place among the blocks, the optimizer of what rests in CPU memory of that block.
    """

    def __init__(self, blocks: Sequence[nn.Module], optimizers: Mapping[int, torch.optim.Optimizer]) -> None:
        self._places = sorted(optimizers)
        self._optimizers = [optimizers[place] for place in self._places]
        self._running: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1, "host-updates")
        for place, block in enumerate(blocks if optimizers else []):
            block.register_forward_pre_hook(self._hook(place), prepend=True)

    def start(self, finite: Tensor, factor: Tensor) -> None:
        """Begin all updates, once the earlier ones are done.

        Args:
            finite: whether there is an update at all, a scalar, which may still be computed.
            factor: what gradients are multiplied by, likewise.
        """
        self.finish()
        if self._optimizers:
            decision = self._thread.submit(lambda: (bool(finite), factor.cpu()))
            self._running = [self._thread.submit(_update, optimizer, decision) for optimizer in self._optimizers]

    def finish(self) -> None:
        """Wait for all updates; raises what one of them raised."""
        for running in self._running:
            running.result()
        self._running = []

    def _hook(self, place: int) -> Callable[..., None]:
        last = min(bisect_right(self._places, place), len(self._places) - 1)

        def wait(*_: object) -> None:
            if self._running:
                self._running[last].result()

        return wait


def _update(optimizer: torch.optim.Optimizer, decision: Future[tuple[bool, Tensor]]) -> None:
    finite, factor = decision.result()  # which is there: the thread had it to do before
    if finite:
        shards = (shard for group in optimizer.param_groups for shard in group["params"])
        gradients = [shard.grad for shard in shards if shard.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)
        optimizer.step()
    optimizer.zero_grad()

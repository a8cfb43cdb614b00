"""How well a model predicts held-out text: loss, perplexity and token accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from fsdp_qlora import data
from fsdp_qlora.announce import announced
from fsdp_qlora.distributed import Ranks, end_together, never, sum_over_ranks
from fsdp_qlora.forward import forward
from fsdp_qlora.parallel import LossModel


@torch.no_grad()
def evaluate(
    root: LossModel, loaders: Mapping[str, data.Loader], ranks: Ranks, is_stopping: Callable[[], bool] = never
) -> dict[str, float]:
    """Return the figures over all evaluation sets and, where they have names, of each as 'figure/name'.

    `eval_loss` is the mean loss per target token, `perplexity` its exponential and `token_accuracy` the share of target
    tokens that are the most likely ones. Every rank must call this. Without sets the result is empty.

    Args:
        is_stopping: whether this rank was asked to end; asked before every batch.

    Raises:
        Interrupted: on every rank, if any was asked to end.
    """
    root.eval()
    figures: dict[str, float] = {}
    sums = [_sums(root, loader, ranks, is_stopping) for loader in loaders.values()]
    if sums:
        figures |= _figures(*map(sum, zip(*sums, strict=True)))
    for name, own in zip(loaders, sums, strict=True):
        if name:
            figures |= {f"{figure}/{name}": value for figure, value in _figures(*own).items()}
    return figures


def _sums(
    root: LossModel, loader: data.Loader, ranks: Ranks, is_stopping: Callable[[], bool]
) -> tuple[float, float, float]:
    """Return summed loss, correctly predicted targets and targets of one set, over all ranks."""
    loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
    correct = torch.zeros((), dtype=torch.int64, device=ranks.device)
    num_targets = 0
    steps = loader.num_steps(0)
    for index in announced(range(steps), lambda done: f"evaluating: {done:,} of {steps:,} batches", ranks.is_main):
        end_together(is_stopping(), "evaluating")
        for batch in loader.step(0, index):
            result = forward(root, batch, ranks.device)
            loss += result["loss"]
            correct += result["correct"]
            num_targets += batch.num_targets
    return sum_over_ranks(float(loss.item())), sum_over_ranks(int(correct.item())), sum_over_ranks(num_targets)


def _figures(loss: float, correct: float, num_targets: float) -> dict[str, float]:
    mean = loss / num_targets
    return {
        "eval_loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "token_accuracy": correct / num_targets,
    }

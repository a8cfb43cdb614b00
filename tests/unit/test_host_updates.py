"""Updates that run beside the forward: who waits for which, what is updated, and what happens to errors."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from fsdp_qlora.activation_checkpointing import Block
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.host_updates import HostUpdates
from fsdp_qlora.optim import ShardedAdamW, build_optimizer, gradient_norm

WAIT_S = 20.0
TRUE, ONE = torch.tensor(True), torch.tensor(1.0)


class Gated(torch.optim.Optimizer):
    """An optimizer whose step waits until it is let through, and then notes that it was."""

    def __init__(self, place: int, done: list[int]) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))], {})
        self.place, self.done, self.gate, self.error = place, done, threading.Event(), ""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert self.gate.wait(WAIT_S)
        if self.error:
            raise RuntimeError(self.error)
        self.done.append(self.place)


def gated(num_blocks: int, places: list[int]) -> tuple[list[nn.Module], dict[int, Gated], HostUpdates, list[int]]:
    blocks: list[nn.Module] = [nn.Identity() for _ in range(num_blocks)]
    done: list[int] = []
    optimizers = {place: Gated(place, done) for place in places}
    return blocks, optimizers, HostUpdates(blocks, optimizers), done


def run(block: nn.Module, done: list[int], passed: list[list[int]]) -> None:
    block(ONE)
    passed.append(list(done))


@pytest.mark.parametrize(
    ("places", "waited_for"),
    [
        ([0, 1, 2, 3], [[0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]),
        ([1, 3], [[1], [1, 3], [1, 3], [1, 3]]),
        ([2], [[2], [2], [2], [2]]),
    ],
)
def test_a_block_waits_for_its_own_update_and_the_next(places: list[int], waited_for: list[list[int]]) -> None:
    for place, expected in enumerate(waited_for):
        blocks, optimizers, updates, done = gated(4, places)
        updates.start(TRUE, ONE)
        passed: list[list[int]] = []
        forward = threading.Thread(target=run, args=(blocks[place], done, passed))
        forward.start()
        for needed in expected:
            assert not passed, (place, needed)
            optimizers[needed].gate.set()
        forward.join(WAIT_S)
        assert passed == [expected], place
        for optimizer in optimizers.values():
            optimizer.gate.set()
        updates.finish()
        assert done == places


def test_finish_waits_for_all_and_start_for_the_updates_before() -> None:
    _, optimizers, updates, done = gated(2, [0, 1])
    updates.start(TRUE, ONE)
    threading.Timer(0.2, lambda: [optimizer.gate.set() for optimizer in optimizers.values()]).start()
    updates.start(TRUE, ONE)
    assert done[:2] == [0, 1]
    updates.finish()
    assert done == [0, 1, 0, 1]


def test_an_error_of_an_update_reaches_the_forward_and_whoever_waits() -> None:
    blocks, optimizers, updates, _ = gated(3, [0, 1, 2])
    optimizers[1].error = "no memory"
    for optimizer in optimizers.values():
        optimizer.gate.set()
    updates.start(TRUE, ONE)
    with pytest.raises(RuntimeError, match="no memory"):
        blocks[0](ONE)
    with pytest.raises(RuntimeError, match="no memory"):
        updates.finish()


def test_nothing_is_hooked_or_started_without_anything_to_update() -> None:
    blocks, _, updates, _ = gated(2, [])
    threads = threading.active_count()
    updates.start(TRUE, ONE)
    updates.finish()
    assert not any(block._forward_pre_hooks for block in blocks)
    assert threading.active_count() == threads


class Scale(nn.Module):
    """A block that multiplies by its parameter, a DTensor as FSDP makes them."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.lora_B = nn.Parameter(DTensor.from_local(torch.linspace(1, 2, 6).view(2, 3), ranks.mesh, [Shard(0)]))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.lora_B.to_local()


def model_of(ranks: Ranks) -> nn.Sequential:
    blocks = [Block(Scale(ranks), place, None, None, False) for place in range(3)]
    return nn.Sequential(nn.Linear(3, 3), *blocks)


def train(ranks: Ranks, offloaded: list[int], values: list[float]) -> tuple[list[float], nn.Module, ShardedAdamW]:
    """Return the losses, the model and the optimizer after steps with gradients multiplied by `values`."""
    torch.manual_seed(0)
    model = model_of(ranks)
    config = TrainConfig(lr=0.1, max_grad_norm=0.5, loraplus_lr_ratio=4)
    away = {(model[place + 1].block, "lora_B") for place in offloaded}
    optimizer = build_optimizer(model, config, away)
    losses = []
    for step, value in enumerate(values):
        loss = model(torch.ones(2, 3)).sum()
        losses.append(loss.item())
        (loss * value).backward()
        optimizer.set_lr(0.1 / (step + 1))
        optimizer.step_if_finite(loss.detach(), gradient_norm(model))
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
    optimizer.finish()
    return losses, model, optimizer


@pytest.mark.parametrize("offloaded", [[0, 1, 2], [1]])
@pytest.mark.parametrize("values", [[1.0, 2.0, 0.01, 3.0], [1.0, math.nan, 1.0], [math.inf, 1.0]])
def test_training_is_bit_for_bit_the_same_beside_the_forward(
    ranks: Ranks, offloaded: list[int], values: list[float]
) -> None:
    losses, model, optimizer = train(ranks, [], values)
    found_losses, found, beside = train(ranks, offloaded, values)
    assert found_losses == losses
    assert len(set(losses)) == sum(map(math.isfinite, values[:-1])) + 1
    for parameter, other in zip(model.parameters(), found.parameters(), strict=True):
        shard, other_shard = optimizer.shards[parameter], beside.shards[other]
        assert shard.equal(other_shard)
        assert set(optimizer.state[shard]) == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in optimizer.state[shard].items():
            assert value.equal(beside.state[other_shard][name]), name

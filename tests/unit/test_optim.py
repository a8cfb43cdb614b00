"""Learning-rate schedules, clipping and the optimizer's parameters."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from fsdp_qlora import optim
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks, process_group
from fsdp_qlora.optim import build_optimizer, gradient_norm, learning_rate, sum_replicas
from tests.ranks import run_ranks


def rates(num_steps: int, **settings: object) -> list[float]:
    config = TrainConfig(lr=1.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_schedules_after_a_warmup_of_two_steps(scheduler: str, expected: list[float]) -> None:
    assert rates(6, lr_scheduler=scheduler, warmup_ratio=0.3) == pytest.approx(expected)


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
def test_rates_without_warmup_and_with_nothing_else(scheduler: str) -> None:
    assert rates(4, lr_scheduler=scheduler, warmup_ratio=0.0)[0] == 1.0
    assert rates(4, lr_scheduler=scheduler, warmup_ratio=1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates(1, lr_scheduler=scheduler, warmup_ratio=0.03) == [1.0]


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [2, 3, 10, 1000])
def test_decay_is_monotonous_and_ends_above_zero(scheduler: str, num_steps: int) -> None:
    found = rates(num_steps, lr_scheduler=scheduler, warmup_ratio=0.0)
    assert all(before > after > 0 for before, after in itertools.pairwise(found))
    assert learning_rate(TrainConfig(lr_scheduler=scheduler), num_steps, num_steps) == pytest.approx(0)  # type: ignore[arg-type]


def model_with_gradients(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 2))
    model[1].requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter) * scale
    model[2].bias.grad = None  # not reached by the loss
    return model


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_clipping_is_torchs_own(max_norm: float) -> None:
    model, reference = model_with_gradients(), model_with_gradients()
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    norm = gradient_norm(model)
    assert norm.equal(expected)
    build_optimizer(model, TrainConfig(max_grad_norm=max_norm)).step_if_finite(torch.tensor(1.0), norm)
    for parameter, other in zip(model.parameters(), reference.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            assert parameter.grad.equal(other.grad)


def test_norm_zero_leaves_gradients_alone() -> None:
    model, reference = model_with_gradients(100.0), model_with_gradients(100.0)
    norm = gradient_norm(model)
    build_optimizer(model, TrainConfig(max_grad_norm=0.0)).step_if_finite(torch.tensor(1.0), norm)
    gradients = [parameter.grad for parameter in reference.parameters() if parameter.grad is not None]
    assert norm.item() == pytest.approx(
        math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)), rel=1e-6
    )
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(one.equal(other) for one, other in zip(found, gradients, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_returned_as_such(value: float) -> None:
    model = model_with_gradients()
    gradient = model[0].bias.grad
    assert gradient is not None
    gradient[2] = value
    assert not gradient_norm(model).isfinite()


def test_optimizer_has_the_trainable_parameters_and_the_settings() -> None:
    model = model_with_gradients()
    config = TrainConfig(lr=0.5, adam_beta1=0.8, adam_beta2=0.7, weight_decay=0.1)
    (group,) = build_optimizer(model, config).param_groups
    assert [id(parameter) for parameter in group["params"]] == [
        id(parameter) for parameter in model.parameters() if parameter.requires_grad
    ]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.7), 0.1)


def test_loraplus_gives_lora_B_a_group_of_its_own() -> None:
    model = nn.Module()
    model.lora_A, model.lora_B = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, 2))
    slow, fast = build_optimizer(model, TrainConfig(lr=0.5, loraplus_lr_ratio=16)).param_groups
    assert (slow["params"], slow["lr_ratio"]) == ([model.lora_A], 1)
    assert (fast["params"], fast["lr_ratio"]) == ([model.lora_B], 16)


def test_sharded_parameters_are_updated_as_plain_ones_wherever_their_rows_are(ranks: Ranks) -> None:
    """FSDP puts rows that it pads into other memory in its first forward, which is after the optimizer was made."""
    config = TrainConfig(lr=0.1, max_grad_norm=0.5)
    plain, sharded = nn.Module(), nn.Module()
    plain.lora_A = nn.Parameter(torch.ones(3, 4))
    sharded.lora_A = nn.Parameter(DTensor.from_local(torch.ones(3, 4), ranks.mesh, [Shard(0)]))
    optimizers = [build_optimizer(model, config) for model in (plain, sharded)]
    assert not isinstance(optimizers[1].param_groups[0]["params"][0], DTensor)
    for step in range(2):
        sharded.lora_A._local_tensor = sharded.lora_A._local_tensor.clone()
        gradient = torch.randn(3, 4)
        plain.lora_A.grad, sharded.lora_A.grad = (
            gradient.clone(),
            DTensor.from_local(gradient.clone(), ranks.mesh, [Shard(0)]),
        )
        norms = [gradient_norm(model) for model in (plain, sharded)]
        assert norms[0].item() == norms[1].item() == pytest.approx(float(gradient.norm()))
        for optimizer, norm in zip(optimizers, norms, strict=True):
            optimizer.step_if_finite(torch.tensor(1.0), norm)
            optimizer.zero_grad()
        assert sharded.lora_A.to_local().equal(plain.lora_A), step
        assert not plain.lora_A.allclose(torch.ones(3, 4))
        assert sharded.lora_A.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_update_where_a_value_is_not_finite(value: float) -> None:
    model = model_with_gradients()
    optimizer = build_optimizer(model, TrainConfig(lr=0.1))
    optimizer.step_if_finite(torch.tensor(1.0), torch.tensor(2.0))
    parameters = [parameter.detach().clone() for parameter in model.parameters()]
    state = {key: {name: value.clone() for name, value in one.items()} for key, one in optimizer.state.items()}
    optimizer.step_if_finite(torch.tensor(1.0), torch.tensor(value))
    assert all(one.equal(other) for one, other in zip(model.parameters(), parameters, strict=True))
    for key, values in state.items():
        assert all(values[name].equal(optimizer.state[key][name]) for name in values)
    optimizer.step_if_finite(torch.tensor(1.0), torch.tensor(2.0))
    assert not model[0].weight.equal(parameters[0])


SHAPES = [(3, 4), (2,), (5, 5), (1, 2), (2, 3)]
"""Of trained parameters: in buckets of 80 bytes the first two, the third, which is larger, and the others."""


def sum_on_rank(sharding: str) -> list[list[float]]:
    """Give this rank's parameters gradients that tell its number, rank 1's second one none; return their sums."""
    optim.BUCKET_BYTES = 80
    with process_group(sharding, 60, device="cpu") as ranks:
        root = nn.Module()
        for number, shape in enumerate(SHAPES):
            parameter = nn.Parameter(torch.zeros(shape))
            parameter.grad = torch.arange(parameter.numel()).view(shape) + 100.0 ** (ranks.rank + 1)
            root.register_parameter(f"trained_{number}", parameter)
        root.register_parameter("frozen", nn.Parameter(torch.zeros(3), requires_grad=False))
        if ranks.rank == 1:
            root.trained_1.grad = None
        sum_replicas(root, ranks)
        assert root.frozen.grad is None
        found: list[Any] = [parameter.grad for parameter in root.parameters() if parameter.requires_grad]
        assert [tuple(gradient.shape) for gradient in found] == SHAPES
        return [gradient.flatten().tolist() for gradient in found]


def test_gradients_of_copies_are_summed() -> None:
    for found in run_ranks(sum_on_rank, 2, "none"):
        for number, gradient in enumerate(found):
            times, offset = (1, 100) if number == 1 else (2, 10100)
            assert gradient == [times * index + offset for index in range(len(gradient))], number


class Sized:
    """Stands for a parameter of 8 bytes, and counts how often that was asked."""

    asked = 0

    @property
    def nbytes(self) -> int:
        Sized.asked += 1
        return 8


def test_making_buckets_of_a_thousand_parameters_is_not_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a 70B model there are 1,120: 14 ms of every step it would take."""
    monkeypatch.setattr(optim, "BUCKET_BYTES", 4804)
    buckets = list(optim._buckets([Sized() for _ in range(1120)]))  # type: ignore[misc]
    assert [len(bucket) for bucket in buckets] == [600, 520]
    assert Sized.asked <= 3 * 1120

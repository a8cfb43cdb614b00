"""The load-balancing loss of mixture-of-experts models, the same however a step is split over ranks and micro-batches.

Of one row of tokens (Switch Transformer, arXiv:2101.03961, as transformers computes it):

    aux = E * sum_e f_e * P_e    f_e: choices of expert e, P_e: probability of e; per token, mean over tokens and layers

transformers takes a whole micro-batch at once, which makes the result depend on what else is in it. Here each row counts by
itself and with its target tokens as its weight, so that the sum over rows, divided like the token losses by all targets of
the step, is a mean over rows. With one row a micro-batch the two are the same.

f and P are sums over all layers, so a layer's gradient is known only after the last one; and a block that runs again in
backward must not be counted again. Hence forward only counts, and what the routers return carries the gradient in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fsdp_qlora.quant.experts import QuantizedExperts


class RouterBalance:
    """Counts what the routers choose in one forward, and gives each its gradient in the backward that follows.

    Args:
        coefficient: weight of the loss.
        num_experts, num_layers: E, and the routers that are counted.
    """

    def __init__(self, coefficient: float, num_experts: int, num_layers: int) -> None:
        self.coefficient, self.num_experts, self.num_layers = coefficient, num_experts, num_layers
        self.scale = torch.ones(())
        self._counts = False

    def begin(self, shape: torch.Size, target_positions: Tensor) -> None:
        """Start a forward on tokens [batch, tokens].

        Args:
            target_positions: int64 [targets], positions among the batch * tokens ones; what comes after a row's last target
                and the token it predicts is taken for padding.
        """
        batch, tokens = shape
        device = target_positions.device
        rows = target_positions // tokens
        self._targets_B = torch.bincount(rows, minlength=batch).float()
        last_B = torch.full((batch,), -2, device=device).scatter_reduce(0, rows, target_positions % tokens, "amax")
        self._real_BT = torch.arange(tokens, device=device) <= last_B.unsqueeze(1) + 1
        self._size_B = self._real_BT.sum(1).clamp(min=1) * float(self.num_layers)
        self._choices_BE = torch.zeros(batch, self.num_experts, device=device)
        self._probabilities_BE = torch.zeros(batch, self.num_experts, device=device)
        self._counts = True

    def add_to(self, loss: Tensor) -> Tensor:
        """End the forward; return `loss`, the sum of the token losses, plus the balancing loss."""
        self._counts = False
        shares_BE = self._choices_BE * self._probabilities_BE / self._size_B.unsqueeze(1).square()
        value = self.coefficient * self.num_experts * (self._targets_B * shares_BE.sum(1)).sum()
        result: Tensor = _AddBalance.apply(loss, value, self)  # type: ignore[no-untyped-call]
        return result

    # the counts are not for torch.compile, which would trace them anew in every step
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def watch(
        self, router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Forward hook of transformers' routers, which return logits [N, E], weights [N, K] and experts [N, K]."""
        logits, weights, experts = output
        if self._counts:
            self._count(logits.detach(), experts)
        if torch.is_grad_enabled():
            weights = _CarryGradient.apply(weights, logits, self)  # type: ignore[no-untyped-call]
        return logits, weights, experts

    def _count(self, logits: Tensor, experts: Tensor) -> None:
        batch, tokens = self._real_BT.shape
        real_BT1 = self._real_BT.unsqueeze(2).float()
        probabilities = torch.softmax(logits.float(), dim=-1).view(batch, tokens, -1)
        self._probabilities_BE += (probabilities * real_BT1).sum(1)
        chosen = experts.view(batch, -1)
        self._choices_BE.scatter_add_(1, chosen, real_BT1.expand(batch, tokens, experts.shape[-1]).reshape(batch, -1))

    def gradient(self, logits_NE: Tensor) -> Tensor:
        """Return the gradient of the step's loss by the logits of one router."""
        factor_B = self.scale * self.coefficient * self.num_experts * self._targets_B / self._size_B.square()
        by_probability = (factor_B.unsqueeze(1) * self._choices_BE).unsqueeze(1) * self._real_BT.unsqueeze(2)
        probabilities = torch.softmax(logits_NE.float(), dim=-1).view_as(by_probability)
        mean = (by_probability * probabilities).sum(-1, keepdim=True)
        return (probabilities * (by_probability - mean)).view_as(logits_NE).to(logits_NE.dtype)


class _AddBalance(torch.autograd.Function):
    """Add the balancing loss, and note in backward what the sum is multiplied by."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor, balance: RouterBalance) -> Tensor:
        ctx.balance = balance
        return loss + value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.balance.scale = grads[0]
        return grads[0], None, None


class _CarryGradient(torch.autograd.Function):
    """Return the weights as they are; in backward give the logits the gradient of the balancing loss."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, logits: Tensor, balance: RouterBalance) -> Tensor:
        ctx.balance = balance
        ctx.save_for_backward(logits)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], ctx.balance.gradient(*ctx.saved_tensors), None


def balance_routers(model: nn.Module, config: PretrainedConfig, coefficient: float | None) -> RouterBalance | None:
    """Return the load-balancing loss of a model, whose routers are watched from now on; None if it has none.

    Args:
        config: the model's; with output_router_logits its router_aux_loss_coef counts, as in transformers.
        coefficient: used instead, if given.
    """
    if coefficient is None:
        coefficient = float(config.router_aux_loss_coef) if getattr(config, "output_router_logits", False) else 0.0
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedExperts)]
    if not found or coefficient == 0:
        return None
    balance = RouterBalance(coefficient, found[0][1].layouts[0].num_matrices, len(found))
    for name, _ in found:
        router = model.get_submodule(f"{name.rpartition('.')[0]}.gate")
        router.register_forward_hook(balance.watch)
    return balance

"""The experts of a mixture-of-experts layer: frozen 4-bit matrices, of which only those that are hit are dequantised.

    y_t = sum over the experts e of token t:  w_te * down_e(act(gate_e(x_t)) * up_e(x_t))

transformers 5 holds the experts of a layer as two stacks in 16 bits, gate and up projections joined. Here each expert's
gate, up and down matrix is quantised on its own, as checkpoints store them, and the same matrix of all experts is one flat
parameter: expert after expert, each with its own statistics. Each of the two stacks may have LoRA (expert_lora.py).

Forward and backward work on a group of experts at a time, of whom only those that have tokens are dequantised: all their
gate matrices in one launch, then up, then down, and their products in one each. One of the three is alive at a time, at most
GROUP_BYTES; a group's tokens are no more than those of the layer's input. Saved for backward are the input, and what gate
and up gave for the tokens of each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_qlora.quant.dequantize import dequantize_experts
from fsdp_qlora.quant.expert_lora import ExpertLora, Factors, Gradients, factors_of
from fsdp_qlora.quant.grouped import Group, grouped_product
from fsdp_qlora.quant.layout import Layout

PARTS = ("gate_proj", "up_proj", "down_proj")

GROUP_BYTES = 64 << 20
"""Most bytes of matrices that are dequantised together, where one matrix is not larger."""


def group_size(layout: Layout, dtype: torch.dtype) -> int:
    """Return the most experts whose matrices are dequantised together."""
    return min(layout.num_matrices, max(1, GROUP_BYTES // (layout.num_weights * dtype.itemsize)))


class ExpertStack(nn.Module):
    """One matrix of every expert of a layer, as one flat 4-bit parameter `packed`.

    Args:
        name: name of the stack, such as model.layers.0.mlp.experts.gate_proj.
        layout: of one expert's matrix, with the number of experts.
    """

    packed: nn.Parameter

    def __init__(self, name: str, layout: Layout, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.name, self.layout = name, layout
        packed = torch.empty(layout.numel, dtype=layout.storage_dtype, device=device)
        self.packed = nn.Parameter(packed, requires_grad=False)

    def matrix_names(self) -> list[str]:
        """Return the names of the experts' matrices, as in model.layers.0.mlp.experts.7.gate_proj.weight."""
        experts, _, part = self.name.rpartition(".")
        return [f"{experts}.{expert}.{part}.weight" for expert in range(self.layout.num_matrices)]

    def extra_repr(self) -> str:
        layout = self.layout
        return f"{layout.num_matrices} x ({layout.in_features} -> {layout.out_features}), {layout.quant_type}"


@dataclass(frozen=True)
class _Routed:
    """The tokens of each expert, N = tokens * experts per token in all, sorted by expert.

    Attributes:
        slots_N: places among the flattened [tokens, experts per token] choices.
        tokens_N: the tokens of those places.
        counts: tokens of each expert.
        ends: where those of each expert end among N, int32 [experts] on the device.
    """

    slots_N: Tensor
    tokens_N: Tensor
    counts: list[int]
    ends: Tensor

    def groups(self, most_tokens: int, most_experts: int) -> Iterator[tuple[Group, slice]]:
        """Yield the experts in groups of so many tokens (or of one expert) and experts, with their places among N.

        A group in which no expert has tokens is left out.
        """
        first = start = 0
        while first < len(self.counts):
            last, stop = first + 1, start + self.counts[first]
            limit = min(len(self.counts), first + most_experts)
            while last < limit and stop + self.counts[last] - start <= most_tokens:
                stop += self.counts[last]
                last += 1
            if stop > start:
                yield Group(first, self.counts[first:last], self.ends[first:last] - start), slice(start, stop)
            first, start = last, stop


def _route(top_k_index: Tensor, num_experts: int) -> _Routed:
    experts_N, slots_N = top_k_index.flatten().sort(stable=True)
    numbers = torch.arange(num_experts, device=experts_N.device)
    ends = torch.searchsorted(experts_N, numbers, right=True, out_int32=True)
    # the only wait for the device; bincount would add two
    counts = [stop - start for start, stop in pairwise([0, *ends.tolist()])]
    return _Routed(slots_N, slots_N // top_k_index.shape[1], counts, ends)


def _outputs(x_NI: Tensor, packed: Tensor, layout: Layout, group: Group) -> Tensor:
    """Return x W_e^T for the tokens of a group, [tokens, out]."""
    return grouped_product(x_NI, dequantize_experts(packed, layout, group, x_NI.dtype), group)


def _input_gradients(dy_NO: Tensor, packed: Tensor, layout: Layout, group: Group) -> Tensor:
    """Return dy W_e for the tokens of a group, [tokens, in]."""
    return grouped_product(dy_NO, dequantize_experts(packed, layout, group, dy_NO.dtype).transpose(1, 2), group)


def _add_to_tokens(total_TD: Tensor, rows_ND: Tensor, tokens_N: Tensor) -> None:
    """Add each row to its token, always in the same order."""
    if total_TD.is_cuda:  # sorts; index_add_ is in no order, index_put_ waits for the device to check the indices
        torch._index_put_impl_(total_TD, (tokens_N,), rows_ND, accumulate=True, unsafe=True)
    else:  # row by row, where index_put_ is in no order on several threads
        total_TD.index_add_(0, tokens_N, rows_ND)


@dataclass(frozen=True)
class _Settings:
    """What stays the same from one call to the next.

    Attributes:
        layouts: of gate [inner, hidden], up [inner, hidden] and down [hidden, inner], with the number of experts.
        act: activation of the gate.
        scalings: LoRA's factors of gate and up together, and of down.
    """

    layouts: tuple[Layout, Layout, Layout]
    act: Callable[[Tensor], Tensor]
    scalings: tuple[float, float]

    def factors(self, lora: Sequence[Tensor | None], dtype: torch.dtype) -> Iterator[Factors | None]:
        """Yield LoRA of gate and up, and of down, from lora_A and lora_B of both; None where there is none."""
        for lora_A, lora_B, scaling in zip(lora[::2], lora[1::2], self.scalings, strict=True):
            if lora_A is None or lora_B is None:
                yield None
            else:
                yield factors_of(lora_A, lora_B, self.layouts[0].num_matrices, scaling, dtype)

    def gradients(self, lora: Sequence[Tensor | None], dtype: torch.dtype) -> Iterator[Gradients | None]:
        """Yield their gradients, to be filled."""
        for lora_A, lora_B, factors in zip(lora[::2], lora[1::2], self.factors(lora, dtype), strict=True):
            if factors is None or lora_A is None or lora_B is None:
                yield None
            else:
                yield Gradients(lora_A, lora_B, factors)


class ExpertsFunction(torch.autograd.Function):
    """Forward and backward of all experts of a layer; gradients for the input, the weights of the choices and LoRA."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        top_k_index: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        settings: _Settings,
        skip_product: bool,
        *lora: Tensor | None,
    ) -> Tensor:
        layouts, inner = settings.layouts, settings.layouts[0].out_features
        routed = _route(top_k_index, layouts[0].num_matrices)
        lora_gate_up, lora_down = settings.factors(lora, x_TD.dtype)
        keeps = any(ctx.needs_input_grad)
        gate_up_N2I = x_TD.new_empty(len(routed.slots_N) if keeps else 0, 2 * inner)
        weights_N = weights_TK.flatten()[routed.slots_N]
        y_TD = torch.empty_like(x_TD) if skip_product else torch.zeros_like(x_TD)
        for group, rows in routed.groups(len(x_TD), group_size(layouts[0], x_TD.dtype)):
            tokens = routed.tokens_N[rows]
            x = x_TD[tokens]
            gate_up = gate_up_N2I[rows] if keeps else x.new_empty(len(x), 2 * inner)
            g, u = gate_up.chunk(2, dim=1)
            g.copy_(_outputs(x, gate, layouts[0], group))
            u.copy_(_outputs(x, up, layouts[1], group))
            if lora_gate_up is not None:
                gate_up += lora_gate_up.output(x, group)
            if skip_product:
                continue
            h = settings.act(g) * u
            y = _outputs(h, down, layouts[2], group)
            if lora_down is not None:
                y += lora_down.output(h, group)
            _add_to_tokens(y_TD, y.mul_(weights_N[rows, None]), tokens)
        ctx.save_for_backward(x_TD, weights_N, gate_up_N2I, gate, up, down, *lora)
        ctx.routed, ctx.settings, ctx.weights_shape = routed, settings, weights_TK.shape
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TD,) = grads
        x_TD, weights_N, gate_up_N2I, gate, up, down, *lora = ctx.saved_tensors
        routed: _Routed = ctx.routed
        settings: _Settings = ctx.settings
        layouts, inner = settings.layouts, settings.layouts[0].out_features
        of_gate_up, of_down = settings.gradients(lora, dy_TD.dtype)
        dx_TD = torch.zeros_like(x_TD)
        dweights_N = torch.empty_like(weights_N)
        for group, rows in routed.groups(len(x_TD), group_size(layouts[0], dy_TD.dtype)):
            tokens, weights = routed.tokens_N[rows], weights_N[rows, None]
            gate_up = gate_up_N2I[rows].detach().requires_grad_()
            with torch.enable_grad():
                g, u = gate_up.chunk(2, dim=1)
                h = settings.act(g) * u
            dy = dy_TD[tokens]
            dh = _input_gradients(dy, down, layouts[2], group)
            if of_down is not None:
                dh += of_down.add(h.detach(), dy, group, weights)
            dweights_N[rows] = (dh * h.detach()).sum(1, dtype=torch.float32).to(dweights_N.dtype)
            (dgate_up,) = torch.autograd.grad(h, gate_up, (dh * weights).to(h.dtype))
            dx = _input_gradients(dgate_up[:, :inner], gate, layouts[0], group)
            dx += _input_gradients(dgate_up[:, inner:], up, layouts[1], group)
            if of_gate_up is not None:
                dx += of_gate_up.add(x_TD[tokens], dgate_up, group)
            _add_to_tokens(dx_TD, dx, tokens)
        dweights = torch.empty_like(dweights_N)
        dweights[routed.slots_N] = dweights_N
        return dx_TD, dweights.view(ctx.weights_shape), *(None,) * 6, *_matrices((of_gate_up, of_down))


def _matrices(pairs: Iterable[ExpertLora | Gradients | None]) -> Iterator[Tensor | None]:
    """Yield lora_A and lora_B of each, None where there is no LoRA."""
    for pair in pairs:
        yield from (None, None) if pair is None else (pair.lora_A, pair.lora_B)


class QuantizedExperts(nn.Module):
    """Takes the place of transformers' experts module, with the same call.

    Args:
        name: name of the module it replaces, such as model.layers.0.mlp.experts.
        layouts: of gate [inner, hidden], up [inner, hidden] and down [hidden, inner], with the number of experts.
        act: activation of the gate.
        lora: LoRA of gate and up together, and of down.

    Attributes:
        skip_product: leave out the down projection and return an unset output, for a second run of which only the
            gradients are wanted.
    """

    def __init__(
        self,
        name: str,
        layouts: tuple[Layout, Layout, Layout],
        act: Callable[[Tensor], Tensor],
        lora: tuple[ExpertLora | None, ExpertLora | None] = (None, None),
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            ExpertStack(f"{name}.{part}", layout) for part, layout in zip(PARTS, layouts, strict=True)
        )
        self.gate_up_lora, self.down_lora = lora
        scaling, down_scaling = (1.0 if pair is None else pair.scaling for pair in lora)
        self.layouts, self._settings = layouts, _Settings(layouts, act, (scaling, down_scaling))
        self.skip_product = False

    # which experts run depends on the data, which torch.compile cannot trace: the rest of the block is compiled around it
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts [tokens, hidden].

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, experts per token].
            top_k_weights: [tokens, experts per token].
        """
        stacks = (self.gate_proj.packed, self.up_proj.packed, self.down_proj.packed)
        lora = _matrices((self.gate_up_lora, self.down_lora))
        y: Tensor = ExpertsFunction.apply(  # type: ignore[no-untyped-call]
            hidden_states, top_k_weights, top_k_index, *stacks, self._settings, self.skip_product, *lora
        )
        return y

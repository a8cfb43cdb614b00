"""The experts of a mixture-of-experts layer: frozen 4-bit matrices, of which only those that are hit are dequantised.

    y_t = sum over the experts e of token t:  w_te * down_e(act(gate_e(x_t)) * up_e(x_t))

transformers 5 holds the experts of a layer as two stacks in 16 bits, gate and up projections joined. Here each expert's
gate, up and down matrix is quantised on its own, as checkpoints store them, and the same matrix of all experts is one flat
parameter: expert after expert, each with its own statistics. Each of the two stacks may have LoRA (expert_lora.py).

One dequantised matrix is alive at a time, forward and backward; saved for backward are the input, and what gate and up
gave for the tokens of each expert. All else is made for a group of experts at a time, whose tokens are no more than those of
the layer's input: small products are many, and what is not one of them should not be done once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fsdp_qlora.quant.dequantize import dequantize
from fsdp_qlora.quant.expert_lora import ExpertLora, Factors, Gradients, factors_of
from fsdp_qlora.quant.grouped import Group
from fsdp_qlora.quant.layout import Layout

PARTS = ("gate_proj", "up_proj", "down_proj")


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

    def groups(self, most: int) -> Iterator[tuple[Group, slice]]:
        """Yield all experts in groups of at most `most` tokens (or of one expert), with their places among N."""
        first = start = 0
        while first < len(self.counts):
            last, stop = first + 1, start + self.counts[first]
            while last < len(self.counts) and stop + self.counts[last] - start <= most:
                stop += self.counts[last]
                last += 1
            yield Group(first, self.counts[first:last], self.ends[first:last] - start), slice(start, stop)
            first, start = last, stop


def _route(top_k_index: Tensor, num_experts: int) -> _Routed:
    flat = top_k_index.flatten()
    slots = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    ends = counts.cumsum(0, dtype=torch.int32)
    return _Routed(slots, slots // top_k_index.shape[1], counts.tolist(), ends)


def _matrix(packed: Tensor, layout: Layout, expert: int, dtype: torch.dtype, use: str) -> Tensor:
    """Return one expert's matrix [out, in]."""
    section = layout.matrix_range(expert)
    return dequantize(packed.view(torch.uint8)[section.start : section.stop], layout, dtype, use)


def _product(total: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    """Set `total` to left @ right, or add that to it."""
    if add:
        total.addmm_(left, right)
    else:
        torch.mm(left, right, out=total)


def _outputs(y_NO: Tensor, x_NI: Tensor, packed: Tensor, layout: Layout, group: Group, add: bool) -> None:
    """Set y to x W_e^T, or add that to it, for the tokens of a group."""
    for expert, run in group.hit():
        _product(y_NO[run], x_NI[run], _matrix(packed, layout, expert, x_NI.dtype, "forward").t(), add)


def _input_gradients(dx_NI: Tensor, dy_NO: Tensor, packed: Tensor, layout: Layout, group: Group, add: bool) -> None:
    """Set dx to dy W_e, or add that to it, for the tokens of a group."""
    for expert, run in group.hit():
        _product(dx_NI[run], dy_NO[run], _matrix(packed, layout, expert, dy_NO.dtype, "backward"), add)


def _add_to_tokens(total_TD: Tensor, rows_ND: Tensor, tokens_N: Tensor, group: Group) -> None:
    """Add each row to its token; an expert at a time, in which no token comes twice: always in the same order."""
    for _, run in group.hit():
        total_TD.index_add_(0, tokens_N[run], rows_ND[run])


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
        for group, rows in routed.groups(len(x_TD)):
            tokens = routed.tokens_N[rows]
            x = x_TD[tokens]
            gate_up = gate_up_N2I[rows] if keeps else x.new_empty(len(x), 2 * inner)
            if lora_gate_up is not None:
                gate_up.copy_(lora_gate_up.output(x, group))
            g, u = gate_up.chunk(2, dim=1)
            _outputs(g, x, gate, layouts[0], group, add=lora_gate_up is not None)
            _outputs(u, x, up, layouts[1], group, add=lora_gate_up is not None)
            if skip_product:
                continue
            h = settings.act(g) * u
            y = torch.empty_like(x) if lora_down is None else lora_down.output(h, group)
            _outputs(y, h, down, layouts[2], group, add=lora_down is not None)
            _add_to_tokens(y_TD, y.mul_(weights_N[rows, None]), tokens, group)
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
        for group, rows in routed.groups(len(x_TD)):
            tokens, weights = routed.tokens_N[rows], weights_N[rows, None]
            gate_up = gate_up_N2I[rows].detach().requires_grad_()
            with torch.enable_grad():
                g, u = gate_up.chunk(2, dim=1)
                h = settings.act(g) * u
            dy = dy_TD[tokens]
            dh = torch.empty_like(h) if of_down is None else of_down.add(h.detach(), dy, group, weights)
            _input_gradients(dh, dy, down, layouts[2], group, add=of_down is not None)
            dweights_N[rows] = (dh * h.detach()).sum(1, dtype=torch.float32).to(dweights_N.dtype)
            (dgate_up,) = torch.autograd.grad(h, gate_up, (dh * weights).to(h.dtype))
            dx = torch.empty_like(dy) if of_gate_up is None else of_gate_up.add(x_TD[tokens], dgate_up, group)
            _input_gradients(dx, dgate_up[:, :inner], gate, layouts[0], group, add=of_gate_up is not None)
            _input_gradients(dx, dgate_up[:, inner:], up, layouts[1], group, add=True)
            _add_to_tokens(dx_TD, dx, tokens, group)
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

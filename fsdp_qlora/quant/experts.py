"""The experts of a mixture-of-experts layer: frozen 4-bit matrices, of which only those that are hit are dequantised.

    y_t = sum over the experts e of token t:  w_te * down_e(act(gate_e(x_t)) * up_e(x_t))

transformers 5 holds the experts of a layer as two stacks in 16 bits, gate and up projections joined. Here each expert's
gate, up and down matrix is quantised on its own, as checkpoints store them, and the same matrix of all experts is one flat
parameter: expert after expert, each with its own statistics. One dequantised matrix is alive at a time, forward and
backward; saved for backward are the input, and what gate and up gave for the tokens of each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_qlora.quant.dequantize import dequantize
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
    """

    slots_N: Tensor
    tokens_N: Tensor
    counts: list[int]

    def hit(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has tokens, with its run among N."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count > 0:
                yield expert, slice(start, start + count)
            start += count


def _route(top_k_index: Tensor, num_experts: int) -> _Routed:
    flat = top_k_index.flatten()
    slots = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    return _Routed(slots, slots // top_k_index.shape[1], counts)


def _matrix(packed: Tensor, layout: Layout, expert: int, dtype: torch.dtype, use: str) -> Tensor:
    """Return one expert's matrix [out, in]."""
    section = layout.matrix_range(expert)
    return dequantize(packed.view(torch.uint8)[section.start : section.stop], layout, dtype, use)


class ExpertsFunction(torch.autograd.Function):
    """Forward and backward of all experts of a layer; gradients for the input and the weights of the choices."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        top_k_index: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        layouts: tuple[Layout, Layout, Layout],
        act: Callable[[Tensor], Tensor],
        skip_product: bool,
    ) -> Tensor:
        routed = _route(top_k_index, layouts[0].num_matrices)
        keeps = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        inner = (len(routed.slots_N), layouts[0].out_features) if keeps else (0, 0)
        gate_NI, up_NI = x_TD.new_empty(inner), x_TD.new_empty(inner)
        weights_N = weights_TK.flatten()[routed.slots_N]
        y_TD = torch.empty_like(x_TD) if skip_product else torch.zeros_like(x_TD)
        for expert, run in routed.hit():
            tokens = routed.tokens_N[run]
            x = x_TD[tokens]
            g = F.linear(x, _matrix(gate, layouts[0], expert, x.dtype, "forward"))
            u = F.linear(x, _matrix(up, layouts[1], expert, x.dtype, "forward"))
            if keeps:
                gate_NI[run], up_NI[run] = g, u
            if not skip_product:
                y = F.linear(act(g) * u, _matrix(down, layouts[2], expert, x.dtype, "forward"))
                y_TD.index_add_(0, tokens, (y * weights_N[run, None]).to(y_TD.dtype))
        ctx.save_for_backward(x_TD, weights_N, gate_NI, up_NI, gate, up, down)
        ctx.routed, ctx.layouts, ctx.act, ctx.weights_shape = routed, layouts, act, weights_TK.shape
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TD,) = grads
        x_TD, weights_N, gate_NI, up_NI, gate, up, down = ctx.saved_tensors
        routed: _Routed = ctx.routed
        layouts: tuple[Layout, Layout, Layout] = ctx.layouts
        dtype = dy_TD.dtype
        dx_TD = torch.zeros_like(x_TD)
        dweights_N = torch.empty_like(weights_N)
        for expert, run in routed.hit():
            tokens = routed.tokens_N[run]
            dh = dy_TD[tokens] @ _matrix(down, layouts[2], expert, dtype, "backward")
            g, u = (saved[run].detach().requires_grad_() for saved in (gate_NI, up_NI))
            with torch.enable_grad():
                h = ctx.act(g) * u
            dweights_N[run] = (dh * h.detach()).sum(1, dtype=torch.float32).to(dweights_N.dtype)
            dg, du = torch.autograd.grad(h, (g, u), (dh * weights_N[run, None]).to(h.dtype))
            dx = dg @ _matrix(gate, layouts[0], expert, dtype, "backward")
            dx += du @ _matrix(up, layouts[1], expert, dtype, "backward")
            dx_TD.index_add_(0, tokens, dx)
        dweights = torch.empty_like(dweights_N)
        dweights[routed.slots_N] = dweights_N
        return dx_TD, dweights.view(ctx.weights_shape), None, None, None, None, None, None, None


class QuantizedExperts(nn.Module):
    """Takes the place of transformers' experts module, with the same call.

    Args:
        name: name of the module it replaces, such as model.layers.0.mlp.experts.
        layouts: of gate [inner, hidden], up [inner, hidden] and down [hidden, inner], with the number of experts.
        act: activation of the gate.

    Attributes:
        skip_product: leave out the down projection and return an unset output, for a second run of which only the
            gradients are wanted.
    """

    def __init__(self, name: str, layouts: tuple[Layout, Layout, Layout], act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            ExpertStack(f"{name}.{part}", layout) for part, layout in zip(PARTS, layouts, strict=True)
        )
        self.layouts, self.act = layouts, act
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
        y: Tensor = ExpertsFunction.apply(  # type: ignore[no-untyped-call]
            hidden_states, top_k_weights, top_k_index, *stacks, self.layouts, self.act, self.skip_product
        )
        return y

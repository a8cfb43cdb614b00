"""LoRA on the matrices of all experts of a layer, in PEFT's form of it (`target_parameters`).

    W_e + s B_e A_e        A_e: [r, in]    B_e: [out, r]    for each expert e    s = alpha / r

PEFT adapts transformers' parameters: one pair of matrices for gate and up, which transformers joins to one [2 inner,
hidden], and one for down. It keeps A_e one after the other as lora_A [experts * r, in], and B_e side by side as lora_B
[out, r * experts], in which column j * experts + e is column j of B_e. They are held in this form too, so that they are
sharded, saved and read like the matrices of any other layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fsdp_qlora.quant.grouped import Group, grouped_outer, grouped_product

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
"""transformers' parameters that hold the matrices of all experts of a layer."""


_MATRIX = re.compile(r"(?P<experts>.*\.experts)\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj")


def parameter_of(layer: str) -> tuple[str, int]:
    """Return the parameter that a matrix of one expert is part of, and the expert; for other layers the layer and -1.

    Args:
        layer: such as model.layers.0.mlp.experts.7.up_proj, which is in model.layers.0.mlp.experts.gate_up_proj.
    """
    match = _MATRIX.fullmatch(layer)
    if match is None:
        return layer, -1
    return f"{match['experts']}.{'down_proj' if match['part'] == 'down' else 'gate_up_proj'}", int(match["expert"])


def factors_of_matrix(layer: str, lora_A: Tensor, lora_B: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return A [r, in] and B [out, r] of one matrix of one expert, from those of the parameter that it is part of."""
    _, expert = parameter_of(layer)
    A_RI = lora_A.view(num_experts, -1, lora_A.shape[1])[expert]
    B_OR = _by_expert(lora_B, num_experts)[expert]
    halves = {"gate_proj": slice(0, len(B_OR) // 2), "up_proj": slice(len(B_OR) // 2, None)}
    return A_RI, B_OR[halves.get(layer.rpartition(".")[2], slice(None))]


class ExpertLora(nn.Module):
    """What is trained beside one parameter of the experts: `lora_A` and `lora_B`, in float32.

    Args:
        name: name of the parameter, such as model.layers.0.mlp.experts.gate_up_proj.
        rank: LoRA rank r of each expert.
        scaling: factor s of the update.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        name: str,
        num_experts: int,
        in_features: int,
        out_features: int,
        rank: int,
        scaling: float,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.name, self.num_experts, self.rank, self.scaling = name, num_experts, rank, scaling
        self.in_features, self.out_features = in_features, out_features
        for part in ("lora_A", "lora_B"):
            matrix = torch.empty(self.adapter_shape(part), dtype=torch.float32, device=device)
            setattr(self, part, nn.Parameter(matrix))

    def adapter(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield name and parameter of what is trained."""
        return self.named_parameters()

    def adapter_shape(self, name: str) -> tuple[int, ...]:
        """Return the whole shape of one of them, of which FSDP may hold a part."""
        shapes = {
            "lora_A": (self.num_experts * self.rank, self.in_features),
            "lora_B": (self.out_features, self.rank * self.num_experts),
        }
        return shapes[name]

    def extra_repr(self) -> str:
        return f"{self.num_experts} x ({self.in_features} -> {self.out_features}), rank {self.rank}"


class Factors(NamedTuple):
    """The matrices of every expert of a layer, as they compute.

    Attributes:
        A_ERI, B_EOR: for each expert A [r, in] and B [out, r].
        scaling: factor of B A.
    """

    A_ERI: Tensor
    B_EOR: Tensor
    scaling: float

    def inner(self, x_NI: Tensor, group: Group) -> Tensor:
        """Return s x A^T for the tokens of a group, [tokens, r]."""
        return grouped_product(x_NI, self.A_ERI[group.experts], group) * self.scaling

    def output(self, x_NI: Tensor, group: Group) -> Tensor:
        """Return s x A^T B^T for the tokens of a group, [tokens, out]."""
        return grouped_product(self.inner(x_NI, group), self.B_EOR[group.experts], group)


def factors_of(lora_A: Tensor, lora_B: Tensor, num_experts: int, scaling: float, dtype: torch.dtype) -> Factors:
    """Return the matrices of each expert out of PEFT's form, copied where that is not how products want them."""
    B_EOR = _by_expert(lora_B, num_experts)
    contiguous = torch.empty(B_EOR.shape, dtype=dtype, device=B_EOR.device).copy_(B_EOR)
    return Factors(lora_A.view(num_experts, -1, lora_A.shape[1]).to(dtype), contiguous, scaling)


def _by_expert(lora_B: Tensor, num_experts: int) -> Tensor:
    """Return lora_B as a view [experts, out, r]."""
    return lora_B.view(lora_B.shape[0], -1, num_experts).permute(2, 0, 1)


class Gradients:
    """Backward of LoRA on the experts of a layer, group by group.

    Attributes:
        lora_A, lora_B: gradients in PEFT's form, float32; whole once every group with tokens took part.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, factors: Factors) -> None:
        self.factors = factors
        self.lora_A, self.lora_B = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
        num_experts = len(factors.A_ERI)
        self._A_ERI = self.lora_A.view(num_experts, -1, lora_A.shape[1])
        self._B_EOR = _by_expert(self.lora_B, num_experts)

    def add(self, x_NI: Tensor, dy_NO: Tensor, group: Group, weights_N1: Tensor | None = None) -> Tensor:
        """Write the gradients of a group's experts and return that of their input, s dy B A [tokens, in].

        Args:
            x_NI, dy_NO: input, and gradient of the output.
            weights_N1: factors of dy in the gradients that are written, not in the one that is returned.
        """
        A_ERI, B_EOR = self.factors.A_ERI[group.experts], self.factors.B_EOR[group.experts]
        a_NR = self.factors.inner(x_NI, group)
        g_NR = grouped_product(dy_NO, B_EOR.transpose(1, 2), group) * self.factors.scaling
        dx_NI = grouped_product(g_NR, A_ERI.transpose(1, 2), group)
        if weights_N1 is not None:  # here, where the tensors are narrow
            a_NR, g_NR = ((narrow * weights_N1).to(dy_NO.dtype) for narrow in (a_NR, g_NR))
        self._A_ERI[group.experts] = grouped_outer(g_NR, x_NI, group)
        self._B_EOR[group.experts] = grouped_outer(dy_NO, a_NR, group)
        return dx_NI

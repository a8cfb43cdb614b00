"""Small 4-bit experts with random values, and what they are called with."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fsdp_qlora.quant.expert_lora import ExpertLora
from fsdp_qlora.quant.experts import PARTS, QuantizedExperts
from fsdp_qlora.quant.layout import Layout
from fsdp_qlora.quant.nf4 import dequantize_reference, quantize_matrix

EXPERTS, HIDDEN, INNER, TOKENS, CHOICES = 5, 48, 72, 9, 2
IDLE = 3
"""An expert that no token is sent to."""

SCALINGS = 1.5, 0.7


def make_experts(rank: int = 0) -> tuple[QuantizedExperts, dict[str, Tensor]]:
    """Return experts with random values on the CPU, and their matrices as quantised, float64 [experts, out, in].

    Args:
        rank: of the LoRA on all of them; 0: none.
    """
    generator = torch.Generator().manual_seed(0)
    wide = Layout(INNER, HIDDEN, num_matrices=EXPERTS)
    narrow = replace(wide, out_features=HIDDEN, in_features=INNER)
    pairs = (
        ExpertLora("experts.gate_up_proj", EXPERTS, HIDDEN, 2 * INNER, rank, SCALINGS[0]),
        ExpertLora("experts.down_proj", EXPERTS, INNER, HIDDEN, rank, SCALINGS[1]),
    )
    experts = QuantizedExperts("experts", (wide, wide, narrow), F.silu, pairs if rank else (None, None))
    experts.to_empty(device="cpu")
    for name, parameter in experts.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    matrices = {}
    for part, layout in zip(PARTS, experts.layouts, strict=True):
        shape = (layout.out_features, layout.in_features)
        flat = [quantize_matrix(torch.randn(shape, generator=generator) * 0.2, layout) for _ in range(EXPERTS)]
        stack = getattr(experts, part)
        stack.packed.data.copy_(torch.cat(flat).view(layout.storage_dtype))
        matrices[part] = torch.stack([dequantize_reference(one, layout, torch.float32) for one in flat]).double()
    return experts, matrices


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, chosen experts and their weights."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    scores[:, IDLE] = 0
    weights, index = scores.topk(CHOICES)
    return torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_(), index, weights.requires_grad_()

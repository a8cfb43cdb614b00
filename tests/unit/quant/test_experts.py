"""4-bit experts against plain PyTorch in float64, what they dequantise, and what they keep for backward."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsdp_qlora.errors import ModelError
from fsdp_qlora.models.skeleton import build_skeleton
from fsdp_qlora.quant import experts as experts_module
from fsdp_qlora.quant.adapt import QuantSettings, quantize_and_adapt
from fsdp_qlora.quant.expert_lora import ExpertLora
from fsdp_qlora.quant.experts import PARTS, QuantizedExperts
from fsdp_qlora.quant.layout import Layout
from fsdp_qlora.quant.nf4 import dequantize_reference, quantize_matrix
from tests.tiny import save_tiny

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


def lora_products(experts: QuantizedExperts) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return lora_A and lora_B in float64, of gate and up and of down, and s B A [experts, out, in] by PEFT's formula."""
    found = []
    for lora in (experts.gate_up_lora, experts.down_lora):
        assert lora is not None
        lora_A, lora_B = (part.detach().double().requires_grad_() for part in (lora.lora_A, lora.lora_B))
        A_ERI, B_ORE = lora_A.reshape(EXPERTS, -1, lora_A.shape[1]), lora_B.reshape(lora_B.shape[0], -1, EXPERTS)
        found.append((lora_A, lora_B, torch.einsum("ore,eri->eoi", B_ORE, A_ERI) * lora.scaling))
    return found


@pytest.mark.parametrize("rank", [0, 3, 8])
def test_equals_plain_pytorch(rank: int) -> None:
    """Rank 8 has rows as PyTorch's grouped product wants them, rank 3 has not."""
    experts, matrices = make_experts(rank)
    x, index, weights = make_inputs()
    x64, weights64 = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    ours, plain = [x, weights], [x64, weights64]
    if rank:
        gate_up, down = lora_products(experts)
        gate, up = gate_up[2].chunk(2, dim=1)
        updates = (gate, up, down[2])
        matrices = {part: matrices[part] + update for part, update in zip(PARTS, updates, strict=True)}
        ours += [parameter for parameter in experts.parameters() if parameter.requires_grad]
        plain += [*gate_up[:2], *down[:2]]
    expected = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token in range(TOKENS):
        for choice, expert in enumerate(index[token].tolist()):
            gate, up, down = (matrices[part][expert] for part in PARTS)
            y = down @ (F.silu(gate @ x64[token]) * (up @ x64[token]))
            expected[token] += weights64[token, choice] * y
    found = experts(x, index, weights)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    direction = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad((found * direction).sum(), ours)
    expected_grads = torch.autograd.grad((expected * direction.double()).sum(), plain)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(
            grad.double(), expected_grad, rtol=1e-5, atol=1e-5 * expected_grad.abs().max().item()
        )


@pytest.mark.parametrize("rank", [3, 8])
def test_an_idle_experts_lora_gets_no_gradient(rank: int) -> None:
    experts, _ = make_experts(rank)
    experts(*make_inputs()).sum().backward()
    for lora in (experts.gate_up_lora, experts.down_lora):
        assert lora is not None
        assert lora.lora_A.grad is not None
        assert lora.lora_B.grad is not None
        used_A = lora.lora_A.grad.view(EXPERTS, -1).any(1)
        used_B = lora.lora_B.grad.view(-1, EXPERTS).any(0)
        assert used_A.tolist() == used_B.tolist() == [expert != IDLE for expert in range(EXPERTS)]


def test_bytes_are_bitsandbytes_of_each_matrix() -> None:
    """With scales of its own, and at the place that the layout says."""
    layout = Layout(INNER, HIDDEN, num_matrices=2)
    weights = torch.randn(2, INNER, HIDDEN)
    weights[1] *= 30
    flat = torch.cat([quantize_matrix(weight, layout) for weight in weights])
    for index, weight in enumerate(weights):
        codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        section = layout.matrix_range(index)
        own = flat[section.start : section.stop]
        assert own[: layout.codes.stop].equal(codes.flatten())
        assert own[layout.absmax.start : layout.absmax.stop].equal(state.absmax)
        assert own[layout.offset.start : layout.offset.stop].view(torch.float32).equal(state.offset.reshape(1))


def test_one_matrix_at_a_time_and_only_of_experts_that_are_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    most = [0]
    real = experts_module.dequantize

    def watched(packed: Tensor, layout: Layout, dtype: torch.dtype, use: str) -> Tensor:
        matrix = real(packed, layout, dtype, use)
        made.append(weakref.ref(matrix))
        most[0] = max(most[0], sum(one() is not None for one in made))
        return matrix

    monkeypatch.setattr(experts_module, "dequantize", watched)
    experts, _ = make_experts(rank=4)
    x, index, weights = make_inputs()
    hit = len(index.unique())
    assert hit == EXPERTS - 1
    output = experts(x, index, weights)
    assert len(made) == 3 * hit
    output.sum().backward()
    assert len(made) == 6 * hit
    assert most[0] == 1
    assert not any(one() is not None for one in made)


def test_saves_activations_of_the_choices_and_no_matrix() -> None:
    experts, _ = make_experts()
    own = {parameter.data_ptr() for parameter in experts.parameters()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        experts(*make_inputs())
    shapes = sorted(tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in own)
    number = TOKENS * CHOICES
    assert shapes == [(TOKENS, HIDDEN), (number,), (number, 2 * INNER)]


@pytest.mark.parametrize("rank", [0, 4])
def test_gradients_without_the_last_product(rank: int) -> None:
    experts, _ = make_experts(rank)
    inputs = make_inputs()
    direction = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))
    grads = []
    for experts.skip_product in (False, True):
        x, index, weights = (tensor.detach().clone() for tensor in inputs)
        experts(x.requires_grad_(), index, weights.requires_grad_()).backward(direction)
        trained = [parameter for parameter in experts.parameters() if parameter.requires_grad]
        grads.append([x.grad, weights.grad, *(parameter.grad for parameter in trained)])
        experts.zero_grad()
    for complete, short in zip(*grads, strict=True):
        assert complete.equal(short)


def test_compiled_code_around_them_computes_the_same() -> None:
    experts, _ = make_experts()
    x, index, weights = make_inputs()

    def block(x: Tensor) -> Tensor:
        return x + experts(F.silu(x), index, weights) * 2

    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager")
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    assert found.equal(expected)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, "3 of 4 decoder blocks have experts"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ],
)
def test_what_cannot_be_trained_exactly_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    skeleton = build_skeleton(save_tiny(family, tmp_path, **changes), torch.float32)
    with pytest.raises(ModelError, match=message):
        quantize_and_adapt(skeleton, QuantSettings(), None, torch.float32)

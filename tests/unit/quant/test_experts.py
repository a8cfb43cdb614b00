"""4-bit experts against plain PyTorch in float64, what they dequantise, and what they keep for backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsdp_qlora.errors import ModelError
from fsdp_qlora.models.skeleton import build_skeleton
from fsdp_qlora.quant import dequantize as dequantize_module
from fsdp_qlora.quant import experts as experts_module
from fsdp_qlora.quant.adapt import QuantSettings, quantize_and_adapt
from fsdp_qlora.quant.dequantize import dequantize, dequantize_experts
from fsdp_qlora.quant.experts import PARTS, QuantizedExperts, group_size
from fsdp_qlora.quant.grouped import Group
from fsdp_qlora.quant.layout import Layout
from fsdp_qlora.quant.nf4 import dequantize_reference, quantize_matrix
from tests.experts import CHOICES, EXPERTS, HIDDEN, IDLE, INNER, TOKENS, make_experts, make_inputs
from tests.tiny import save_tiny

MATRIX_BYTES = 4 * HIDDEN * INNER
"""Of one expert's matrix in float32."""


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


@pytest.fixture
def unset_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have PyTorch fill what it does not set with NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unset_is_nan")
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "bfloat16"])
@pytest.mark.parametrize("counts", [[1, 2, 1, 3, 1], [2, 1, 4], [0, 3, 0, 1], [7]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matrices_of_a_group_are_those_of_each_expert(
    quant_type: str, double_quant: bool, counts: list[int], dtype: torch.dtype
) -> None:
    layout = Layout(33, 26, quant_type, double_quant, num_matrices=5)
    generator = torch.Generator().manual_seed(0)
    flat = [quantize_matrix(torch.randn(33, 26, generator=generator), layout) for _ in range(5)]
    packed = torch.cat(flat).view(layout.storage_dtype)
    for first in range(5 - len(counts) + 1):
        group = Group(first, counts, torch.tensor(counts).cumsum(0, dtype=torch.int32))
        found = dequantize_experts(packed, layout, group, dtype)
        assert found.shape == (len(counts), 33, 26)
        assert found.dtype == dtype
        for expert, _ in group.hit():
            assert found[expert - first].equal(dequantize(flat[expert], layout, dtype, "forward"))


def test_a_groups_matrices_at_a_time_and_only_of_experts_that_are_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive, sizes, alone = [0], [0], [0]

    def watched(packed: Tensor, layout: Layout, group: Group, dtype: torch.dtype) -> Tensor:
        matrices = dequantize_experts(packed, layout, group, dtype)
        made.append(weakref.ref(matrices))
        alive.append(sum(one() is not None for one in made))
        sizes.append(matrices.nbytes)
        return matrices

    def counted(packed: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
        alone[0] += 1
        return dequantize_reference(packed, layout, dtype)

    monkeypatch.setattr(experts_module, "dequantize_experts", watched)
    monkeypatch.setattr(dequantize_module, "dequantize_reference", counted)
    monkeypatch.setattr(experts_module, "GROUP_BYTES", 3 * MATRIX_BYTES - 1)
    experts, _ = make_experts(rank=4)
    x, index, weights = make_inputs()
    hit = len(index.unique())
    assert hit == EXPERTS - 1
    output = experts(x, index, weights)
    assert alone[0] == 3 * hit
    output.sum().backward()
    assert alone[0] == 6 * hit
    assert max(alive) == 1
    assert max(sizes) == 2 * MATRIX_BYTES
    assert group_size(experts.layouts[0], torch.float32) == 2
    assert not any(one() is not None for one in made)


@pytest.mark.usefixtures("unset_is_nan")
@pytest.mark.parametrize("rank", [0, 3, 8])
@pytest.mark.parametrize("num_tokens", [1, TOKENS])
def test_groups_change_nothing(rank: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not groups in which no expert has tokens, and with one token as in generation."""
    results = []
    for group_bytes in (1, 2 * MATRIX_BYTES, EXPERTS * MATRIX_BYTES):
        monkeypatch.setattr(experts_module, "GROUP_BYTES", group_bytes)
        experts, _ = make_experts(rank)
        inputs = [tensor.detach()[:num_tokens] for tensor in make_inputs()]
        x, weights = (inputs[place].requires_grad_() for place in (0, 2))
        output = experts(x, inputs[1], weights)
        output.sum().backward()
        trained = [parameter.grad for parameter in experts.parameters() if parameter.requires_grad]
        results.append([output, x.grad, weights.grad, *trained])
    for one, *others in zip(*results, strict=True):
        assert one.isfinite().all()
        assert all(other.equal(one) for other in others)


@pytest.mark.parametrize("counts", [[3, 0, 2, 2, 0, 0, 0, 1], [9, 9], [0, 0, 0, 5]])
def test_groups_hold_every_token_once(counts: list[int]) -> None:
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    routed = experts_module._Routed(torch.empty(0), torch.empty(0), counts, ends)
    hit: list[tuple[int, int]] = []
    stop = 0
    for group, rows in routed.groups(4, 3):
        assert len(group.counts) <= 3
        assert 0 < group.num_tokens <= max(4, group.counts[0])
        assert rows == slice(stop, stop + group.num_tokens)
        assert group.ends.tolist() == torch.tensor(group.counts).cumsum(0).tolist()
        hit += [(expert, run.stop - run.start) for expert, run in group.hit()]
        stop = rows.stop
    assert hit == [(expert, count) for expert, count in enumerate(counts) if count]


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

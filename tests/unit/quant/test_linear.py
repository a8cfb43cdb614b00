"""The 4-bit LoRA linear against plain PyTorch in float64, and what it keeps for backward."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsdp_qlora.quant import linear as linear_module
from fsdp_qlora.quant.layout import Layout
from fsdp_qlora.quant.linear import ADAPTER_PARTS, LoRALinear, initial_lora_A
from fsdp_qlora.quant.nf4 import dequantize_reference, quantize_matrix

OUT, IN, RANK, SCALING = 48, 80, 8, 1.5
NAMES = ("x", "lora_A", "lora_B")


def make_layer(
    out_features: int = OUT,
    in_features: int = IN,
    *,
    rank: int = RANK,
    bias: bool = False,
    dropout: float = 0.0,
    use_dora: bool = False,
    quant_type: str = "nf4",
    dtype: torch.dtype = torch.float32,
) -> LoRALinear:
    """Return a layer with random values everywhere, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(out_features, in_features, quant_type, double_quant=quant_type == "nf4")
    kind: dict[str, Any] = {"rank": rank, "scaling": SCALING, "dropout": dropout, "use_dora": use_dora}
    layer = LoRALinear("layer", layout, bias=bias, dtype=dtype, **kind, device="cpu")
    weight = torch.randn(out_features, in_features, generator=generator)
    layer.packed.data.copy_(quantize_matrix(weight, layout).view(layout.storage_dtype))
    for parameter in (layer.bias, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        if parameter is not None:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def random_input(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    return values.to(dtype).requires_grad_(requires_grad)


@dataclasses.dataclass
class Result:
    """Output and gradients by name; gradients of sum(output * fixed random numbers)."""

    output: Tensor
    grads: dict[str, Tensor | None]


def collect(output: Tensor, inputs: dict[str, Tensor | None]) -> Result:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    if output.requires_grad:
        (output * weights.to(output.dtype)).sum().backward()
    return Result(output.detach(), {name: None if t is None else t.grad for name, t in inputs.items()})


def run(layer: Callable[[Tensor], Tensor], module: LoRALinear, x: Tensor, seed: int = 3) -> Result:
    torch.manual_seed(seed)
    return collect(layer(x), {"x": x, **{name: getattr(module, name) for name in ADAPTER_PARTS}})


def expect(module: LoRALinear, x: Tensor, seed: int = 3) -> Result:
    """Compute the same by plain PyTorch operations in float64, with the dropout mask that the layer draws."""
    torch.manual_seed(seed)
    kept = F.dropout(torch.ones_like(x), module.dropout) if module.dropout and module.training else torch.ones_like(x)

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

    x64, bias, lora_A, lora_B, magnitudes = (
        leaf(t) for t in (x, module.bias, module.lora_A, module.lora_B, module.lora_magnitude_vector)
    )
    assert x64 is not None
    weight = dequantize_reference(module.packed.data, module.layout, torch.float32).double()
    output = F.linear(x64, weight, bias)
    if lora_A is not None and lora_B is not None:
        output = output + SCALING * (x64 * kept.double()) @ lora_A.t() @ lora_B.t()
        if magnitudes is not None:  # as PEFT writes it: base + (factor - 1) * base of the dropped input + factor * LoRA
            factors = magnitudes / (weight + SCALING * lora_B @ lora_A).detach().norm(dim=1)
            output = output + (factors - 1) * ((x64 * kept.double()) @ (weight + SCALING * lora_B @ lora_A).t())
    return collect(output, {"x": x64, "lora_A": lora_A, "lora_B": lora_B, "lora_magnitude_vector": magnitudes})


def assert_equal(found: Result, expected: Result, tolerance: float = 1e-5) -> None:
    pairs = {"output": (found.output, expected.output)}
    pairs |= {name: (grad, expected.grads[name]) for name, grad in found.grads.items()}
    for name, (a, b) in pairs.items():
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert a.shape == b.shape, name
            assert (a.double() - b).abs().max() <= tolerance * b.abs().max(), name


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "dropout": {"dropout": 0.3},
    "bias_and_dropout": {"bias": True, "dropout": 0.3},
    "wide": {"out_features": 112},  # [x | a] [W | B]^T in forward; the others do [dy | g] [W; A] in backward
    "wide_with_bias_and_dropout": {"out_features": 112, "bias": True, "dropout": 0.3},
    "rank_3": {"rank": 3},  # not a multiple of 8: two products
    "wide_rank_3": {"out_features": 112, "rank": 3},
    "not_quantised": {"quant_type": "float32"},
    "wide_not_quantised_with_bias": {"quant_type": "float32", "out_features": 112, "bias": True},
    "no_lora": {"rank": 0},
    "no_lora_with_bias": {"rank": 0, "bias": True, "dropout": 0.3},
}


DORA: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora_with_bias": {"use_dora": True, "bias": True},
    "dora_with_bias_and_dropout": {"use_dora": True, "bias": True, "dropout": 0.3},
    "wide_dora_of_rank_3": {"use_dora": True, "out_features": 112, "rank": 3},
}


@pytest.mark.parametrize("case", [*CASES, *DORA])
@pytest.mark.parametrize("needs_grad", [True, False], ids=["input_grad", "no_input_grad"])
@pytest.mark.parametrize("shape", [(2, 7, IN), (5, IN), (IN,)], ids=str)
def test_equals_plain_pytorch(case: str, needs_grad: bool, shape: tuple[int, ...]) -> None:
    layer = make_layer(**(CASES | DORA)[case])
    x = random_input(*shape, requires_grad=needs_grad)
    assert_equal(run(layer, layer, x), expect(layer, x))


def test_base_and_bias_get_no_gradient() -> None:
    layer = make_layer(bias=True)
    run(layer, layer, random_input(3, IN))
    assert layer.packed.grad is None
    assert layer.bias is not None
    assert layer.bias.grad is None


def test_no_dropout_in_eval_mode() -> None:
    layer = make_layer(dropout=0.5).eval()
    x = random_input(6, IN)
    assert_equal(run(layer, layer, x), expect(layer, x))


def test_bf16_input_gives_bf16_output_and_float32_gradients() -> None:
    layer = make_layer(bias=True, dtype=torch.bfloat16)
    x = random_input(2, 16, IN, dtype=torch.bfloat16)
    found = run(layer, layer, x)
    assert found.output.dtype == torch.bfloat16
    assert [found.grads[name].dtype for name in NAMES] == [torch.bfloat16, torch.float32, torch.float32]
    assert_equal(found, expect(layer, x), tolerance=2e-2)


def test_non_contiguous_input_and_output_gradient() -> None:
    layer = make_layer()
    x = random_input(IN, 6).t().detach().requires_grad_()
    assert not x.is_contiguous()
    found = run(lambda t: layer(t).t(), layer, x)
    plain = make_layer()
    y = x.detach().contiguous().requires_grad_()
    assert_equal(found, run(lambda t: plain(t).t(), plain, y))


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    def dequantize64(packed: Tensor, layout: Layout, dtype: torch.dtype, use: str, **more: Tensor) -> Tensor:
        assert not more
        return dequantize_reference(packed, layout, torch.float32).to(dtype)  # bitsandbytes has no float64

    monkeypatch.setattr(linear_module, "dequantize", dequantize64)
    layer = make_layer(6, 8, rank=2, bias=True)
    bias = layer.bias.data.double()

    def function(x: Tensor, x_lora: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return linear_module.LoRALinearFunction.apply(
            x, x_lora, layer.packed, bias, lora_A, lora_B, layer.layout, SCALING, False
        )

    def without_dropout(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return linear_module.LoRALinearFunction.apply(
            x, None, layer.packed, bias, lora_A, lora_B, layer.layout, SCALING, False
        )

    x, x_lora = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lora_A, lora_B = (t.data.double().requires_grad_() for t in (layer.lora_A, layer.lora_B))
    assert torch.autograd.gradcheck(function, (x, x_lora, lora_A, lora_B))
    assert torch.autograd.gradcheck(without_dropout, (x, lora_A, lora_B))


@pytest.mark.parametrize("case", CASES)
def test_skipping_the_product_keeps_the_gradients(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    layer = make_layer(**CASES[case])
    x = random_input(2, 7, IN)
    expected = run(layer, layer, x)
    x.grad = None
    for parameter in (layer.lora_A, layer.lora_B):
        if parameter is not None:
            parameter.grad = None
    uses: list[str] = []
    real = linear_module.dequantize

    def watched(packed: Tensor, layout: Layout, dtype: torch.dtype, use: str, **more: Tensor) -> Tensor:
        uses.append(use)
        return real(packed, layout, dtype, use, **more)

    monkeypatch.setattr(linear_module, "dequantize", watched)
    layer.skip_product = True
    found = run(layer, layer, x)
    assert found.output.shape == expected.output.shape
    assert uses == ["backward"]
    for name in NAMES:
        a, b = found.grads[name], expected.grads[name]
        assert (a is None and b is None) or (a is not None and b is not None and a.equal(b)), name


def test_dora_needs_its_product_for_the_gradient_of_the_lengths() -> None:
    layer, skipping = make_layer(use_dora=True), make_layer(use_dora=True)
    skipping.skip_product = True
    x = random_input(2, 7, IN)
    expected, x.grad = run(layer, layer, x), None
    assert_equal(run(skipping, skipping, x), expected)


def test_dora_of_a_row_of_zeros_stays_finite() -> None:
    layer = make_layer(use_dora=True)
    assert layer.lora_B is not None
    zeros = quantize_matrix(torch.zeros(OUT, IN), layer.layout)
    layer.packed.data.copy_(zeros.view(layer.layout.storage_dtype))
    layer.lora_B.data.zero_()
    found = run(layer, layer, random_input(2, IN))
    assert all(grad is None or grad.isfinite().all() for grad in (found.output, *found.grads.values()))


BIG_OUT, BIG_IN, TOKENS = 256, 192, 6  # the matrix is far larger than everything that may be kept


def saved_tensors(layer: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return saved


def test_saves_only_input_and_xA() -> None:
    layer = make_layer(BIG_OUT, BIG_IN)
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    x = random_input(TOKENS, BIG_IN)
    kept = [tensor for tensor in saved_tensors(layer, x) if tensor.data_ptr() not in own]
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(TOKENS, RANK), (TOKENS, BIG_IN)]
    assert x.data_ptr() in {tensor.data_ptr() for tensor in kept}, "the input is copied"


def test_dora_saves_its_output_besides() -> None:
    layer = make_layer(BIG_OUT, BIG_IN, use_dora=True)
    sizes = {tensor.shape for tensor in saved_tensors(layer, random_input(TOKENS, BIG_IN)) if tensor.dim() > 1}
    own = {parameter.shape for parameter in layer.parameters()}
    assert sizes - own == {(TOKENS, RANK), (TOKENS, BIG_IN), (TOKENS, BIG_OUT)}


def test_saves_nothing_but_the_base_without_lora() -> None:
    layer = make_layer(BIG_OUT, BIG_IN, rank=0)
    saved = saved_tensors(layer, random_input(TOKENS, BIG_IN))
    assert [tensor.data_ptr() for tensor in saved] == [layer.packed.data_ptr()]


def test_dequantised_matrix_dies_with_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is kept in other ways than save_for_backward."""
    alive: list[weakref.ref[Tensor]] = []
    real = linear_module.dequantize

    def watched(packed: Tensor, layout: Layout, dtype: torch.dtype, use: str, **more: Tensor) -> Tensor:
        matrix = real(packed, layout, dtype, use, **more)
        alive.append(weakref.ref(matrix))
        return matrix

    monkeypatch.setattr(linear_module, "dequantize", watched)
    layer = make_layer(BIG_OUT, BIG_IN)
    output = layer(random_input(TOKENS, BIG_IN))
    assert [matrix() for matrix in alive] == [None]
    output.sum().backward()
    assert [matrix() for matrix in alive] == [None, None]


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"quant_type": "float32"}], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_compiled_saves_no_matrix_and_computes_the_same(backend: str, kind: dict[str, Any]) -> None:
    """The second backend merges equal calls and chooses what to save as inductor does."""
    torch._dynamo.reset()
    layer = make_layer(BIG_OUT, BIG_IN, bias=True, **kind)
    # two layers in a row, so that the second one's input gradient is needed whatever the first one's is
    second = make_layer(BIG_IN, BIG_OUT)
    compiled = torch.compile(lambda x: second(F.silu(layer(x))), backend=backend, fullgraph=True)
    x = random_input(TOKENS, BIG_IN)
    own = {parameter.data_ptr() for module in (layer, second) for parameter in module.parameters()}
    sizes = [tensor.numel() for tensor in saved_tensors(compiled, x) if tensor.data_ptr() not in own]
    assert sizes, "the hooks saw nothing"
    assert max(sizes) < BIG_OUT * BIG_IN
    eager = run(lambda t: second(F.silu(layer(t))), layer, x)
    x.grad = None
    layer.zero_grad()
    assert_equal(run(compiled, layer, x), eager)


def test_initial_lora_A_is_pefts() -> None:
    """PEFT calls kaiming_uniform_(a=sqrt(5)): uniform between +-1/sqrt(in)."""
    peft = pytest.importorskip("peft")
    base = torch.nn.Linear(IN, OUT)
    adapted = peft.LoraConfig(r=64, lora_alpha=16, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(base), adapted)
    theirs = model.base_model.model[0].lora_A["default"].weight
    ours = initial_lora_A((64, IN), 64, torch.Generator().manual_seed(0))
    bound = 1 / math.sqrt(IN)
    assert ours.shape == theirs.shape
    for values in (ours, theirs):
        assert 0.98 * bound < values.abs().max() <= bound
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_dequantised_matrix_is_bitsandbytes() -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    expected = bnb.dequantize_4bit(codes, state)
    layer = make_layer(rank=0)
    assert layer(torch.eye(IN)).t().equal(expected)

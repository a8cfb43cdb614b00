"""Products of the base in fp8: rounding against a table of all e4m3 numbers, the layer against float64, who gets it."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fsdp_qlora.build import build_model
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.quant import linear as linear_module
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, lora_linears
from fsdp_qlora.quant.dequantize import dequantize_fp8
from fsdp_qlora.quant.fp8 import check_device, gain_of, quantize_rows, suits_fp8
from fsdp_qlora.quant.layout import Layout
from fsdp_qlora.quant.linear import LoRALinear
from fsdp_qlora.quant.nf4 import dequantize_reference, quantize_matrix
from tests.batches import make_trainer, random_ids, whole_rows
from tests.tiny import COMMON, save_tiny
from tests.unit.quant.test_linear import SCALING, make_layer, random_input, run, saved_tensors

OUT, IN = 192, 128


@functools.cache
def e4m3_numbers() -> Tensor:
    """Return the finite numbers of e4m3 from 0 up, float64 [127], made from their definition."""
    tiny = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    normal = [(1 + mantissa / 8) * 2.0**exponent for exponent in range(-6, 9) for mantissa in range(8)]
    return torch.tensor((tiny + normal)[:127], dtype=torch.float64)  # the last pattern is NaN


def rounded(values: Tensor) -> Tensor:
    """Round to the nearest number of e4m3, of two the one with the even pattern; float64."""
    numbers = e4m3_numbers()
    size = values.double().abs().clamp(max=448).contiguous()
    above = torch.searchsorted(numbers, size).clamp(max=126)
    below = (above - 1).clamp(min=0)
    to_above, to_below = numbers[above] - size, size - numbers[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return torch.where(up, numbers[above], numbers[below]) * values.double().sign()


def product(rows: Tensor, weight: Tensor, gain: float) -> Tensor:
    """Return rows @ weight.T as fp8 gives it, in float64."""
    factor = 448 / rows.detach().float().abs().amax(1, keepdim=True).clamp(min=1e-30)
    return rounded(rows.float() * factor) @ rounded(weight * gain).t() / factor.double() / gain


def fp8_layer(out_features: int = OUT, in_features: int = IN, **settings: Any) -> LoRALinear:
    layer = make_layer(out_features, in_features, **settings)
    layer.fp8 = True
    layer.begin_fp8()
    return layer


def close(found: Tensor | None, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found is not None
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_rows_are_rounded_to_the_nearest() -> None:
    rows = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 64)[:, None]
    quantized, scale = quantize_rows(rows)
    factor = 448 / rows.abs().amax(1, keepdim=True)
    assert quantized.double().equal(rounded(rows * factor))
    assert quantized.float().abs().amax(1).eq(448).all()
    torch.testing.assert_close(scale * factor, torch.ones(64, 1))


def test_ties_go_to_even() -> None:
    numbers = e4m3_numbers()
    between = (numbers[1:] + numbers[:-1]) / 2
    row = torch.cat((between, numbers)).float()[None]
    assert quantize_rows(row)[0].double().equal(rounded(row))


def test_rows_of_zeros_and_of_broken_numbers() -> None:
    rows = torch.zeros(3, 16)
    rows[1, 3], rows[2, 5] = math.inf, math.nan
    quantized, scale = quantize_rows(rows)
    assert (quantized[0].float() * scale[0]).eq(0).all()
    back = quantized.float() * scale
    assert not back[1].isfinite().all(), "an infinite activation must not vanish"
    assert not back[2].isfinite().all()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_gain_and_matrix(quant_type: str, double_quant: bool) -> None:
    layout = Layout(OUT, IN, quant_type, double_quant)
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    for size in (1e-4, 0.02, 1.0, 3000.0):
        packed = quantize_matrix(weight * size, layout).view(torch.float32)
        exact = dequantize_reference(packed, layout, torch.float32)
        gain = gain_of(packed, layout)
        assert math.frexp(gain)[0] == 0.5, "not a power of two"
        assert 224 < exact.abs().max() * gain <= 448
        matrix = dequantize_fp8(packed, layout, torch.tensor([gain]), transpose=False)
        assert matrix.double().equal(rounded(exact * gain))
        transposed = dequantize_fp8(packed, layout, torch.tensor([gain]), transpose=True)
        assert transposed.is_contiguous()
        assert transposed.float().t().equal(matrix.float())
    assert gain_of(quantize_matrix(torch.zeros(OUT, IN), layout).view(torch.float32), layout) == 1


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rank", [0, 3, 8])
def test_layer_equals_float64(rank: int, bias: bool) -> None:
    layer = fp8_layer(rank=rank, bias=bias)
    x = random_input(2, 7, IN)
    found = run(layer, layer, x)
    weight, gain = dequantize_reference(layer.packed, layer.layout, torch.float32), float(layer.gain)
    rows = x.detach().flatten(0, 1)
    dy = torch.randn(found.output.shape, generator=torch.Generator().manual_seed(2)).flatten(0, 1)
    y, dx = product(rows, weight, gain), product(dy, weight.t(), gain)
    if bias:
        y = y + layer.bias.double()
    if rank:
        A, B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        y = y + SCALING * rows.double() @ A.t() @ B.t()
        dx = dx + SCALING * dy.double() @ B @ A
        close(found.grads["lora_A"], SCALING * (dy.double() @ B).t() @ rows.double())
        close(found.grads["lora_B"], SCALING * dy.double().t() @ (rows.double() @ A.t()))
    close(found.output.flatten(0, 1), y)
    close(found.grads["x"].flatten(0, 1), dx)
    exact = rows.double() @ weight.double().t()
    assert 0.01 < (product(rows, weight, gain) - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("kind", [{"dropout": 0.3}, {"use_dora": True}, {"use_dora": True, "dropout": 0.3}], ids=str)
def test_other_kinds_of_lora_are_near_those_of_bf16(kind: dict[str, Any]) -> None:
    """Equal but for the rounding of the base's products: the same mask, the same lengths of rows."""
    plain, layer = make_layer(OUT, IN, bias=True, **kind), fp8_layer(bias=True, **kind)
    x = random_input(2, 7, IN)
    expected, x.grad = run(plain, plain, x), None
    found = run(layer, layer, x)
    assert not found.output.equal(expected.output)
    close(found.output, expected.output.double(), 0.05)
    for name, grad in expected.grads.items():
        if grad is not None:
            close(found.grads[name], grad.double(), 0.05)


def test_skipping_the_product_keeps_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fp8_layer()
    x = random_input(2, 7, IN)
    expected, x.grad = run(layer, layer, x), None
    layer.zero_grad()
    uses: list[bool] = []

    def watched(*arguments: Any, transpose: bool) -> Tensor:
        uses.append(transpose)
        return dequantize_fp8(*arguments, transpose=transpose)

    monkeypatch.setattr(linear_module, "dequantize_fp8", watched)
    layer.skip_product = True
    found = run(layer, layer, x)
    assert uses == [True]
    for name in ("x", "lora_A", "lora_B"):
        assert found.grads[name].equal(expected.grads[name]), name


def test_keeps_nothing_more_for_backward() -> None:
    layer, plain = fp8_layer(), make_layer(OUT, IN)
    shapes = [sorted(tuple(t.shape) for t in saved_tensors(one, random_input(6, IN))) for one in (layer, plain)]
    assert shapes[0] == sorted([*shapes[1], (1,)])  # the gain


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_compiled_saves_no_matrix_and_computes_the_same(backend: str) -> None:
    torch._dynamo.reset()
    first, second = fp8_layer(bias=True), fp8_layer(IN, OUT)
    both = torch.nn.Sequential(first, torch.nn.SiLU(), second)
    compiled = torch.compile(both, backend=backend, fullgraph=True)
    x = random_input(6, IN)
    own = {parameter.data_ptr() for parameter in both.parameters()}
    sizes = [tensor.numel() for tensor in saved_tensors(compiled, x) if tensor.data_ptr() not in own]
    assert sizes, "the hooks saw nothing"
    assert max(sizes) < OUT * IN
    expected, x.grad = run(both, first, x), None
    both.zero_grad()
    found = run(compiled, first, x)
    close(found.output, expected.output.double(), 1e-6)
    for name, grad in expected.grads.items():
        if grad is not None:
            close(found.grads[name], grad.double(), 1e-6)


def test_what_suits() -> None:
    assert suits_fp8(Layout(4096, 14336))
    assert not suits_fp8(Layout(104, 64))
    assert not suits_fp8(Layout(64, 104))
    assert not suits_fp8(Layout(64, 64, "bfloat16", False))


def test_model_computes_in_fp8_where_it_can(ranks: Ranks, tmp_path: Path) -> None:
    folder, lora = save_tiny("llama", tmp_path), LoraSettings(4, 8.0)
    batch = whole_rows(random_ids(2, 32, COMMON["vocab_size"]))
    losses = []
    for quant in (QuantSettings(), QuantSettings(fp8=True)):
        built = build_model(folder, ranks, quant, lora, torch.float32)
        losses.append(make_trainer(built, ranks).loss(batch).item())
    in_fp8 = {linear.name.rpartition(".")[2] for linear in lora_linears(built.root) if linear.gain is not None}
    assert in_fp8 == {"q_proj", "k_proj", "v_proj", "o_proj"}, "rows of 104 are no whole blocks"
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_model_without_such_layers_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    with pytest.raises(
        ModelError, match=r"compute_dtype fp8: needs 4-bit .* held\s+as float32, has none; leave it out"
    ):
        build_model(folder, ranks, QuantSettings("none", fp8=True), None, torch.float32)


def test_device_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--compute_dtype=fp8 on a CPU: .* 8.9 or newer .*; leave it out"):
        check_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"NVIDIA A100 \(compute capability 8.0\)"):
        check_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device(torch.device("cuda"))

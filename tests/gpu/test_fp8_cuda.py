"""Fp8 on the GPU against the reference that the CPU computes: the kernel, the rounding of rows, the product, the layer."""

from __future__ import annotations

import copy

import pytest
import torch

from fsdp_qlora.quant.dequantize import dequantize_fp8
from fsdp_qlora.quant.fp8 import E4M3, check_device, fp8_product, gain_of, quantize_rows
from fsdp_qlora.quant.layout import Layout
from fsdp_qlora.quant.linear import LoRALinear
from fsdp_qlora.quant.nf4 import dequantize_reference, quantize_matrix
from tests.unit.quant.test_linear import make_layer

pytestmark = pytest.mark.gpu
SHAPES = [(64, 64), (192, 320), (1024, 4096), (4096, 1024), (1088, 192), (14336, 4096), (4096, 14336)]


@pytest.fixture(autouse=True)
def _fp8() -> None:
    check_device(torch.device("cuda"))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_kernel_equals_reference(quant_type: str, double_quant: bool) -> None:
    """In every value; fp4 has a second code for zero, to which bitsandbytes gives another sign on GPUs."""
    for shape in SHAPES:
        layout = Layout(*shape, quant_type, double_quant)
        packed = quantize_matrix(torch.randn(shape, device="cuda") * 0.02, layout).view(torch.float32)
        gain = torch.tensor([gain_of(packed, layout)], device="cuda")
        expected = (dequantize_reference(packed, layout, torch.float32) * gain).to(E4M3)
        found = dequantize_fp8(packed, layout, gain, transpose=False)
        assert found.float().equal(expected.float()), shape
        transposed = dequantize_fp8(packed, layout, gain, transpose=True)
        assert transposed.float().equal(expected.float().t()), shape


def test_rows_are_rounded_as_on_the_cpu() -> None:
    for shape in ((1, 64), (33, 4096), (8192, 14336)):
        rows = (torch.randn(shape, device="cuda") * torch.rand(shape[0], 1, device="cuda")).bfloat16()
        expected, scale = quantize_rows(rows.cpu())
        for quantize in (quantize_rows, torch.compile(quantize_rows)):
            found, found_scale = quantize(rows)
            torch.testing.assert_close(found_scale.cpu(), scale, rtol=1e-6, atol=0)
            differing = (found.cpu().view(torch.uint8) != expected.view(torch.uint8)).float().mean().item()
            assert differing < 1e-3, differing  # a compiled division is not always rounded to the nearest


def test_broken_numbers_stay_broken_when_compiled() -> None:
    rows = torch.randn(4, 4096, device="cuda", dtype=torch.bfloat16)
    rows[1, 7], rows[2, 9], rows[3] = float("nan"), float("inf"), 0
    quantized, scale = torch.compile(quantize_rows)(rows)
    back = quantized.float() * scale
    assert [bool(row.isfinite().all()) for row in back] == [True, False, False, True]


@pytest.mark.parametrize("shape", [(1024, 4096), (14336, 4096), (4096, 14336), (192, 320)], ids=str)
def test_product_equals_reference(shape: tuple[int, int]) -> None:
    layout = Layout(*shape)
    packed = quantize_matrix(torch.randn(shape, device="cuda") * 0.02, layout).view(torch.float32)
    gain = torch.tensor([gain_of(packed, layout)], device="cuda")
    weight = dequantize_fp8(packed, layout, gain, transpose=False)
    for num_tokens in (1, 7, 33, 1000, 2048):
        rows = torch.randn(num_tokens, shape[1], device="cuda").bfloat16()
        found = fp8_product(rows, weight, gain).float()
        quantized, scale = quantize_rows(rows)
        expected = (quantized.float() @ weight.float().t()) * scale / gain
        error = ((found - expected).norm() / expected.norm()).item()
        print(f"{shape}, {num_tokens} tokens: relative error {error:.1e}")
        assert error < 5e-3  # of which rounding to bf16 is about 1.7e-3


def gradients(layer: LoRALinear, x: torch.Tensor, dy: torch.Tensor, compiled: bool) -> list[torch.Tensor]:
    """Return output and gradients of x, lora_A and lora_B, float32 on the CPU."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = (torch.compile(layer) if compiled else layer)(x)
    y.backward(dy)
    found = (y.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad)
    return [tensor.float().cpu() for tensor in found]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_layer_equals_the_cpus(bias: bool, compiled: bool) -> None:
    torch._dynamo.reset()
    on_cpu = make_layer(4096, 1024, rank=16, bias=bias, dtype=torch.bfloat16)
    for matrix in (on_cpu.lora_A, on_cpu.lora_B):
        matrix.data.mul_(0.02)
    on_cpu.fp8 = True
    on_cpu.begin_fp8()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x, dy = torch.randn(64, 1024).bfloat16(), torch.randn(64, 4096).bfloat16()
    expected = gradients(on_cpu, x, dy, compiled=False)
    found = gradients(on_gpu, x.cuda(), dy.cuda(), compiled)
    for name, a, b in zip(("y", "dx", "dA", "dB"), found, expected, strict=True):
        error = ((a - b).norm() / b.norm()).item()
        assert error < 1e-2, (name, error)

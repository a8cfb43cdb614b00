"""Several experts in one launch against one launch for each, with experts that have no tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fsdp_qlora.quant import experts as experts_module
from fsdp_qlora.quant.dequantize import dequantize, dequantize_experts
from fsdp_qlora.quant.grouped import Group, grouped_outer, grouped_product
from fsdp_qlora.quant.layout import Layout
from fsdp_qlora.quant.nf4 import quantize_matrix
from tests.experts import HIDDEN, INNER, make_experts, make_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("out_features", "in_features"), [(8, 256), (256, 16), (4, 64)])
@pytest.mark.parametrize("counts", [[3, 0, 130, 1], [0, 5, 0], [64, 64]])
def test_grouped_products(dtype: torch.dtype, out_features: int, in_features: int, counts: list[int]) -> None:
    torch.manual_seed(0)
    ends = torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)
    group, total = Group(0, counts, ends), sum(counts)
    x, dy = (torch.randn(total, width, device="cuda").to(dtype) for width in (in_features, out_features))
    weight = torch.randn(len(counts), out_features, in_features, device="cuda").to(dtype)
    weight[[count == 0 for count in counts]] = torch.nan  # what is not set must not be read
    product, outer = grouped_product(x, weight, group), grouped_outer(dy, x, group)
    back = grouped_product(dy, weight.transpose(1, 2), group)
    tolerance = {"rtol": 2e-2, "atol": 2e-1} if dtype == torch.bfloat16 else {"rtol": 1e-2, "atol": 1e-1}
    for expert, run in group.hit():
        torch.testing.assert_close(product[run], x[run] @ weight[expert].t(), **tolerance)
        torch.testing.assert_close(back[run], dy[run] @ weight[expert], **tolerance)
        torch.testing.assert_close(outer[expert], dy[run].t() @ x[run], **tolerance)
    for expert, count in enumerate(counts):
        if count == 0:
            assert not outer[expert].any()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(768, 2048), (64, 64), (33, 130), (7, 10)])
def test_matrices_of_a_group_are_those_of_each_expert(
    shape: tuple[int, int], quant_type: str, double_quant: bool
) -> None:
    torch.manual_seed(0)
    layout = Layout(*shape, quant_type, double_quant, num_matrices=5)
    flat = [quantize_matrix(torch.randn(shape, device="cuda"), layout) for _ in range(5)]
    packed = torch.cat(flat).view(layout.storage_dtype)
    for first, counts in ((0, [1, 0, 2, 0, 130]), (1, [0, 3, 1]), (4, [1]), (0, [1, 1, 1, 1, 1])):
        group = Group(first, counts, torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32))
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found = dequantize_experts(packed, layout, group, dtype)
            for expert, _ in group.hit():
                assert found[expert - first].equal(dequantize(flat[expert], layout, dtype, "forward")), (first, dtype)


def outputs_and_gradients(rank: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return the output of tests.experts' layer, and the gradients of its inputs and of LoRA, float32 on the CPU."""
    experts, _ = make_experts(rank)
    experts.to(device)
    hidden, index, scores = (tensor.detach().to(device) for tensor in make_inputs())
    # the same values in both dtypes
    x, weights = (tensor.bfloat16().to(dtype).requires_grad_() for tensor in (hidden, scores))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(device, dtype)
    output = experts(x, index, weights)
    trained = [parameter for parameter in experts.parameters() if parameter.requires_grad]
    found = [output, *torch.autograd.grad((output * direction).sum(), [x, weights, *trained])]
    return [tensor.detach().float().cpu() for tensor in found]


@pytest.mark.parametrize("rank", [0, 3, 8])
@pytest.mark.parametrize("together", [1, 2, 5])
def test_experts_on_cuda_equal_those_on_the_cpu(rank: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 2 % of the norm: every product and its inputs are rounded to bf16. Run again, they are bitwise equal."""
    monkeypatch.setattr(experts_module, "GROUP_BYTES", together * 2 * HIDDEN * INNER)
    expected = outputs_and_gradients(rank, "cpu", torch.float32)
    first, second = (outputs_and_gradients(rank, "cuda", torch.bfloat16) for _ in range(2))
    for found, again, exact in zip(first, second, expected, strict=True):
        assert found.equal(again)
        assert (found - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_added_to_their_tokens_in_one_order(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(4096, 256, device="cuda").to(dtype)
    tokens = torch.randint(0, 300, (4096,), device="cuda")
    totals = [torch.zeros(300, 256, device="cuda", dtype=dtype) for _ in range(4)]
    for total in totals:
        experts_module._add_to_tokens(total, rows, tokens)
    assert all(one.equal(other) for one, other in pairwise(totals))
    expected = torch.zeros(300, 256, dtype=torch.float64, device="cuda").index_add_(0, tokens, rows.double())
    assert (totals[0] - expected).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * expected.norm()

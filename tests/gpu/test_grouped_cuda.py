"""Products of several experts in one launch against one product for each, with experts that have no tokens."""

from __future__ import annotations

import pytest
import torch

from fsdp_qlora.quant.grouped import Group, grouped_outer, grouped_product

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
    product, outer = grouped_product(x, weight, group), grouped_outer(dy, x, group)
    tolerance = {"rtol": 2e-2, "atol": 2e-1} if dtype == torch.bfloat16 else {"rtol": 1e-2, "atol": 1e-1}
    for expert, run in group.hit():
        torch.testing.assert_close(product[run], x[run] @ weight[expert].t(), **tolerance)
        torch.testing.assert_close(outer[expert], dy[run].t() @ x[run], **tolerance)
    for expert, count in enumerate(counts):
        if count == 0:
            assert not outer[expert].any()

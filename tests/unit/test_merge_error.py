"""The distance between logits, against its formulas over all tokens at once."""

from __future__ import annotations

import pytest
import torch

from fsdp_qlora.export.merge_error import TOKENS, compare


def test_distance_is_that_of_all_tokens_together() -> None:
    torch.manual_seed(0)
    reference = torch.randn(2 * TOKENS + 5, 50)
    found = reference + 0.5 * torch.randn_like(reference)
    error = compare(reference, found)
    wanted, given = reference.double().softmax(dim=-1), found.double().softmax(dim=-1)
    assert error.mean == pytest.approx((found - reference).abs().mean().item())
    assert error.largest == pytest.approx((found - reference).abs().max().item())
    assert error.divergence == pytest.approx((wanted * (wanted / given).log()).sum(dim=-1).mean().item(), rel=1e-5)
    same = sum(int(a.argmax() == b.argmax()) for a, b in zip(reference, found, strict=True))
    assert 0 < same < len(reference)
    assert error.agreement == pytest.approx(same / len(reference))
    nothing = compare(reference, reference.clone())
    assert (nothing.mean, nothing.largest, nothing.divergence, nothing.agreement) == (0, 0, 0, 1)

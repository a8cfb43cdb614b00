"""Packed attention against dense attention with an explicit mask, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fsdp_qlora.models.attention import ATTENTION, packed_attention

HEADS, HEAD_DIM, TOKENS = 4, 8, 24
DOCUMENTS = [[7, 1, 16], [24], [10, 14]]  # lengths of each row's documents


def make_qkv(num_key_heads: int = HEADS, batch: int = len(DOCUMENTS)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, TOKENS, HEAD_DIM) for heads in (HEADS, num_key_heads, num_key_heads)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def boundaries(documents: list[list[int]]) -> Tensor:
    return torch.tensor([0] + [n for row in documents for n in row]).cumsum(0).int()


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: list[list[int]],
    *,
    scaling: float = HEAD_DIM**-0.5,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return [batch, tokens, heads, head_dim], one row and head at a time, from the definition."""
    output = torch.zeros(q.shape[0], TOKENS, HEADS, HEAD_DIM, dtype=q.dtype)
    groups = HEADS // k.shape[1]
    for b, row in enumerate(documents):
        document = torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row))
        i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)[None, :]
        sees = (document[:, None] == document[None, :]) & (j <= i)
        if sliding_window is not None:
            sees &= i - j < sliding_window
        for h in range(HEADS):
            scores = q[b, h] @ k[b, h // groups].t() * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            output[b, :, h] = scores.masked_fill(~sees, -math.inf).softmax(dim=-1) @ v[b, h // groups]
    return output


CASES = {
    "plain": {},
    "scaled": {"scaling": 0.2},
    "window": {"sliding_window": 5},
    "window_of_one": {"sliding_window": 1},
    "window_as_long_as_a_document": {"sliding_window": 16},
    "window_one_shorter_than_a_document": {"sliding_window": 23},
    "softcap": {"softcap": 1.5},
    "softcap_window_scaled": {"softcap": 1.5, "sliding_window": 5, "scaling": 0.3},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_key_heads", [HEADS, 2, 1])
def test_equals_dense_attention(case: str, num_key_heads: int) -> None:
    inputs = make_qkv(num_key_heads)
    found, weights = packed_attention(
        nn.Module(), *inputs, None, cu_seq_lens_q=boundaries(DOCUMENTS), max_length_q=TOKENS, **CASES[case]
    )
    assert weights is None
    expected = dense(*inputs, DOCUMENTS, **CASES[case])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    grads = torch.autograd.grad((found * direction).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * direction).sum(), inputs)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_documents_cannot_see_each_other(softcap: float | None) -> None:
    q, k, v = make_qkv()
    cu_seqlens = boundaries(DOCUMENTS)

    def attend(k: Tensor, v: Tensor) -> Tensor:
        output, _ = packed_attention(nn.Module(), q, k, v, None, cu_seq_lens_q=cu_seqlens, softcap=softcap)
        return output.detach().flatten(0, 1)

    before = attend(k, v)
    start, stop = int(cu_seqlens[2]), int(cu_seqlens[3])  # the document of 16 tokens
    k2, v2 = k.detach().clone(), v.detach().clone()
    k2[0, :, start:stop] = 100.0
    v2[0, :, start:stop] = math.nan
    after = attend(k2, v2)
    others = torch.ones(len(before), dtype=torch.bool)
    others[start:stop] = False
    assert after[others].equal(before[others])
    assert after[~others].isnan().all()


def test_tokens_see_no_later_ones() -> None:
    q, k, v = make_qkv(batch=1)
    later = v.detach().clone()
    later[:, :, 10:] += 100.0
    before, _ = packed_attention(nn.Module(), q, k, v, None)
    after, _ = packed_attention(nn.Module(), q, k, later, None)
    change = (after - before).abs().amax(dim=(0, 2, 3))
    assert change[:10].amax() < 1e-9
    assert change[10:].amin() > 0.1


def test_default_is_one_document_a_row() -> None:
    inputs = make_qkv(2)
    found, _ = packed_attention(nn.Module(), *inputs, None)
    torch.testing.assert_close(found, dense(*inputs, [[TOKENS]] * 3), rtol=1e-6, atol=1e-6)


def test_trailing_empty_documents_change_nothing() -> None:
    inputs = make_qkv()
    cu_seqlens = boundaries(DOCUMENTS)
    padded = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(3)])
    found, _ = packed_attention(nn.Module(), *inputs, None, cu_seq_lens_q=padded)
    expected, _ = packed_attention(nn.Module(), *inputs, None, cu_seq_lens_q=cu_seqlens)
    assert found.equal(expected)


def test_a_mask_is_refused() -> None:
    with pytest.raises(AssertionError, match="not masks"):
        packed_attention(nn.Module(), *make_qkv(), torch.ones(1))


def test_is_registered_with_transformers() -> None:
    assert AttentionInterface()[ATTENTION] is packed_attention

"""Causal attention over packed documents, without a dense mask over the whole sequence.

The loader says where documents begin (`cu_seqlens`, padding being documents of its own), so documents cannot see each other
and neither packing nor padding needs a mask. Registered with transformers under the name ATTENTION; models call it through
their usual attention interface, which skips mask creation for names it does not know.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

ATTENTION = "fsdp_qlora_packed"

# torch 2.11 shares key and value heads without being told, later versions want to be
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


ROW_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""For rows that are one document each, the fastest first; on H100 cuDNN's takes 0.6 of FlashAttention 2's time."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally inside each document.

    Args:
        query, key, value: [batch, heads, tokens, head_dim]; key and value may have fewer heads.
        attention_mask: must be None; the documents say it all.
        sliding_window: tokens a token sees, itself included; None: all before it.
        softcap: scores are replaced by softcap * tanh(scores / softcap).
        cu_seq_lens_q: int32 [documents + 1], boundaries over the batch * tokens flattened positions; default: one document
            a row, which cuDNN attends to faster. It may end in repeats of the total (empty documents).
        max_length_q: upper bound of a document's length.

    Returns:
        [batch, tokens, heads, head_dim] and None (no attention weights).
    """
    if attention_mask is not None:
        raise AssertionError("packed attention takes documents, not masks")
    batch, _heads, tokens, _head_dim = query.shape
    flash = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and softcap is None
    if flash and cu_seq_lens_q is None and (sliding_window is None or sliding_window >= tokens):
        return _by_row(query, key, value, scaling), None
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * tokens
    # flattened over the batch: [batch * tokens, heads, head_dim]
    q_NHD, k_NHD, v_NHD = (t.transpose(1, 2).reshape(batch * tokens, t.shape[1], -1) for t in (query, key, value))
    attend = _flash if flash else _by_document
    out = attend(q_NHD, k_NHD, v_NHD, cu_seq_lens_q, max_length_q or tokens, scaling, sliding_window, softcap)
    return out.view(batch, tokens, query.shape[1], -1), None


def _by_row(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention over whole rows."""
    grouped = query.shape[1] != key.shape[1]
    with sdpa_kernel(ROW_BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2)


def _flash(
    q_NHD: Tensor,
    k_NHD: Tensor,
    v_NHD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """FlashAttention over documents of any length (torch's own kernel)."""
    window = (-1, 0) if sliding_window is None else (sliding_window - 1, 0)
    out = varlen_attn(
        q_NHD,
        k_NHD,
        v_NHD,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scaling,
        window_size=window,
        **GROUPED,
    )
    assert isinstance(out, Tensor)
    return out


def _by_document(
    q_NHD: Tensor,
    k_NHD: Tensor,
    v_NHD: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """One call a document: on CPU, in float32, and with a soft cap, which FlashAttention lacks."""
    lengths = [length for length in cu_seqlens.diff().tolist() if length > 0]
    documents = (torch.split(t, lengths) for t in (q_NHD, k_NHD, v_NHD))
    outputs = []
    for q_THD, k_THD, v_THD in zip(*documents, strict=True):
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q_THD, k_THD, v_THD))
        length = q.shape[2]
        windowed = sliding_window is not None and length > sliding_window
        if softcap is None:
            mask = _causal_mask(length, sliding_window, q.device) if windowed else None
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        else:
            out = _softcapped(q, k, v, _causal_mask(length, sliding_window, q.device), scaling, softcap)
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def _causal_mask(length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Return bool [length, length]: True where the row's token sees the column's."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if sliding_window is None else mask.triu(1 - sliding_window)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


AttentionInterface.register(ATTENTION, packed_attention)

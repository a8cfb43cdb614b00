"""The chunked loss against PyTorch's cross-entropy over full logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fsdp_qlora import loss as loss_module
from fsdp_qlora.loss import IGNORE, chunked_cross_entropy, count_correct

TOKENS, HIDDEN, VOCABULARY = 37, 16, 50
ROW_BYTES = 4 * VOCABULARY


def make_inputs(ignored: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(TOKENS, HIDDEN, generator=generator) * scale).requires_grad_()
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[torch.randperm(TOKENS, generator=generator)[:ignored]] = IGNORE
    return hidden, head, labels


def expect(hidden: Tensor, head: Tensor, labels: Tensor, softcap: float | None, factor: float) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses and the gradient of factor * sum, in float64."""
    hidden64 = hidden.detach().double().requires_grad_()
    logits = hidden64 @ head.double().t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    (grad,) = torch.autograd.grad(total * factor, hidden64)
    return total.detach(), grad


@pytest.mark.parametrize("rows", [1, 5, TOKENS - 1, TOKENS, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("ignored", [0, 20])
def test_equals_cross_entropy(monkeypatch: pytest.MonkeyPatch, rows: int, softcap: float | None, ignored: int) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", rows * ROW_BYTES)
    hidden, head, labels = make_inputs(ignored)
    total = chunked_cross_entropy(hidden, head, labels, softcap)
    (total / 7).backward()
    expected, grad = expect(hidden, head, labels, softcap, 1 / 7)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), grad, rtol=1e-5, atol=1e-6)


def test_chunk_smaller_than_a_row_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 1)
    hidden, head, labels = make_inputs()
    expected, _ = expect(hidden, head, labels, None, 1.0)
    torch.testing.assert_close(chunked_cross_entropy(hidden, head, labels).double(), expected, rtol=1e-6, atol=0)


def test_logits_are_never_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    real = F.linear

    def watched(x: Tensor, *args: Tensor) -> Tensor:
        rows.append(x.shape[0])
        return real(x, *args)

    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 10 * ROW_BYTES)
    monkeypatch.setattr(loss_module.F, "linear", watched)
    hidden, head, labels = make_inputs()
    chunked_cross_entropy(hidden, head, labels).backward()
    assert rows == [10, 10, 10, 7]


def test_backward_keeps_one_gradient_of_the_hidden_states() -> None:
    saved: list[Tensor] = []
    hidden, head, labels = make_inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        chunked_cross_entropy(hidden, head, labels)
    assert [tuple(tensor.shape) for tensor in saved] == [(TOKENS, HIDDEN)]


def test_leading_dimensions_are_flattened() -> None:
    hidden, head, labels = make_inputs(ignored=4)
    batch = hidden.detach()[:36].view(3, 12, HIDDEN).requires_grad_()
    total = chunked_cross_entropy(batch, head, labels[:36].view(3, 12))
    total.backward()
    expected, grad = expect(hidden[:36], head, labels[:36], None, 1.0)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(batch.grad.double().view(36, HIDDEN), grad, rtol=1e-5, atol=1e-6)


def test_all_positions_ignored_gives_zero_and_no_gradient() -> None:
    hidden, head, labels = make_inputs(ignored=TOKENS)
    total = chunked_cross_entropy(hidden, head, labels)
    total.backward()
    assert total.item() == 0
    assert hidden.grad.eq(0).all()


def test_no_targets_at_all_gives_zero_and_an_empty_gradient() -> None:
    """A rank whose micro-batch is all padding passes no position and must still take part in backward."""
    hidden, head, labels = make_inputs()
    total = chunked_cross_entropy(hidden[:0], head, labels[:0])
    total.backward()
    assert total.item() == 0
    assert hidden.grad.eq(0).all()


def test_large_logits_do_not_overflow() -> None:
    hidden, head, labels = make_inputs(scale=1e4)
    total = chunked_cross_entropy(hidden, head, labels)
    total.backward()
    expected, grad = expect(hidden, head, labels, None, 1.0)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden.grad.double(), grad, rtol=1e-4, atol=1e-4)


def test_bf16_hidden_states_are_scored_in_float32() -> None:
    hidden, head, labels = make_inputs()
    low, low_head = hidden.detach().bfloat16().requires_grad_(), head.bfloat16()
    total = chunked_cross_entropy(low, low_head, labels)
    total.backward()
    expected, grad = expect(low.float(), low_head.float(), labels, None, 1.0)
    assert (total.dtype, low.grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(total.double(), expected, rtol=5e-3, atol=0)
    assert (low.grad.double() - grad).abs().max() < 2e-2 * grad.abs().max()


def test_works_without_gradients() -> None:
    hidden, head, labels = make_inputs(ignored=3)
    with torch.no_grad():
        total = chunked_cross_entropy(hidden, head, labels)
    assert not total.requires_grad
    torch.testing.assert_close(total, chunked_cross_entropy(hidden, head, labels).detach())


def test_head_gets_no_gradient() -> None:
    hidden, head, labels = make_inputs()
    head.requires_grad_()
    chunked_cross_entropy(hidden, head, labels).backward()
    assert head.grad is None


@pytest.mark.parametrize("rows", [1, 5, TOKENS, 1000])
def test_correct_targets_are_counted_in_chunks(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", rows * ROW_BYTES)
    hidden, head, labels = make_inputs()
    best = (hidden.double() @ head.double().t()).argmax(-1)
    labels[::3] = best[::3]
    expected = int((best == labels).sum())
    assert TOKENS // 3 <= expected < TOKENS
    assert int(count_correct(hidden, head, labels)) == expected
    assert int(count_correct(hidden[:0], head, labels[:0])) == 0, "a rank without targets"


def test_the_gradients_factor_is_not_rounded_to_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2100, 16, generator=generator).bfloat16().requires_grad_()
    head = torch.randn(32, 16, generator=generator).bfloat16()
    labels = torch.randint(0, 32, (2100,), generator=generator)
    chunked_cross_entropy(hidden, head, labels).backward()
    assert hidden.grad is not None
    whole, hidden.grad = hidden.grad, None
    (chunked_cross_entropy(hidden, head, labels) / 771).backward()  # 1 / 771 is far from any bf16 number
    assert hidden.grad.equal((whole.float() * torch.tensor(1 / 771)).bfloat16())


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_trained_head_gets_its_gradient(monkeypatch: pytest.MonkeyPatch, softcap: float | None) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 5 * ROW_BYTES)
    hidden, head, labels = make_inputs(ignored=9)
    rows = head.clone().requires_grad_()
    seen: list[Tensor] = []

    def reduce(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return 2 * gradient

    (chunked_cross_entropy(hidden, head, labels, softcap, rows, reduce) / 7).backward()
    head64 = head.double().requires_grad_()
    logits = hidden.detach().double() @ head64.t()
    logits = softcap * torch.tanh(logits / softcap) if softcap is not None else logits
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    (expected,) = torch.autograd.grad(total / 7, head64)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(rows.grad.double(), 2 * expected, rtol=1e-4, atol=1e-6)

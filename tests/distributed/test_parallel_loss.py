"""The loss with the head's rows shared out over ranks, against PyTorch's cross-entropy over all logits in float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdp_qlora import loss as loss_module
from fsdp_qlora.distributed import process_group
from fsdp_qlora.loss import IGNORE
from fsdp_qlora.models.vocabulary import MOST_PARALLEL, ShardedVocabulary, shares_logits
from fsdp_qlora.parallel_loss import most_likely, parallel_cross_entropy
from tests.ranks import run_ranks

HIDDEN, VOCABULARY = 16, 50  # of which 2 ranks have 25 each, 4 ranks 13, 13, 13, 11
COUNTS = [23, 0, 37, 8]
"""Targets of each rank."""


def make_inputs(rank: int, ignored: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(COUNTS[rank], HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (COUNTS[rank],), generator=generator)
    if ignored:
        labels[::3] = IGNORE
    return hidden, labels


def make_head() -> Tensor:
    head = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(9))
    head[40] = head[30]  # two tokens of the same logits, of two shards
    return head


def vocabulary(ranks: Any, trained: bool) -> ShardedVocabulary:
    """Return the head with this rank's rows."""
    head = ShardedVocabulary(VOCABULARY, HIDDEN, torch.float32, ranks, trained=trained)
    rows = make_head()[head.first : head.stop].to(ranks.device)
    if trained:
        local = torch.empty_like(head.weight, device=ranks.device)
        local._local_tensor = rows
        head.weight = nn.Parameter(local)
    else:
        head.weight = nn.Parameter(rows, requires_grad=False)
    return head


def on_rank(device: str, rows_of_chunk: int, softcap: float | None, ignored: bool, trained: bool) -> dict[str, Any]:
    """Return this rank's loss, gradients and predictions, and the sizes of the logits that it made."""
    with process_group("full", timeout_s=60, device=device) as ranks:
        head = vocabulary(ranks, trained)
        assert head.is_parallel
        hidden, labels = (tensor.to(ranks.device) for tensor in make_inputs(ranks.rank, ignored))
        hidden.requires_grad_()
        sizes: list[int] = []
        real = F.linear

        def counted(x: Tensor, weight: Tensor) -> Tensor:
            sizes.append(len(x))
            return real(x, weight)

        row_bytes = 4 * max(head.rows_per_shard, HIDDEN)
        with (
            mock.patch.object(loss_module, "CHUNK_BYTES", rows_of_chunk * row_bytes),
            mock.patch("fsdp_qlora.parallel_loss.F.linear", counted),
        ):
            total = parallel_cross_entropy(hidden, head, labels, softcap)["loss"]
            (total / 7).backward()
            with torch.no_grad():
                evaluated = parallel_cross_entropy(hidden, head, labels, softcap)
        return {
            "loss": total.item(),
            "evaluated": evaluated["loss"].item(),
            "correct": evaluated["correct"].item(),
            "grad": hidden.grad.cpu().numpy(),
            "of_rows": head.weight.grad.to_local().cpu().numpy() if trained else None,
            "likely": most_likely(hidden.detach()[:1] if len(hidden) else hidden.new_zeros(1, HIDDEN), head).item(),
            "most": max(sizes),
        }


CASES = [(8, None, False, False), (1, 3.0, True, True), (1000, None, True, True), (12, 3.0, False, False)]
"""Rows of a chunk, soft cap, whether some labels are IGNORE, whether the head is trained."""


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_cross_entropy(world_size: int, case: tuple[int, float | None, bool, bool]) -> None:
    check_against_cross_entropy("cpu", world_size, *case)


def check_against_cross_entropy(
    device: str, world_size: int, rows_of_chunk: int, softcap: float | None, ignored: bool, trained: bool
) -> None:
    args = device, rows_of_chunk, softcap, ignored, trained
    found = run_ranks(on_rank, world_size, *args, cuda=device == "cuda")
    head = make_head().double().requires_grad_()
    for rank, one in enumerate(found):
        hidden, labels = make_inputs(rank, ignored)
        hidden = hidden.double().requires_grad_()
        logits = hidden @ head.t()
        scores = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        total = F.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="sum")
        (total / 7).backward()
        assert one["loss"] == pytest.approx(total.item(), rel=1e-6)
        assert one["evaluated"] == one["loss"]
        assert one["correct"] == (logits.argmax(dim=1) == labels).sum()
        torch.testing.assert_close(torch.from_numpy(one["grad"]).double(), hidden.grad, rtol=1e-5, atol=1e-6)
        assert one["likely"] == (logits[0].argmax() if len(logits) else 0)
        assert one["most"] <= max(rows_of_chunk, world_size)
    if trained:
        of_rows = torch.cat([torch.from_numpy(one["of_rows"]) for one in found])
        torch.testing.assert_close(of_rows.double(), head.grad, rtol=1e-5, atol=1e-6)


def predict_on_rank() -> list[int]:
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        head = vocabulary(ranks, trained=False)
        return most_likely(make_head()[[40, 30, 7]] * 100, head).tolist()


def test_the_first_of_equal_logits_is_the_most_likely() -> None:
    logits = make_head()[[40, 30, 7]] @ make_head().t()
    expected = logits.argmax(dim=1).tolist()
    assert expected[0] == expected[1]
    assert run_ranks(predict_on_rank, 4) == [expected] * 4


def test_which_heads_are_shared_out() -> None:
    assert shares_logits(50, 2)
    assert shares_logits(128256, MOST_PARALLEL)
    assert not shares_logits(50, 1)
    assert not shares_logits(128256, MOST_PARALLEL + 1), "hidden states of so many ranks are more than the head"
    assert not shares_logits(10, 8), "the last ranks would have no rows"

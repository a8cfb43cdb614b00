"""The loss with the head's rows shared out over ranks, on GPUs: two ranks on one through gloo, on two through NCCL."""

from __future__ import annotations

import pytest

from tests.distributed.test_parallel_loss import CASES, check_against_cross_entropy

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES)
def test_equals_cross_entropy_on_cuda(case: tuple[int, float | None, bool, bool]) -> None:
    check_against_cross_entropy("cuda", 2, *case)

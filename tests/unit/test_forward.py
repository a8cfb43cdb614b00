"""When attention may go by rows instead of documents."""

from __future__ import annotations

import pytest
import torch

from fsdp_qlora.forward import _padded, one_document_a_row

TOKENS = 8


@pytest.mark.parametrize(
    ("boundaries", "targets", "by_row"),
    [
        ([0, 8, 16, 24], [0, 7, 8, 15, 16, 23], True),
        ([0, 8, 13, 16, 24], [0, 12, 20], True),  # padding in the second row
        ([0, 8, 13, 16, 24], [13], False),
        ([0, 3, 8, 16, 24], [2, 9], True),
        ([0, 3, 8, 16, 24], [2, 3, 9], False),
        ([0, 3, 6, 8, 16, 24], [7], False),
        ([0, 1, 8, 9, 16, 17, 24], [0, 8, 16], True),
        ([0, 8, 16, 24], [], True),
    ],
)
def test_rows_with_targets_in_their_first_document_only(
    boundaries: list[int], targets: list[int], by_row: bool
) -> None:
    documents = _padded(torch.tensor(boundaries, dtype=torch.int32))
    assert one_document_a_row(documents, torch.tensor(targets, dtype=torch.int64), TOKENS) is by_row

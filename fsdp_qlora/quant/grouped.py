"""Products of the tokens of each expert with that expert's own matrix, for several experts at once.

The tokens are sorted by expert: those of the first expert come first. PyTorch's grouped kernel makes one launch of all
the products; on GPUs it is for bf16 on Hopper and Blackwell, and it wants rows of whole 16 bytes. Others take one product
for each expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Some experts, one after the other, whose tokens are worked on together.

    Attributes:
        first: number of the first of these experts.
        counts: how many tokens each of them has.
        ends: where the tokens of each end among those of the group, int32 [experts] on the device.
    """

    first: int
    counts: list[int]
    ends: Tensor

    @property
    def experts(self) -> slice:
        """The group's place among all experts."""
        return slice(self.first, self.first + len(self.counts))

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)

    def hit(self) -> Iterator[tuple[int, slice]]:
        """Yield the number of each expert that has tokens, with their run among those of the group."""
        start = 0
        for expert, count in enumerate(self.counts, self.first):
            if count > 0:
                yield expert, slice(start, start + count)
            start += count


def grouped_product(x_NI: Tensor, weight_EOI: Tensor, group: Group) -> Tensor:
    """Return x W_e^T [tokens, out] with the matrix of each token's expert.

    Args:
        weight_EOI: the matrices of the group's experts; of one without tokens nothing is read.
    """
    if _fits_kernel(x_NI) and _fits_kernel(weight_EOI):
        return F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=group.ends)
    y_NO = x_NI.new_empty(x_NI.shape[0], weight_EOI.shape[1])
    for expert, run in group.hit():
        torch.mm(x_NI[run], weight_EOI[expert - group.first].t(), out=y_NO[run])
    return y_NO


def grouped_outer(left_NO: Tensor, right_NI: Tensor, group: Group) -> Tensor:
    """Return left^T right [experts, out, in] over the tokens of each expert; zeros for one that has none."""
    if _fits_kernel(left_NO) and _fits_kernel(right_NI):
        total_EOI = F.grouped_mm(left_NO.t(), right_NI, offs=group.ends)
        # nothing says that the kernel writes a product over no tokens
        is_idle = group.ends.diff(prepend=group.ends.new_zeros(1)) == 0
        return total_EOI.masked_fill_(is_idle[:, None, None], 0)
    total_EOI = left_NO.new_zeros(len(group.counts), left_NO.shape[1], right_NI.shape[1])
    for expert, run in group.hit():
        torch.mm(left_NO[run].t(), right_NI[run], out=total_EOI[expert - group.first])
    return total_EOI


def _fits_kernel(tensor: Tensor) -> bool:
    # on other GPUs torch makes the products one by one too, and waits for the device to learn where they end
    if tensor.is_cuda and not (
        tensor.dtype == torch.bfloat16 and torch.cuda.get_device_capability(tensor.device)[0] in (9, 10)
    ):
        return False
    strides = (stride for stride in tensor.stride() if stride != 1)
    return tensor.data_ptr() % 16 == 0 and all(stride * tensor.itemsize % 16 == 0 for stride in strides)

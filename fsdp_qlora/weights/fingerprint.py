"""A checksum of bytes that can be added up over shards, to compare what was loaded with what FSDP gathers.

sum over 8-byte words w_i * m_i modulo 2^64, with m_i odd and different for every position: any change of one word changes
it for certain, other changes with odds of about 2^-64. It is no defence against an attacker, and need not be.
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIER = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number: 2^64 divided by the golden ratio
CHUNK_WORDS = 1 << 20


def fingerprint(data: Tensor, start: int = 0) -> Tensor:
    """Return the checksum of a run of bytes as an int64 scalar on its device.

    Args:
        data: uint8, 1-D, a multiple of 8 bytes.
        start: position of its first byte in the whole, a multiple of 8.
    """
    words = data.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for first in range(0, words.numel(), CHUNK_WORDS):
        chunk = words[first : first + CHUNK_WORDS]
        position = torch.arange(start // 8 + first, start // 8 + first + chunk.numel(), device=data.device)
        total += (chunk * (position * MULTIPLIER).bitwise_or_(1)).sum()
    return total

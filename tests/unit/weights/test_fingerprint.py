"""The checksum of 4-bit bases: adds up over shards, sees every change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fsdp_qlora.weights import fingerprint as module
from fsdp_qlora.weights.fingerprint import fingerprint

NUM_BYTES = 16 * 37


@pytest.fixture
def data() -> Tensor:
    return torch.randint(0, 256, (NUM_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def expected(data: Tensor) -> int:
    """Return the sum of w_i * m_i modulo 2^64 in plain integers, as a signed number."""
    total = 0
    for position in range(len(data) // 8):
        word = int.from_bytes(bytes(data[8 * position : 8 * position + 8].tolist()), "little")
        total += word * ((position * 0x9E3779B97F4A7C15) % 2**64 | 1)
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


def test_value_is_the_documented_sum(data: Tensor) -> None:
    assert int(fingerprint(data)) == expected(data)
    assert int(fingerprint(data[:0])) == 0


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 37])
def test_shards_add_up_to_the_whole(data: Tensor, num_shards: int) -> None:
    size = -(-NUM_BYTES // (16 * num_shards)) * 16
    shards = [(start, data[start : start + size]) for start in range(0, NUM_BYTES, size)]
    total = torch.zeros((), dtype=torch.int64)
    for start, shard in shards:
        total += fingerprint(shard, start)
    assert total.equal(fingerprint(data))


def test_chunks_do_not_matter(data: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fingerprint(data, 64)
    monkeypatch.setattr(module, "CHUNK_WORDS", 5)
    assert fingerprint(data, 64).equal(whole)


def test_every_changed_bit_is_seen(data: Tensor) -> None:
    before = fingerprint(data)
    for position in range(NUM_BYTES):
        for bit in range(8):
            data[position] ^= 1 << bit
            assert not fingerprint(data).equal(before), f"bit {bit} of byte {position}"
            data[position] ^= 1 << bit
    assert fingerprint(data).equal(before)


def test_order_and_place_matter(data: Tensor) -> None:
    words = data.view(torch.int64)
    before = fingerprint(data)
    for i in range(len(words) - 1):
        swapped = words.clone()
        swapped[[i, i + 1]] = words[[i + 1, i]]
        assert not fingerprint(swapped.view(torch.uint8)).equal(before)
    assert not fingerprint(data, 16).equal(before)

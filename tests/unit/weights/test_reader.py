"""Slices of tensors out of safetensors files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fsdp_qlora.errors import WeightsError
from fsdp_qlora.weights import reader as reader_module
from fsdp_qlora.weights.index import read_header
from fsdp_qlora.weights.reader import Reader

TENSORS = {
    "a": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)),
    "b": torch.arange(24).to(torch.bfloat16).view(2, 3, 4),
    "c": torch.arange(11, dtype=torch.uint8),
    "empty": torch.empty(0, 3),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_every_slice_is_the_tensors_own(path: Path) -> None:
    with Reader(read_header(path)) as reader:
        expected_bytes = 0
        for name, value in TENSORS.items():
            flat = value.view(-1)
            for start in range(len(flat) + 1):
                for stop in range(start, len(flat) + 1):
                    found = reader.read(name, start, stop)
                    assert found.dtype == value.dtype
                    assert found.equal(flat[start:stop])
                    expected_bytes += (stop - start) * value.itemsize
            assert reader.read(name).equal(flat)
            expected_bytes += value.nbytes
        assert reader.bytes_read == expected_bytes


def test_bytes_into_memory_that_is_there(path: Path) -> None:
    with Reader(read_header(path)) as reader:
        whole = TENSORS["b"].view(-1).view(torch.uint8)
        memory = torch.zeros(10, dtype=torch.uint8)
        reader.read_into(memory[2:8], "b", 3)
        assert memory.equal(torch.cat((torch.zeros(2), whole[3:9], torch.zeros(2))).to(torch.uint8))
        reader.read_into(memory[:0], "b", 3)
        assert reader.bytes_read == 6


def test_threads_read_a_large_slice_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "PIECE_BYTES", 1000)
    value = torch.randint(0, 256, (12_345,), dtype=torch.uint8)
    save_file({"a": value}, tmp_path / "x.safetensors")
    with Reader(read_header(tmp_path / "x.safetensors")) as reader:
        for start, stop in ((0, 12_345), (1, 12_344), (345, 2345), (700, 1701)):
            assert reader.read("a", start, stop).equal(value[start:stop])
    entries = read_header(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-5])
    with Reader(entries) as reader, pytest.raises(WeightsError, match="ends inside tensor 'a'"):
        reader.read("a")


def test_a_missing_tensor_is_named(path: Path) -> None:
    with Reader(read_header(path)) as reader, pytest.raises(WeightsError, match="tensor 'd' is missing"):
        reader.read("d")
    with pytest.raises(WeightsError, match="empty checkpoint: tensor 'd' is missing"):
        Reader({}).read("d")


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error(path: Path) -> None:
    entries = read_header(path)
    size = path.stat().st_size
    last = max(entries.values(), key=lambda entry: entry.start)
    with path.open("r+b") as file:
        file.truncate(size - 1)
    with Reader(entries) as reader, pytest.raises(WeightsError, match=rf"ends inside tensor '{last.name}'"):
        reader.read(last.name)


def test_a_file_that_disappears_is_an_error(path: Path) -> None:
    entries = read_header(path)
    path.unlink()
    with Reader(entries) as reader, pytest.raises(WeightsError, match=r"x\.safetensors: tensor 'a' cannot be read"):
        reader.read("a")

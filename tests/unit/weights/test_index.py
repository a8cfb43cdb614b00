"""Headers and indexes of safetensors checkpoints: what is right is found, what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fsdp_qlora.errors import WeightsError
from fsdp_qlora.weights.index import MAX_HEADER_BYTES, read_header, read_index
from tests.unit.weights.raw import entry, header_bytes, write_raw

GOOD = {"__metadata__": {"format": "pt"}, "a": entry(0, 8), "b": entry(8, 16, [2, 2], "BF16")}


def test_header_of_the_reference_implementation_is_understood(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7),
        "c": torch.ones(3, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    assert entries.keys() == tensors.keys()
    for name, value in tensors.items():
        found = entries[name]
        assert (found.name, found.dtype, found.shape) == (name, value.dtype, tuple(value.shape))
        assert found.size_bytes == value.nbytes
        assert data[found.start : found.start + found.size_bytes] == bytes(value.view(-1).view(torch.uint8).tolist())


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{'a': 1}", b"", "the header is not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "the header is not valid JSON"),
    "deep nesting": (b"[" * 100_000, b"", "the header is not valid JSON"),
    "a list": ([1, 2], b"", "the header is not a JSON object"),
    "entry is no object": ({"a": 5}, b"", "tensor 'a' has an unreadable header entry 5"),
    "unknown dtype": ({"a": entry(0, 8, dtype="F4")}, bytes(8), "tensor 'a' has an unreadable header entry"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 8]}}, bytes(8), "tensor 'a' has an unreadable"),
    "three offsets": ({"a": {**entry(0, 8), "data_offsets": [0, 8, 9]}}, bytes(8), "tensor 'a' has an unreadable"),
    "infinite offset": (b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, Infinity]}}', bytes(8), "tensor 'a'"),
    "key twice": (b'{"a": {"dtype": "U8"}, "a": {"dtype": "U8"}}', b"", "'a' is listed twice"),
    "size disagrees with shape": ({"a": entry(0, 8, [3])}, bytes(8), "tensor 'a' with shape [3] claims bytes 0 to 8"),
    "negative shape": ({"a": entry(0, 4, [-2, -2])}, bytes(4), "tensor 'a' with shape [-2, -2]"),
    "negative offset": ({"a": entry(-8, 0, [8])}, bytes(8), "tensor 'a' with shape [8] claims bytes -8 to 0"),
    "beyond the file": ({"a": entry(0, 8), "b": entry(8, 16)}, bytes(12), "tensor 'b' with shape [8] claims bytes 8"),
    "overlap": (
        {"a": entry(0, 8), "b": entry(4, 12)},
        bytes(12),
        "tensor 'b' begins at byte 4 of the data instead of 8",
    ),
    "overlap and hole": ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(16), "tensor 'b' begins at byte 0"),
    "hole": ({"a": entry(0, 8), "b": entry(10, 18)}, bytes(18), "tensor 'b' begins at byte 10"),
    "hole at the start": ({"a": entry(8, 16)}, bytes(16), "tensor 'a' begins at byte 8"),
    "bytes left over": ({"a": entry(0, 8)}, bytes(9), "1 bytes after the last tensor"),
    "huge shape": ({"a": entry(0, 8, [2**40, 2**40])}, bytes(8), "tensor 'a' with shape [1099511627776"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_wrong_headers_are_refused(tmp_path: Path, case: str) -> None:
    header, data, message = HEADERS[case]
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(WeightsError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_huge_header_is_refused_without_reading_it(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(size.to_bytes(8, "little"))
        file.truncate(min(size, MAX_HEADER_BYTES) + 4096)  # sparse: takes no space on disk
    with pytest.raises(WeightsError, match=f"header of {size} bytes"):
        read_header(path)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = header_bytes(GOOD) + bytes(16)
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    assert set(read_header(path)) == {"a", "b"}
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=r"x\.safetensors: .*(damaged|not valid JSON)"):
            read_header(path)


def write_sharded(folder: Path, weight_map: dict[str, Any], files: dict[str, dict[str, Any]]) -> Path:
    """Write an index and the files' headers with as many bytes as they promise."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, header in files.items():
        stop = max(item["data_offsets"][1] for item in header.values())
        write_raw(folder / name, header, bytes(stop))
    return folder


def test_index_of_several_files(tmp_path: Path) -> None:
    files = {"m-1.safetensors": {"a": entry(0, 8)}, "m-2.safetensors": {"b": entry(0, 4), "c": entry(4, 6)}}
    write_sharded(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"}, files)
    tensors = read_index(tmp_path)
    assert {name: found.file.name for name, found in tensors.items()} == {
        "a": "m-1.safetensors",
        "b": "m-2.safetensors",
        "c": "m-2.safetensors",
    }


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/tmp/x.safetensors",
        "sub/x.safetensors",
        "..",
        ".",
        "",
        "x.bin",
        "x.safetensors/",
        "../../etc/passwd",
        7,
        None,
        ["x.safetensors"],
    ],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sub").mkdir()
    for place in (tmp_path, folder / "sub"):  # following the name would find a good file
        write_raw(place / "x.safetensors", {"a": entry(0, 8)}, bytes(8))
    write_sharded(folder, {"a": name}, {})
    with pytest.raises(WeightsError) as caught:
        read_index(folder)
    assert f"model.safetensors.index.json: tensor 'a' is said to be in {name!r}; only plain names" in str(caught.value)


INDEXES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"{", "the index is not valid JSON"),
    "empty file": (b"", "the index is not valid JSON"),
    "not UTF-8": (b"\xff\xfe\x00", "the index is not valid JSON"),
    "a list": (b"[]", "the index is not a JSON object"),
    "no map": (b"{}", "no weight_map"),
    "empty map": (b'{"weight_map": {}}', "no weight_map"),
    "map is a list": (b'{"weight_map": ["a"]}', "no weight_map"),
    "tensor twice": (b'{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}', "'a' is listed twice"),
    "missing file": (b'{"weight_map": {"a": "m.safetensors"}}', "m.safetensors named by the index is missing"),
    "file name too long": (b'{"weight_map": {"a": "' + b"m" * 300 + b'.safetensors"}}', "mmm.safetensors"),
    "NUL in a file name": (b'{"weight_map": {"a": "m\\u0000.safetensors"}}', "named by the index is missing"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_wrong_indexes_are_refused(tmp_path: Path, case: str) -> None:
    text, message = INDEXES[case]
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(WeightsError) as caught:
        read_index(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_promised_tensor_must_be_in_its_file(tmp_path: Path) -> None:
    files = {"m-1.safetensors": {"a": entry(0, 8)}, "m-2.safetensors": {"b": entry(0, 4)}}
    write_sharded(tmp_path, {"a": "m-1.safetensors", "c": "m-1.safetensors", "b": "m-2.safetensors"}, files)
    with pytest.raises(
        WeightsError, match=r"m-1\.safetensors: tensor 'c' is promised by the index and not in the file"
    ):
        read_index(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    files = {"m-1.safetensors": {"a": entry(0, 8)}, "m-2.safetensors": {"a": entry(0, 8), "b": entry(8, 9)}}
    write_sharded(tmp_path, {"a": "m-1.safetensors", "b": "m-2.safetensors"}, files)
    with pytest.raises(WeightsError, match=r"m-2\.safetensors: tensor 'a' is in m-1\.safetensors too"):
        read_index(tmp_path)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(WeightsError, match=r"model\.safetensors: cannot be read"):
        read_index(tmp_path)
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(WeightsError, match=r"index\.json: cannot be read"):
        read_index(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(WeightsError, match="only safetensors weights are read"):
        read_index(tmp_path)

"""Files of every kind, and hub datasets without a hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fsdp_qlora.data.readers import RawRow, read_raw
from fsdp_qlora.errors import DataError

BOM = b"\xef\xbb\xbf"


def write(folder: Path, name: str, content: bytes) -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_jsonl(tmp_path: Path, bom: bytes, end: bytes) -> None:
    path = write(tmp_path, "a.jsonl", bom + b'{"text": "one"}' + end + end + '{"text": "zwölf"}'.encode() + end)
    assert list(read_raw(path)) == [RawRow(f"{path}:1", {"text": "one"}), RawRow(f"{path}:3", {"text": "zwölf"})]


@pytest.mark.parametrize("bom", [b"", BOM])
def test_json_list_and_json_lines(tmp_path: Path, bom: bytes) -> None:
    as_list = write(tmp_path, "a.json", bom + b' [{"text": "one"},\n {"text": "two"}, 3]')
    assert [row.columns for row in read_raw(as_list)] == [{"text": "one"}, {"text": "two"}, {}]
    assert list(read_raw(as_list))[2] == RawRow(f"{as_list}:3", {}, "expected a JSON object, found a number")
    as_lines = write(tmp_path, "b.json", bom + b'{"text": "one"}\n{"text": "two"}\n')
    assert [row.columns for row in read_raw(as_lines)] == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"text": "one"},\n{"text": "two",\n}]', r"a\.json:3: invalid JSON at column 1"),
        (b'[{"text": "one"},\n{"text": "\xff"}]', r"a\.json:2: invalid UTF-8"),
        (b"[" * 100_000, "invalid JSON"),
    ],
)
def test_damaged_json_list(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        list(read_raw(write(tmp_path, "a.json", content)))


@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv(tmp_path: Path, bom: bytes, end: str) -> None:
    lines = ["prompt,completion", '"a, b","two', 'lines"', "c,d", "only one", "", "e,f", "", ""]
    path = write(tmp_path, "a.csv", bom + end.join(lines).encode())
    rows = list(read_raw(path))
    assert rows[0] == RawRow(f"{path}:2", {"prompt": "a, b", "completion": f"two{end}lines"})
    assert rows[1] == RawRow(f"{path}:4", {"prompt": "c", "completion": "d"})
    assert rows[2] == RawRow(f"{path}:5", {}, "expected 2 fields as in the first row, found 1")
    assert rows[3] == RawRow(f"{path}:7", {"prompt": "e", "completion": "f"})
    assert len(rows) == 4


def test_csv_that_is_damaged(tmp_path: Path) -> None:
    quote = write(tmp_path, "quote.csv", b'text\nfine\n"open\nmore\n')
    assert [row.problem for row in read_raw(quote)] == ["", "invalid CSV: unexpected end of data"]
    stray = write(tmp_path, "stray.csv", b'text\n"a"b\nfine\n')
    problem, fine = read_raw(stray)
    assert (problem.where, problem.problem[:12]) == (f"{stray}:2", "invalid CSV:")
    assert fine == RawRow(f"{stray}:3", {"text": "fine"})


def test_csv_with_a_long_field_and_invalid_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", b"text\n" + b"x" * 200_000 + b"\n\xff\n")
    long, invalid = read_raw(path)
    assert len(str(long.columns["text"])) == 200_000
    assert invalid.columns["text"] == "\udcff"  # formats.check_text refuses it


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"messages": [messages, None]}), path)
    assert list(read_raw(path)) == [
        RawRow(f"{path}:1", {"messages": messages}),
        RawRow(f"{path}:2", {"messages": None}),
    ]
    content = Path(path).read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"PAR1" + b"\0" * 100):
        with pytest.raises(DataError, match="damaged or no Parquet file"):
            list(read_raw(write(tmp_path, "b.parquet", damaged)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_empty_files_have_no_rows(tmp_path: Path, name: str) -> None:
    for content in (b"", BOM, b"\n\n"):
        assert list(read_raw(write(tmp_path, name, content))) == []


def test_names_that_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        list(read_raw(str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(DataError, match=r"a\.txt': files end in \.jsonl, \.json, \.csv, \.parquet; rename it"):
        list(read_raw(str(write(tmp_path, "a.txt", b"x"))))
    for name in ("../folder", "a b", "https://host/x", "a/b/c", "a:b:c:d"):
        with pytest.raises(DataError, match=r"neither a \.jsonl, \.json, \.csv, \.parquet file nor a hub id"):
            list(read_raw(name))


def test_hub_dataset_out_of_reach() -> None:
    """HF_HUB_OFFLINE is set for all tests: the error says what to do instead of a traceback of the library."""
    with pytest.raises(DataError, match=r"dataset nobody/nothing: cannot be loaded .*check the name, the network"):
        list(read_raw("nobody/nothing"))


def test_dataset_by_name_through_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name stands in for the hub: the same call reads both."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    rows = [{"text": "one"}, {"text": "two"}]
    Path("owner/name/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_raw("owner/name")) == [RawRow(f"owner/name:{number}", row) for number, row in enumerate(rows, 1)]

"""Dataset files and hub datasets -> rows as dicts with their place, or with the reason why they cannot be read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fsdp_qlora.data import hub
from fsdp_qlora.errors import DataError

MAX_ROW_BYTES = 8_000_000
"""A longer row is a broken file (a missing line end), not an example."""


class RawRow(NamedTuple):
    """One row as it was read."""

    where: str
    """`file:line` (jsonl, csv: of its first line), `file:row` or `dataset:row`, from 1."""

    columns: dict[str, object]

    problem: str = ""
    """Why the row could not be read; columns are empty then."""


def read_raw(dataset: str, *, hub_streaming: bool = False) -> Iterator[RawRow]:
    """Yield the rows of a local file, chosen by its ending, or of a hub dataset.

    Args:
        hub_streaming: keep nothing of a hub dataset on disk.

    Raises:
        DataError: no such file or dataset, an ending that is not supported, or a file that is damaged as a whole.
    """
    path = Path(dataset).expanduser()
    reader = READERS.get(path.suffix.lower())
    if reader is not None:
        if not path.is_file():
            raise DataError(
                f"dataset {dataset}: no such file; give a path relative to the current folder or an absolute one"
            )
        yield from reader(path)
        return
    if path.is_file():
        raise DataError(
            f"dataset {dataset!r}: files end in {', '.join(READERS)}; rename it, or convert it to one of these"
        )
    name = hub.parse_name(dataset)
    if name is None:
        raise DataError(f"dataset {dataset!r} is neither a {', '.join(READERS)} file nor a hub id such as owner/name")
    for where, columns in hub.read_hub(dataset, name, hub_streaming):
        yield RawRow(where, columns)


def read_jsonl(path: Path) -> Iterator[RawRow]:
    """Yield one row per line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield parse_line(f"{path}:{number}", line)


def parse_line(where: str, line: bytes) -> RawRow:
    """Return the row of one line of JSON."""
    if len(line) > MAX_ROW_BYTES:
        return RawRow(where, {}, too_long(len(line)))
    try:
        return json_row(where, json.loads(line.decode().rstrip()))  # so that errors are of column, not of the next line
    except UnicodeDecodeError as error:
        return RawRow(where, {}, f"invalid UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return RawRow(where, {}, f"invalid JSON at column {error.colno}: {error.msg}; a line holds one whole object")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        return RawRow(where, {}, f"invalid JSON: {error}")


def json_row(where: str, value: object) -> RawRow:
    """Return the row of one JSON value, which must be an object."""
    if not isinstance(value, dict):
        return RawRow(where, {}, f"expected a JSON object, found {json_type(value)}")
    return RawRow(where, value)


def read_json(path: Path) -> Iterator[RawRow]:
    """Yield the objects of a JSON list; a file that does not start with [ is read as one object per line."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data and not data.lstrip().startswith(b"["):
        yield from read_jsonl(path)
        return
    try:
        values = json.loads(data.decode()) if data.strip() else []
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: invalid UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: invalid JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: invalid JSON: {error}") from error
    for number, value in enumerate(values, 1):
        yield json_row(f"{path}:{number}", value)


def read_csv(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a comma-separated file whose first row names the columns."""
    csv.field_size_limit(MAX_ROW_BYTES)  # the csv module's default of 128 KB is less than a long document
    # Invalid bytes become surrogates, which the check of every text reports for their row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] = []
        line = 1
        while True:
            where = f"{path}:{line}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield RawRow(where, {}, f"invalid CSV: {error}")
                line = reader.line_num + 1
                continue
            line = reader.line_num + 1
            if not header:
                header = fields
            elif fields and len(fields) != len(header):
                yield RawRow(where, {}, f"expected {len(header)} fields as in the first row, found {len(fields)}")
            elif fields:  # the line is not blank
                yield RawRow(where, dict(zip(header, fields, strict=True)))


def read_parquet(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for columns in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path}:{number}", columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged or no Parquet file (after row {number}): {error}") from error


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def too_long(size_bytes: int) -> str:
    """Return the reason for refusing a row of that size."""
    return f"row of {size_bytes / 1e6:.1f} MB, the limit is {MAX_ROW_BYTES / 1e6:.0f} MB"


def json_type(value: object) -> str:
    """Return the type of a parsed value in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)

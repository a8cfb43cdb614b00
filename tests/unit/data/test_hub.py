"""Hub datasets by name, downloaded or streamed, from a stand-in hub; errors that say what to do."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fsdp_qlora.data.hub import HubName, parse_name
from tests.unit.data.dataset_hub import COMMIT, DatasetHub, serve

ROOT = Path(__file__).resolve().parents[3]
REPO = "someone/sums"
ROWS = {
    name: [{"prompt": f"{name} {i}", "completion": str(i)} for i in range(3)] for name in ("main", "hard", "validation")
}
CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.ENDING}
  - {split: validation, path: main/validation.ENDING}
- config_name: hard
  data_files: [{split: train, path: hard/train.ENDING}]
---
"""

# huggingface_hub reads its settings when it is imported, so trials are processes of their own; each asks several things.
CLIENT = """
import json, sys
from fsdp_qlora.data import hub
from fsdp_qlora.data.readers import read_raw
from fsdp_qlora.errors import DataError
answers = []
for dataset, streaming in json.loads(sys.argv[1]):
    try:
        rows = [(row.where, row.columns) for row in read_raw(dataset, hub_streaming=streaming)]
        answers.append([rows, hub.fingerprint(dataset, hub.parse_name(dataset), streaming)])
    except DataError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def ask(hub: DatasetHub, home: Path, *questions: tuple[str, bool], **environment: str) -> list[Any]:
    """Read datasets in a new process whose hub is the stand-in; return rows and fingerprint, or the error, of each."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-c", CLIENT, json.dumps(questions)]
    done = subprocess.run(
        command, env={**kept, **settings, **environment}, cwd=home, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout)
    return answers


def parquet(rows: list[dict[str, str]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def jsonl(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(params=[jsonl, parquet])
def hub(request: pytest.FixtureRequest) -> Iterator[DatasetHub]:
    """A repository whose files are all of one kind, as the library wants it."""
    write, ending = request.param, request.param.__name__
    names = {"main/train": "main", "main/validation": "validation", "hard/train": "hard"}
    files = {f"{path}.{ending}": write(ROWS[name]) for path, name in names.items()}
    with serve(DatasetHub(REPO, {"README.md": CARD.replace("ENDING", ending).encode(), **files})) as served:
        yield served


def test_names() -> None:
    assert parse_name("owner/name") == HubName("owner/name", None, None, "train")
    assert parse_name("owner/name@v1.0:main") == HubName("owner/name", "v1.0", "main", "train")
    assert parse_name("name::test") == HubName("name", None, None, "test")
    assert [parse_name(text) for text in ("a/b/c", "a:b:c:d", "https://host/x", "a b", "")] == [None] * 5


def test_rows_downloaded_and_streamed(hub: DatasetHub, tmp_path: Path) -> None:
    names = {f"{REPO}:main": "main", f"{REPO}:main:validation": "validation", f"{REPO}@{COMMIT}:hard": "hard"}
    for streaming in (True, False):
        answers = ask(hub, tmp_path, *((name, streaming) for name in names))
        for (name, key), (rows, _) in zip(names.items(), answers, strict=True):
            assert rows == [[f"{name}:{number}", row] for number, row in enumerate(ROWS[key], 1)]
        if streaming:
            assert {fingerprint for _, fingerprint in answers} == {COMMIT}
            kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
            assert not [path for path in kept if path.suffix in (".arrow", ".parquet", ".jsonl")]
    again = ask(hub, tmp_path, *((name, False) for name in names), HF_HUB_OFFLINE="1")
    assert again == answers


@pytest.mark.parametrize("hub", [jsonl], indirect=True)
def test_errors_say_what_to_do(hub: DatasetHub, tmp_path: Path) -> None:
    reasons = {
        "someone/nothing": f"dataset someone/nothing is neither a local file nor a dataset at {hub.url} that you may",
        REPO: "has several configurations; name one of main, hard, such as someone/sums:main",
        f"{REPO}:easy": "has no configuration 'easy', but main, hard",
        f"{REPO}:main:test": "has no split 'test', but train, validation; name one as in someone/sums:main:train",
        f"{REPO}@v9:main": "has no revision v9; see",
    }
    questions = [(name, streaming) for name in reasons for streaming in (False, True)]
    for (name, _), answer in zip(questions, ask(hub, tmp_path, *questions), strict=True):
        assert reasons[name] in answer
    hub.files["main/train.jsonl"] += b"{"
    for answer in ask(hub, tmp_path / "damaged", (f"{REPO}:main", False), (f"{REPO}:main", True)):
        assert "JSON parse error" in answer
    hub.is_gated = True
    for answer in ask(hub, tmp_path / "other", (f"{REPO}:hard", False), (f"{REPO}:hard", True)):
        assert "someone/sums is gated and no HF_TOKEN is set; accept its terms at" in answer
    (offline,) = ask(hub, tmp_path / "third", (REPO, True), HF_HUB_OFFLINE="1")
    assert "check the name, the network" in offline

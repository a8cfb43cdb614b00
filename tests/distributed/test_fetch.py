"""Who downloads: one process of a node, or of all nodes that share the cache."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fsdp_qlora import fetch
from fsdp_qlora.distributed import process_group, sum_over_ranks
from fsdp_qlora.errors import FsdpQloraError, ModelError
from fsdp_qlora.models.hub import download_cache
from tests.ranks import run_ranks

NODE = 2


def fetch_on_rank(caches: list[Path], failing: int | None, seconds: float, timeout_s: int) -> tuple[bool, str, bool]:
    """Fetch on two nodes of two ranks, each with its cache; return whether this rank did, its error and if all is there."""
    rank = int(os.environ["RANK"])
    os.environ.update(LOCAL_RANK=str(rank % NODE), LOCAL_WORLD_SIZE=str(NODE))
    cache = caches[rank // NODE]
    fetch.REMINDER_S = 0.1
    fetched, error = [], ""

    def download() -> None:
        fetched.append(rank)
        time.sleep(seconds)
        if rank == failing:
            raise ModelError("it is gated")
        (cache / f"model-by-{rank}").touch()

    # training has three seconds for a collective, and one of the downloads takes longer
    with process_group("full", timeout_s=3, device="cpu") as ranks:
        try:
            fetch.fetch_once(download, cache, ranks, timeout_s)
        except FsdpQloraError as raised:
            error = str(raised)
        found = any(cache.glob("model-by-*"))
        sum_over_ranks(1)
    return bool(fetched), error, found


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [tmp_path / "first", tmp_path / "second"]


def test_nodes_that_share_the_cache_download_once(folders: list[Path]) -> None:
    results = run_ranks(fetch_on_rank, 2 * NODE, [folders[0], folders[0]], None, 0.0, 60)
    assert results == [(True, "", True), *[(False, "", True)] * 3]
    assert [path.name for path in folders[0].iterdir()] == ["model-by-0"], "no probe is left"


def test_nodes_with_a_disk_of_their_own_download_once_each(folders: list[Path]) -> None:
    folders[1].mkdir()
    results = run_ranks(fetch_on_rank, 2 * NODE, folders, None, 0.0, 60)
    assert [did for did, _, _ in results] == [True, False, True, False]
    assert all(found for _, _, found in results)


def test_waiting_for_a_download_has_a_limit_of_its_own(folders: list[Path]) -> None:
    results = run_ranks(fetch_on_rank, 2 * NODE, [folders[0], folders[0]], None, 6.0, 60)
    assert all(found for _, _, found in results)


def test_a_failed_node_is_an_error_of_all(folders: list[Path]) -> None:
    folders[1].mkdir()
    results = run_ranks(fetch_on_rank, 2 * NODE, folders, 2, 0.0, 60)
    messages = [error for _, error, _ in results]
    assert messages[2] == "it is gated"
    assert {messages[rank] for rank in (0, 1, 3)} == {"rank 2 failed while fetching the model: it is gated"}


def test_which_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path / "made"))
    assert download_cache("smollm2-135m") == tmp_path / "made"
    assert download_cache(str(tmp_path)) is None
    hub = download_cache("llama-8b")
    assert hub is not None
    assert hub.name == "hub"
    assert download_cache("owner/name") == hub

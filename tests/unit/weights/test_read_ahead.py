"""Reading into the page cache what will be loaded next."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from fsdp_qlora.weights import read_ahead
from fsdp_qlora.weights.read_ahead import ReadAhead

PIECE, AHEAD = 100, 1000


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Place and size of every read that is made, with small pieces."""
    made: list[tuple[int, int]] = []

    def preadv(descriptor: int, buffers: list[memoryview], position: int) -> int:
        made.append((position, len(buffers[0])))
        return original(descriptor, buffers, position)

    original = os.preadv
    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", AHEAD)
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(bytes(10_000))
    return path


def wait_for(reads: list[tuple[int, int]], count: int) -> None:
    deadline = time.monotonic() + 10
    while len(reads) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)  # for reads that must not come
    assert len(reads) == count


def test_runs_are_read_piece_by_piece_and_once(file: Path, reads: list[tuple[int, int]]) -> None:
    with ReadAhead([(file, 5, 250), (file, 700, 3), (file, 800, 0)], 3):
        wait_for(reads, 4)
    assert sorted(reads) == [(5, 100), (105, 100), (205, 50), (700, 3)]


def test_the_threads_wait_for_the_loader_and_skip_what_it_has_read(file: Path, reads: list[tuple[int, int]]) -> None:
    with ReadAhead([(file, 0, 10_000)], 2) as ahead:
        wait_for(reads, AHEAD // PIECE)
        ahead.loaded(200)
        wait_for(reads, AHEAD // PIECE + 2)
        ahead.loaded(4800)
        wait_for(reads, AHEAD // PIECE + 2 + AHEAD // PIECE)
    assert {position for position, _ in reads} == {*range(0, 1200, PIECE), *range(5000, 6000, PIECE)}


@pytest.mark.parametrize("loaded", [0, 10_000])
def test_it_ends_at_once(file: Path, loaded: int) -> None:
    running = threading.active_count()
    started = time.monotonic()
    with ReadAhead([(file, 0, 10_000)] * 3, 4) as ahead:
        ahead.loaded(loaded)
    assert time.monotonic() - started < 5
    assert threading.active_count() == running


def test_a_file_that_cannot_be_read_is_left_to_the_loader(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ReadAhead([(tmp_path / "missing", 0, 100)], 2):
        pass
    assert capfd.readouterr() == ("", "")

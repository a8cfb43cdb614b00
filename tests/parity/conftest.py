"""One process group for the parity tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fsdp_qlora.distributed import Ranks, process_group


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with process_group("full", timeout_s=60, device="cpu") as joined:
        yield joined

"""Updates in CPU memory beside the forward of the GPU: no block computes with parameters that are still to be updated."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.test_host_updates import check_late_updates

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("world_size", [1, 2])
def test_late_updates_change_nothing(tmp_path: Path, world_size: int) -> None:
    check_late_updates(tmp_path, world_size, "cuda")

"""The doctor's measurements on real GPUs."""

from __future__ import annotations

import pytest
import torch

from fsdp_qlora.commands import doctor as report
from fsdp_qlora.config.command import DoctorConfig

pytestmark = pytest.mark.gpu


def test_every_check_of_a_gpu_machine_gives_a_finding() -> None:
    found = {name: report.examine(name, check) for name, check in report.checks(DoctorConfig())}
    assert [finding for finding in found.values() if "the check itself failed" in finding.found] == []
    assert found["CUDA"].status == found["bitsandbytes"].status == "ok"
    assert found["host copies"].found.count("GB/s there") == torch.cuda.device_count()
    assert ("GPU to GPU" in found) == (torch.cuda.device_count() > 1)

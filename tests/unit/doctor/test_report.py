"""The report: lines, JSON and the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from fsdp_qlora import cli
from fsdp_qlora.commands import doctor as report
from fsdp_qlora.config.command import DoctorConfig
from fsdp_qlora.doctor.finding import Finding, ok, problem, warning


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace the checks by such as return the given findings."""

    def _find(*findings: Finding) -> None:
        monkeypatch.setattr(report, "checks", lambda config: [(one.name, lambda one=one: one) for one in findings])

    return _find


def test_only_problems_fail(find: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    find(ok("disk", "fast"), warning("CUDA", "no GPU", "get one"))
    cli.main(["doctor"])
    out = capsys.readouterr().out
    assert out.startswith("ok       disk            fast\nwarning  CUDA            no GPU\n")
    assert "-> get one" in out
    assert "0 problems, 1 warnings; a run here should work" in out
    find(problem("CUDA", "no driver", "install one"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor"])
    assert caught.value.code == 1


def test_json(find: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    find(warning("CUDA", "no GPU", "get one"))
    cli.main(["doctor", "--json"])
    expected = {"name": "CUDA", "status": "warning", "found": "no GPU", "remedy": "get one"}
    assert json.loads(capsys.readouterr().out)["findings"] == [expected]


def test_a_check_that_fails_is_a_problem_and_stops_nothing() -> None:
    def broken() -> Finding:
        raise RuntimeError("CUDA driver error\nstack")

    finding = report.examine("GPUs", broken)
    assert (finding.status, finding.name) == ("problem", "GPUs")
    assert "RuntimeError: CUDA driver error" in finding.found


def test_checks_follow_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(**settings: object) -> list[str]:
        return [name for name, _ in report.checks(DoctorConfig(**settings))]  # type: ignore[arg-type]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPUs" not in names()
    assert "model" not in names()
    assert names(model="llama-8b")[-1] == "model"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "host copies" in names()
    assert "GPU to GPU" not in names()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert {"NCCL", "GPU to GPU"} <= set(names())


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [report.examine(name, check) for name, check in report.checks(DoctorConfig())]
    assert [finding for finding in findings if "the check itself failed" in finding.found] == []

"""Installed packages, CUDA and the hub as the doctor sees them."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from fsdp_qlora.doctor import gpus, launcher, software
from fsdp_qlora.errors import ModelError
from fsdp_qlora.host_memory import GIB
from tests.tiny import save_tiny

SECRET = "hf_0123456789abcdef0123456789abcdef01234567"


def test_packages_are_compared_with_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"torch {importlib.metadata.version('torch')}" in software.packages().found
    wanted = ["torch>=99", "no-such-package-here>=1", "fire>=0.7", "peft>=99; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    finding = software.packages()
    assert finding.status == "problem"
    assert "torch>=99 is needed" in finding.found
    assert "no-such-package-here>=1 is not installed" in finding.found
    assert "fire" not in finding.found
    assert "peft" not in finding.found


def test_a_source_folder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", fail)
    assert software.packages().status == "warning"


def test_bitsandbytes_is_tried_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.quantisation().status == "ok"

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", fail)
    finding = software.quantisation()
    assert (finding.status, finding.found) == ("problem", "cannot quantise on cpu: no kernel image is available")


@pytest.mark.parametrize(
    ("driver", "build", "visible", "status", "found"),
    [
        (None, "13.0", None, "warning", "no NVIDIA driver"),
        ("580.65", None, None, "problem", "but there is an NVIDIA driver (580.65)"),
        ("470.10", "13.0", None, "problem", "finds no GPU with driver 470.10"),
        ("580.65", "13.0", "", "problem", "CUDA_VISIBLE_DEVICES hides every GPU"),
    ],
)
def test_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    driver: str | None,
    build: str | None,
    visible: str | None,
    status: str,
    found: str,
) -> None:
    version = tmp_path / "version"
    if driver is not None:
        version.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Wed Jan 1\nGCC version: 12.2\n")
    monkeypatch.setattr(software, "DRIVER", version)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    finding = software.cuda()
    assert finding.status == status
    assert found in finding.found


def test_triton_needs_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert software.compiler().status == "problem"
    assert "no C compiler" in software.compiler().found


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    finding = software.hub_login()
    assert finding.found.startswith("HF_TOKEN is set")
    assert SECRET not in str(finding)


def test_model_in_a_folder(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "tiny")
    finding = software.model(str(folder), tmp_path)
    assert finding.status == "ok"
    assert "are here already" in finding.found


def test_model_larger_than_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    assert software.model(str(folder), tmp_path / "cache").status == "ok"
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    finding = software.model(str(folder), tmp_path / "cache")
    assert finding.status == "problem"
    assert "0.0 GiB free for the download" in finding.found


def test_model_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(name: str) -> Path:
        raise ModelError("it is gated; accept its licence")

    monkeypatch.setattr(software, "resolve_config", refuse)
    finding = software.model("llama-8b", tmp_path)
    assert (finding.status, finding.remedy) == ("problem", "it is gated; accept its licence")


class Card:
    """What torch tells of a GPU."""

    def __init__(self, name: str, major: int) -> None:
        self.name, self.major, self.minor = name, major, 0


@pytest.mark.parametrize(
    ("cards", "free", "remedy"),
    [
        ([Card("A", 8), Card("A", 8)], 23, ""),
        ([Card("A", 7)], 23, "no bf16"),
        ([Card("A", 8)], 3, "is in use"),
        ([Card("A", 8), Card("B", 9)], 23, "of several kinds"),
    ],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, cards: list[Card], free: int, remedy: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: cards[index])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free * GIB, 24 * GIB))
    finding = gpus.gpus()
    assert finding.status == ("warning" if remedy else "ok")
    assert remedy in finding.remedy
    assert f"0: A, {free}.0 of 24.0 GiB free" in finding.found


TORCHRUN = dict(zip(launcher.TORCHRUN, ("1", "2", "1", "2", "node1", "29500"), strict=True))


@pytest.mark.parametrize(
    ("environment", "status"),
    [
        ({}, "ok"),
        (TORCHRUN, "ok"),
        ({"WORLD_SIZE": "4"}, "problem"),
        ({"WORLD_SIZE": "1", "RANK": "0"}, "ok"),
        ({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"}, "problem"),
    ],
)
def test_torchrun(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], status: str) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher.torchrun().status == status


@pytest.mark.parametrize(
    ("environment", "gpus", "remedy"),
    [
        ({"JOB_NUM_NODES": "2", "NTASKS": "2", "CPUS_PER_TASK": "16"}, 4, ""),
        ({"JOB_NUM_NODES": "2", "NTASKS": "8"}, 4, "--ntasks-per-node=1"),
        ({"JOB_NUM_NODES": "1", "NTASKS": "1", "CPUS_PER_TASK": "1"}, 4, "--cpus-per-task=16"),
    ],
)
def test_slurm(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], gpus: int, remedy: str) -> None:
    for name in launcher.SLURM:
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert launcher.slurm().found == "not in a job"
    for name, value in {"JOB_ID": "7", **environment}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    finding = launcher.slurm()
    assert finding.status == ("warning" if remedy else "ok")
    assert remedy in finding.remedy

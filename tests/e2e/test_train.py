"""Whole runs through the real command lines, on one and on two ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import SECRET

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "batch_size": 1,
    "context_length": 64,
    "eval_split": 0.2,
    "max_steps": 8,
    "eval_steps": 4,
    "lr": 1e-2,
    "lora_rank": 8,
    "lora_alpha": 16,
    "warmup_ratio": 0.1,
}


@dataclass
class Run:
    """A finished training run."""

    folder: Path
    out: str
    err: str
    code: int

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        return record


def start(
    num_ranks: int, arguments: list[str], environment: dict[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run train.py from another folder, under torchrun for more than one rank."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks)] if num_ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=cwd, check=False)


def flags(**settings: object) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


class Runs(dict[int, Run]):
    """The same training on one and on two ranks, each done when it is first asked for."""

    def __init__(self, paths: dict[str, object], environment: dict[str, str], folder: Path) -> None:
        super().__init__()
        self.paths, self.environment, self.folder = paths, environment, folder

    def __missing__(self, num_ranks: int) -> Run:
        output = self.folder / f"{num_ranks} ranks"
        settings = {**self.paths, **SETTINGS, "gradient_accumulation_steps": 4 // num_ranks, "output_dir": output}
        result = start(num_ranks, flags(**settings), self.environment, self.folder)
        self[num_ranks] = Run(output, result.stdout, result.stderr, result.returncode)
        return self[num_ranks]


@pytest.fixture(scope="module")
def runs(base: Path, dataset: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs({"model": base, "dataset": dataset}, environment, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_ends_well_and_says_what_it_did(runs: Runs, num_ranks: int, base: Path) -> None:
    run = runs[num_ranks]
    assert run.code == 0, run.err
    assert "Traceback" not in run.out + run.err
    assert f"1 sequences x {4 // num_ranks} micro-batches x {num_ranks} ranks = 4 sequences" in run.out
    assert run.out.count("done: 8 steps") == 1, "one rank speaks"
    assert "gathered bytes verified" in run.out
    started = re.search(r"until the first step: (.*)", run.out)
    assert started is not None
    spent = {part.rsplit(" ", 2)[0]: float(part.split()[-2]) for part in started[1].split(", ")}
    assert {"imports", "loading the data", "loading weights", "first step"} <= spent.keys()
    assert 0 < spent["imports"] < 300
    for line in run.metrics:
        assert "loss" not in line or 0 <= line["data_seconds"] <= line["step_seconds"] + 1e-3
    record = run.record
    assert record["world_size"] == num_ranks
    assert record["config"]["lora_rank"] == 8
    assert record["base"]["folder"] == base.name
    assert record["result"]["steps"] == 8
    files = {".lock", "adapter", "checkpoints", "exit.json", "metrics.jsonl", "run.json"}
    assert {path.name for path in run.folder.iterdir()} == files
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["step-000008"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_files_hold_no_secret_and_follow_the_umask(runs: Runs, num_ranks: int) -> None:
    run = runs[num_ranks]
    umask = os.umask(0o022)
    os.umask(umask)
    assert SECRET not in run.out + run.err
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert {"run.json", "adapter_model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_it_learns(runs: Runs, num_ranks: int) -> None:
    evaluations = {line["step"]: line["eval_loss"] for line in runs[num_ranks].metrics if "eval_loss" in line}
    assert list(evaluations) == [0, 4, 8]
    assert evaluations[8] < evaluations[4] < evaluations[0]
    assert evaluations[8] < evaluations[0] - 0.5
    result = runs[num_ranks].record["result"]
    assert (result["eval_loss_before"], result["eval_loss_after"]) == (evaluations[0], evaluations[8])


def test_two_ranks_compute_what_one_does(runs: Runs) -> None:
    one, two = runs[1].metrics, runs[2].metrics
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() & {"loss", "grad_norm", "eval_loss", "lr", "target_tokens", "epoch"}:
            assert first[name] == pytest.approx(second[name], rel=1e-4), (first["step"], name)
    assert runs[1].record["base"]["fingerprint"] == runs[2].record["base"]["fingerprint"], "the same 4-bit bytes"
    assert runs[1].record["result"]["tokens"] == runs[2].record["result"]["tokens"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_peft_loads_the_adapter(runs: Runs, num_ranks: int, base: Path) -> None:
    adapter = runs[num_ranks].folder / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    inputs = tokenizer("The colour of snow is", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        before = model(**inputs).logits
        after = PeftModel.from_pretrained(model, adapter)(**inputs).logits
        assert not after.allclose(before, atol=0.1)
        assert AutoPeftModelForCausalLM.from_pretrained(adapter)(**inputs).logits.equal(after)


def test_generate_answers_with_the_adapter(runs: Runs, environment: dict[str, str], tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "fsdp-qlora"
    arguments = flags(adapter=runs[2].folder, prompt="What is the colour of snow?", max_new_tokens=12)
    result = subprocess.run(
        [program, "generate", *arguments], capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "colour" in result.stdout, "what it was trained to say"


WATCHED = """
import socket, sys
def refuse(*arguments, **_):
    print("connection attempt:", arguments[1:], file=sys.stderr)
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from fsdp_qlora.cli import main
main(sys.argv[1:])
"""
"""The command line in a process that can open no connection from Python."""


def test_a_local_folder_needs_no_network(
    base: Path, dataset: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    online = {name: value for name, value in environment.items() if name != "HF_HUB_OFFLINE"}
    arguments = flags(model=base, dataset=dataset, output_dir=tmp_path / "run", max_steps=1, context_length=64)
    command = [sys.executable, "-c", WATCHED, "train", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=online, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "connection attempt" not in result.stderr


def test_an_error_under_torchrun_is_printed_once(
    base: Path, dataset: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = flags(model=base, dataset=dataset, output_dir=output, context_length=1024)
    result = start(2, arguments, environment, tmp_path)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: context_length 1024 is longer than the model's 512 positions; use at most 512"]
    assert "fsdp_qlora/trainer.py" not in result.stderr, "no traceback of ours"

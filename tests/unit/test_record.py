"""run.json: complete enough to repeat a run, and without secrets."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fsdp_qlora import config as config_module
from fsdp_qlora.cli import COMMANDS, read_flags
from fsdp_qlora.config import TrainConfig, to_dict
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.record import command, describe, write_record


def test_record_says_what_was_run(ranks: Ranks) -> None:
    config = TrainConfig(lora_rank=8, dataset="my rows.jsonl")
    record = describe(config, ranks)
    assert record["config"] == to_dict(config)
    assert (record["world_size"], record["device"]) == (1, "cpu")
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "fsdp_qlora", "transformers", "bitsandbytes"} <= record["versions"].keys()
    assert record["commit"] is None or len(record["commit"]) == 40


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(lora_rank=8, lr=3e-05, packing=False, overwrite=True),
        TrainConfig(dataset="my rows; $(touch x).jsonl", output_dir='runs/it\'s "here"', run_name="a b"),
    ],
)
def test_the_recorded_command_repeats_the_run(ranks: Ranks, config: TrainConfig) -> None:
    start, script, *arguments = shlex.split(command(config, ranks))
    assert (start, script) == ("python", "train.py")
    flags, problems = read_flags(COMMANDS[0], arguments)
    assert problems == []
    overrides = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    assert config_module.parse(overrides) == config


def test_the_recorded_command_has_the_ranks(ranks: Ranks) -> None:
    found = command(TrainConfig(seed=1), replace(ranks, world_size=2))
    assert found == "torchrun --nproc_per_node 2 train.py --seed 1"


def test_the_recorded_command_has_the_nodes(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    found = command(TrainConfig(), replace(ranks, world_size=32))
    assert found == "torchrun --nnodes 4 --nproc_per_node 8 train.py"


def test_no_secret_of_the_environment_is_recorded(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secrets = {name: f"secret-{name}-value" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MINE")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    write_record(tmp_path, describe(TrainConfig(), ranks))
    text = (tmp_path / "run.json").read_text()
    assert json.loads(text)["config"]["seed"] == 42
    assert "secret-" not in text


def test_a_record_is_replaced_whole_and_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_record(tmp_path, {"a": 1})
        write_record(tmp_path, {"a": 2})
    finally:
        os.umask(before)
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o640

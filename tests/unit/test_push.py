"""`push` sends what it says, with a card of the run and nothing private, to a stand-in hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from fsdp_qlora.commands.push import collect
from fsdp_qlora.errors import CheckpointError
from fsdp_qlora.export.model_card import without_folders
from fsdp_qlora.output_files import CONFIG_FILE, STATE_FILE, WEIGHTS_FILE
from tests.unit.push_server import Hub, serve

ROOT = Path(__file__).resolve().parents[2]
REPO = "someone/my-adapter"
TOKEN = "hf_plantedTokenThatMustNotShow0123456789"

RECORD: dict[str, Any] = {
    "command": "torchrun --nproc_per_node 2 train.py --dataset '/home/jane/secret project/chats.jsonl' --output_dir=/data/x",
    "config": {
        "model": "qwen3-8b",
        "dataset": "/home/jane/secret project/chats.jsonl",
        "context_length": 512,
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "lr": 0.0002,
        "output_dir": "/data/x",
    },
    "world_size": 2,
    "device": "cuda",
    "versions": {"fsdp_qlora": "0.1.0", "torch": "2.13.0"},
    "base": {"folder": "abc", "fingerprint": "63d6a0d9bf481e58", "quant_type": "nf4", "double_quant": True},
    "result": {
        "steps": 1200,
        "tokens": 3072,
        "train_loss": 2.6259,
        "eval_loss_before": 3.7236,
        "eval_loss_after": 2.3436,
    },
}


def save_run(folder: Path, base: str = "Qwen/Qwen3-8B") -> Path:
    """Save the outputs of a training run."""
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 3)}, adapter / WEIGHTS_FILE)
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 16, "lora_alpha": 32}
    (adapter / CONFIG_FILE).write_text(json.dumps(config))
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "/home/jane/models/qwen"}))
    (adapter / "notes.txt").write_text("not for others")
    (folder / "run.json").write_text(json.dumps(RECORD))
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def save_merged(folder: Path) -> Path:
    """Save the outputs of a merge in two files."""
    folder.mkdir()
    for number in (1, 2):
        save_file({f"x{number}": torch.ones(4)}, folder / f"model-0000{number}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "_name_or_path": "/home/jane/base"}))
    errors = {"dequantized (written)": {"mean": 0.00123, "largest": 1.0, "divergence": 2e-6, "agreement": 0.995}}
    merge = {"base": "Qwen/Qwen3-8B", "merge_base": "dequantized", "output": "bf16", "quant_type": "nf4"}
    merge_record = {**merge, "double_quant": True, "logit_errors": errors}
    (folder / "run.json").write_text(json.dumps({**RECORD, "merge": merge_record}))
    return folder


def card_of(files: dict[str, Any]) -> tuple[dict[str, Any], str]:
    _, header, text = files["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(header), text


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub(TOKEN, (REPO, "someone/merged"))) as hub:
        yield hub


def push(folder: Path, hub: Hub, *flags: str, token: str | None = TOKEN, **variables: str) -> tuple[int, str]:
    """Run the command in a process of its own, because huggingface_hub reads its settings when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / ".home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"NO_PROXY": "127.0.0.1", **({"HF_TOKEN": token} if token else {}), **variables}
    command = [sys.executable, "-c", "from fsdp_qlora.cli import main; main()", "push", "--folder", str(folder), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment)
    return result.returncode, result.stdout + result.stderr


def test_adapter_arrives_with_its_card(tmp_path: Path, hub: Hub) -> None:
    folder = save_run(tmp_path / "run")
    code, output = push(folder, hub, "--repo", REPO)
    assert code == 0, output
    assert f"{hub.url}/{REPO}" in output
    assert not hub.private[REPO]
    files = hub.repos[REPO]
    assert set(files) == {"README.md", CONFIG_FILE, WEIGHTS_FILE, "tokenizer.json", "tokenizer_config.json"}
    assert files[WEIGHTS_FILE] == (folder / "adapter" / WEIGHTS_FILE).read_bytes()
    assert json.loads(files[CONFIG_FILE])["base_model_name_or_path"] == "Qwen/Qwen3-8B"
    data, text = card_of(files)
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen3-8B", "adapter")
    assert data["library_name"] == "peft"
    assert "datasets" not in data
    for expected in (
        "| optimizer steps | 1,200 |",
        "| evaluation loss before | 3.7236 (perplexity 41.41) |",
        "| evaluation loss after | 2.3436 (perplexity 10.42) |",
        "| lora_rank | `16` |",
        "| dataset | `chats.jsonl` |",
        "| ranks | 2 x cuda |",
        "63d6a0d9bf481e58",
        "torchrun --nproc_per_node 2 train.py --dataset chats.jsonl --output_dir=x",
        f'PeftModel.from_pretrained(base, "{REPO}")',
        'bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True',
        "| torch | 2.13.0 |",
    ):
        assert expected in text
    everything = b"".join([*hub.sent, *files.values(), *hub.large.values(), output.encode()])
    assert TOKEN.encode() not in everything
    assert b"/home/jane" not in everything
    assert b"secret project" not in everything


def test_merged_model_arrives_in_a_private_repository(tmp_path: Path, hub: Hub) -> None:
    folder = save_merged(tmp_path / "merged")
    code, output = push(folder, hub, "--repo", "someone/merged", "--private")
    assert code == 0, output
    assert hub.private["someone/merged"]
    files = hub.repos["someone/merged"]
    assert set(files) == {"README.md", "config.json"} | {
        path.name for path in folder.iterdir() if "safetensors" in path.name
    }
    data, text = card_of(files)
    assert (data["base_model_relation"], data["library_name"]) == ("finetune", "transformers")
    assert 'model = AutoModelForCausalLM.from_pretrained("someone/merged")' in text
    assert "| dequantized (written) | 1.23e-03 | 2.00e-06 | 99.5% |" in text
    assert b"/home/jane" not in b"".join(files.values())
    # again: what is there is replaced; but a public repository is not taken for a private one
    code, output = push(folder, hub, "--repo", "someone/merged")
    assert code == 0, output
    hub.private["someone/merged"] = False
    code, output = push(folder, hub, "--repo", "someone/merged", "--private")
    assert (code, output.count("\n")) == (1, 1)
    assert "error: --private: someone/merged exists and is public" in output


FAILURES: dict[str, tuple[dict[str, Any], dict[str, Any], int, str]] = {
    "no token": ({"token": None}, {}, 2, "HF_TOKEN is not set"),
    "wrong token": ({"token": "hf_other"}, {}, 1, "the hub does not accept HF_TOKEN (401)"),
    "foreign name": ({}, {"writable": ()}, 1, "HF_TOKEN may not write there (403)"),
    "broken hub": ({}, {"status": 500}, 1, "could not be pushed to http://127.0.0.1"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, {}, 1, "HF_HUB_OFFLINE is set"),
    "no network": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {}, 1, "check the network, proxy and HF_ENDPOINT"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_are_one_line(tmp_path: Path, hub: Hub, case: str) -> None:
    arguments, changes, code, message = FAILURES[case]
    for name, value in changes.items():
        setattr(hub, name, value)
    found, output = push(save_run(tmp_path / "run"), hub, "--repo", REPO, **arguments)
    lines = output.strip().splitlines()
    assert (found, len(lines)) == (code, 1), output
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert TOKEN not in output
    assert not hub.repos.get(REPO)


def test_dry_run_sends_nothing(tmp_path: Path, hub: Hub) -> None:
    code, output = push(save_run(tmp_path / "run"), hub, "--repo", REPO, "--dry_run", token=None)
    assert code == 0
    assert "base_model: Qwen/Qwen3-8B" in output
    assert f"  {WEIGHTS_FILE}" in output
    assert not hub.sent


def test_local_base_is_named_without_its_folder(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run", base="/home/jane/models/my-base")
    files = collect(folder, REPO).files
    data, text = card_of(files)
    assert "base_model" not in data
    assert "A LoRA adapter for `my-base`" in text
    config = files[CONFIG_FILE]
    assert isinstance(config, bytes)
    assert json.loads(config)["base_model_name_or_path"] == "my-base"
    files = collect(folder, REPO, base_model="Qwen/Qwen3-8B").files
    assert card_of(files)[0]["base_model"] == "Qwen/Qwen3-8B"
    config = files[CONFIG_FILE]
    assert isinstance(config, bytes)
    assert json.loads(config)["base_model_name_or_path"] == "Qwen/Qwen3-8B"


def test_an_alias_is_published_as_the_hub_s_model(tmp_path: Path) -> None:
    files = collect(save_run(tmp_path / "run", base="smollm2-135m"), REPO).files
    data, text = card_of(files)
    config = files[CONFIG_FILE]
    assert isinstance(config, bytes)
    hub_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert json.loads(config)["base_model_name_or_path"] == data["base_model"] == hub_id
    assert f"A LoRA adapter for `{hub_id}`" in text
    assert f'base = AutoModelForCausalLM.from_pretrained("{hub_id}"' in text
    assert "a copy of it that was made from 4-bit" in text


def test_adapter_without_a_record(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run")
    (folder / "run.json").unlink()
    data, text = card_of(collect(folder / "adapter", REPO).files)
    assert data["base_model"] == "Qwen/Qwen3-8B"
    assert "## Training" not in text
    assert 'base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-8B")' in text


def test_hub_datasets_are_named(tmp_path: Path) -> None:
    folder = save_run(tmp_path / "run")
    record = {**RECORD, "config": {**RECORD["config"], "dataset": "owner/chats@v1:main,own.jsonl, owner/sums::test"}}
    (folder / "run.json").write_text(json.dumps(record))
    assert card_of(collect(folder, REPO).files)[0]["datasets"] == ["owner/chats", "owner/sums"]


def test_secrets_do_not_enter_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_run(tmp_path / "run")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    record = {**RECORD, "command": f"python train.py --run_name 0123456789abcdef{TOKEN}"}
    (folder / "run.json").write_text(json.dumps(record))
    _, text = card_of(collect(folder, REPO).files)
    assert "0123456789abcdef" not in text
    assert "hf_planted" not in text


def test_folders_that_hold_nothing_to_push(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        with pytest.raises(CheckpointError, match="holds neither an adapter"):
            collect(tmp_path / folder, REPO)
    unfinished = save_merged(tmp_path / "merged")
    (unfinished / STATE_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="is unfinished"):
        collect(unfinished, REPO)
    damaged = save_run(tmp_path / "run")
    (damaged / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json: is unreadable"):
        collect(damaged, REPO)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/jane/x.jsonl", "x.jsonl"),
        ("~/models/base/", "base"),
        ("C:\\data\\x.csv", "x.csv"),
        ("owner/name", "owner/name"),
        ("data/x.jsonl", "data/x.jsonl"),
        (3, 3),
    ],
)
def test_folders_are_left_out_of_absolute_paths(value: object, expected: object) -> None:
    assert without_folders(value) == expected

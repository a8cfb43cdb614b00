"""Wrong inputs through the real command line: one line that says what is wrong, an exit code, no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsdp_qlora import cli

ROOT = Path(__file__).resolve().parents[2]
UP = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True)
class Case:
    """What is done to copies of the model folder and the dataset, and what is said of it."""

    message: str
    code: int = 1
    settings: dict[str, str] = field(default_factory=dict)
    damage: Callable[[Path, Path], object] = lambda model, dataset: None


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def only_pickled_weights(model: Path, dataset: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def index_that_leads_out(model: Path, dataset: Path) -> None:
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model.parent / "x.safetensors")
    (model / "other.safetensors").write_bytes((model.parent / "x.safetensors").read_bytes())
    index = {"weight_map": dict.fromkeys(names, "../x.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def insert_row(line: str) -> Callable[[Path, Path], object]:
    def damage(model: Path, dataset: Path) -> None:
        lines = dataset.read_text().splitlines()
        dataset.write_text("\n".join([*lines[:6], line, *lines[6:]]))

    return damage


def change_config(**changes: object) -> Callable[[Path, Path], object]:
    def damage(model: Path, dataset: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def remove_template(model: Path, dataset: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))


CASES: dict[str, Case] = {
    # the model
    "missing folder": Case("nowhere", settings={"model": "/nowhere/at/all"}),
    "a file for a folder": Case("is a file", settings={"model": "DATASET"}),
    "empty folder": Case("no config.json", damage=lambda m, d: [path.unlink() for path in m.iterdir()]),
    "unknown alias": Case("smollm2-135m", settings={"model": "smollm3-135m"}),
    "pickled weights only": Case("pytorch_model.bin", damage=only_pickled_weights),
    "index leads out": Case("'../x.safetensors'", damage=index_that_leads_out),
    "missing tensor": Case(f"'{UP}' is missing", damage=lambda m, d: rewrite(m, lambda t: t.pop(UP))),
    "wrong shape": Case(
        f"'{UP}' has shape [52, 64]", damage=lambda m, d: rewrite(m, lambda t: t.update({UP: t[UP][:52].clone()}))
    ),
    "NaN": Case(
        f"'{UP}' holds NaN or infinite values",
        damage=lambda m, d: rewrite(m, lambda t: t.update({UP: t[UP].clone().fill_(float("nan"))})),
    ),
    "weights cut short": Case(
        "cut short",
        damage=lambda m, d: (m / "model.safetensors").write_bytes((m / "model.safetensors").read_bytes()[:-9]),
    ),
    "weights empty": Case("model.safetensors", damage=lambda m, d: (m / "model.safetensors").write_bytes(b"")),
    "config no JSON": Case("config.json", damage=lambda m, d: (m / "config.json").write_text("{")),
    "unsupported family": Case("model_type 'bert'", damage=change_config(model_type="bert")),
    "code of the model's own": Case("auto_map", damage=change_config(auto_map={"AutoModelForCausalLM": "x.Y"})),
    "no tokenizer": Case("its tokenizer cannot be loaded", damage=lambda m, d: (m / "tokenizer.json").unlink()),
    "tokenizer no JSON": Case(
        "its tokenizer cannot be loaded (JSONDecodeError", damage=lambda m, d: (m / "tokenizer.json").write_text("{")
    ),
    "tokenizer of another form": Case(
        "its tokenizer cannot be loaded (KeyError", damage=lambda m, d: (m / "tokenizer.json").write_text("{}")
    ),
    "tokenizer of another model": Case("and the model has 200 tokens", damage=change_config(vocab_size=200)),
    "no chat template": Case("no chat template", damage=remove_template),
    # the data
    "missing dataset": Case("no such file", settings={"dataset": "/nowhere/rows.jsonl"}),
    "empty dataset": Case("is empty", damage=lambda m, d: d.write_text("")),
    "blank dataset": Case("is empty", damage=lambda m, d: d.write_text("\n \n\n")),
    "malformed JSON": Case("rows.jsonl:7: invalid JSON", damage=insert_row('{"messages": [')),
    "no messages": Case("rows.jsonl:7: ", damage=insert_row('{"text": "hello"}')),
    "unknown role": Case("rows.jsonl:7: ", damage=insert_row('{"messages": [{"role": "sysadmin", "content": "x"}]}')),
    "a number for a text": Case("rows.jsonl:7: ", damage=insert_row('{"messages": [{"role": "user", "content": 5}]}')),
    "unknown file type": Case("rows.xml", settings={"dataset": "/nowhere/rows.xml"}),
    "form that does not fit": Case("rows.jsonl:1: ", settings={"dataset_format": "alpaca"}),
    "unknown form": Case("--dataset_format='chatml'", code=2, settings={"dataset_format": "chatml"}),
    "no answer fits": Case("context_length 8", settings={"context_length": "8"}),
    "missing eval dataset": Case("no such file", settings={"eval_dataset": "/nowhere/rows.jsonl"}),
    # the settings
    "context longer than the model's": Case(
        "context_length 1024 is longer than the model's 512 positions", code=2, settings={"context_length": "1024"}
    ),
    "target that matches nothing": Case("query_proj", settings={"lora_target_modules": "query_proj"}),
    "rank 0": Case("--lora_rank='0': must be at least 1", code=2, settings={"lora_rank": "0"}),
    "unknown setting": Case("did you mean --lora_rank?", code=2, settings={"lora_rnak": "8"}),
    "offload without shards": Case("--cpu_offload=all", code=2, settings={"sharding": "none", "cpu_offload": "all"}),
    "fp8 on a CPU": Case("--compute_dtype=fp8 on a CPU", code=2, settings={"compute_dtype": "fp8"}),
    "output folder in use": Case("is not empty", code=2, settings={"output_dir": "MODEL"}),
    "output folder is a file": Case("cannot be used", code=2, settings={"output_dir": "DATASET"}),
}


def prepare(case: Case, base: Path, dataset: Path, folder: Path) -> list[str]:
    """Copy model and dataset, damage them, and return the command line."""
    model, rows = folder / "model", folder / "rows.jsonl"
    shutil.copytree(base, model)
    shutil.copy(dataset, rows)
    case.damage(model, rows)
    settings = {"model": "MODEL", "dataset": "DATASET", "output_dir": str(folder / "run"), "context_length": "64"}
    settings |= {"max_steps": "1", **case.settings}
    places = {"MODEL": str(model), "DATASET": str(rows)}
    return ["train", *(f"--{name}={places.get(value, value)}" for name, value in settings.items())]


@pytest.fixture(autouse=True)
def _cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_is_wrong(
    base: Path, dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    case = CASES[name]
    arguments = prepare(case, base, dataset, tmp_path)
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    err = capfd.readouterr().err
    assert caught.value.code == case.code, err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert case.message in errors[0]
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "adapter").exists()
    assert not torch.distributed.is_initialized()


def test_debug_shows_the_traceback(
    base: Path, dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = prepare(CASES["missing tensor"], base, dataset, tmp_path)
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--debug"])
    err = capfd.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_the_undamaged_inputs_are_accepted(base: Path, dataset: Path, tmp_path: Path) -> None:
    cli.main(prepare(Case(""), base, dataset, tmp_path))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["wrong shape", "rank 0"])
def test_the_same_from_a_process_of_its_own(
    base: Path, dataset: Path, environment: dict[str, str], tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    _, *arguments = prepare(case, base, dataset, tmp_path)
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path)
    assert result.returncode == case.code
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert case.message in errors[0]
    assert "Traceback" not in result.stderr

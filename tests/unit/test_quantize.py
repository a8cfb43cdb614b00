"""`quantize` writes what bitsandbytes and transformers write, in little memory, and goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fsdp_qlora.build import build_model
from fsdp_qlora.commands import quantize as command
from fsdp_qlora.commands.quantize import quantize
from fsdp_qlora.config import QuantizeConfig
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.errors import CheckpointError, ConfigError, FsdpQloraError, WeightsError
from fsdp_qlora.output_files import STATE_FILE
from fsdp_qlora.quant.adapt import QuantSettings
from tests.limited import run_limited, weights_bytes
from tests.tiny import save_tiny


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def config_for(base: Path, output: Path, **changes: Any) -> QuantizeConfig:
    return QuantizeConfig(**{"model": str(base), "output_dir": str(output), "device": "cpu", **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny("llama", tmp_path_factory.mktemp("quantize") / "llama", torch.bfloat16, num_hidden_layers=2)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "LICENSE.txt").write_text("free")
    (folder / "notes.txt").write_text("private")
    return folder


@pytest.mark.parametrize(
    ("family", "dtype", "quant_type", "double_quant"),
    [
        ("llama3", torch.bfloat16, "nf4", True),
        ("qwen2", torch.float32, "fp4", False),
        ("gemma3_text", torch.bfloat16, "nf4", False),
        ("phi3", torch.float16, "fp4", True),
    ],
)
def test_output_is_what_transformers_saves(
    tmp_path: Path, family: str, dtype: torch.dtype, quant_type: str, double_quant: bool
) -> None:
    base = save_tiny(family, tmp_path / "base", dtype, num_hidden_layers=2)
    quantize(config_for(base, tmp_path / "ours", quant_type=quant_type, double_quant=double_quant))
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype
        assert ours[name].equal(value), name
    assert json.loads((tmp_path / "ours/config.json").read_text()) == json.loads(
        (tmp_path / "theirs/config.json").read_text()
    )
    ids = torch.arange(3, 60)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert loaded(ids).logits.equal(theirs(ids).logits)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_our_loader_gives_the_same_base(ranks: Ranks, tmp_path: Path, family: str) -> None:
    base = save_tiny(family, tmp_path / "base", torch.bfloat16, num_hidden_layers=2)
    quantize(config_for(base, tmp_path / "out", max_shard_size="40KB"))
    found = [
        build_model(folder, ranks, QuantSettings(), None, torch.float32).fingerprint
        for folder in (base, tmp_path / "out")
    ]
    assert found[0] == found[1]


def save_gemma3(folder: Path) -> Path:
    """Save a tiny Gemma 3 with its image part."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = Gemma3TextConfig(**small, num_key_value_heads=1, head_dim=16, vocab_size=300)
    vision = SiglipVisionConfig(**small, image_size=28, patch_size=14)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_image_part_stays_as_it_is(ranks: Ranks, tmp_path: Path) -> None:
    base = save_gemma3(tmp_path / "base")
    quantize(config_for(base, tmp_path / "out"))
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert any("vision_tower" in name for name in before)
    for name, value in before.items():
        quantised = "language_model" in name and "_proj" in name
        assert after[name].equal(value) != quantised
        assert (name + ".absmax" in after) == quantised
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    kinds = {name: type(module).__name__ for name, module in loaded.named_modules() if name.endswith("q_proj")}
    assert {name: kind == "Linear4bit" for name, kind in kinds.items()} == {
        name: "vision" not in name for name in kinds
    }
    assert (
        build_model(base, ranks, QuantSettings(), None, torch.float32).fingerprint
        == build_model(tmp_path / "out", ranks, QuantSettings(), None, torch.float32).fingerprint
    )


def test_side_files_come_along(base: Path, tmp_path: Path) -> None:
    quantize(config_for(base, tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "LICENSE.txt",
    }


class Stopped(Exception):
    """Stands for whatever ends a process."""


def interrupted(base: Path, output: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Run until so many files are written."""
    count = 0

    def sink(text: str, flush: bool = False) -> None:
        nonlocal count
        count += "written" in text
        if count == after:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(command, "print", sink, raising=False)
        with pytest.raises(Stopped):
            quantize(config_for(base, output, max_shard_size="40KB"))


def test_a_stopped_run_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    quantize(config_for(base, whole, max_shard_size="40KB"))
    interrupted(base, output, monkeypatch, after=2)
    assert not (output / "config.json").exists(), "what is unfinished must not load"
    first, second, third = sorted(path.name for path in whole.glob("*.safetensors"))[:3]
    kept = (output / first).stat().st_mtime_ns
    damaged = bytearray((output / second).read_bytes())
    damaged[-1] ^= 1
    (output / second).write_bytes(damaged)
    (output / f"{third}.partial").write_bytes(b"half a file")
    capsys.readouterr()
    written = quantize(config_for(base, output, max_shard_size="40KB"))
    assert written.kept == 1
    assert f"{first}: complete and verified, kept" in capsys.readouterr().out
    assert (output / first).stat().st_mtime_ns == kept
    assert {p.name: p.read_bytes() for p in output.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


@pytest.mark.parametrize("change", ["setting", "weights"])
def test_files_of_other_inputs_are_not_mixed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    copied, output = tmp_path / "base", tmp_path / "out"
    save_tiny("llama", copied, torch.bfloat16, num_hidden_layers=2)
    interrupted(copied, output, monkeypatch, after=1)
    settings: dict[str, Any] = {"max_shard_size": "40KB"}
    if change == "setting":
        settings["quant_type"] = "fp4"
    else:
        save_tiny("llama", copied, torch.bfloat16, seed=1, num_hidden_layers=2)
    with pytest.raises(ConfigError, match="unfinished checkpoint of other inputs or settings"):
        quantize(config_for(copied, output, **settings))
    assert quantize(config_for(copied, output, **settings, overwrite=True)).kept == 0
    quantize(config_for(copied, tmp_path / "fresh", **settings))
    assert all(value.equal(tensors_of(tmp_path / "fresh")[name]) for name, value in tensors_of(output).items())


def test_refusals(base: Path, tmp_path: Path) -> None:
    quantize(config_for(base, tmp_path / "out"))
    damaged = save_tiny("llama", tmp_path / "damaged", num_hidden_layers=1)
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    unreachable = "someone/never-asked-for"  # neither is it fetched for a folder that is in use
    cases: list[tuple[QuantizeConfig, type[FsdpQloraError], str]] = [
        (config_for(base, tmp_path / "out"), ConfigError, "is not empty"),
        (config_for(Path(unreachable), tmp_path / "out"), ConfigError, "is not empty"),
        (config_for(base, base), ConfigError, "is the folder that is read"),
        (config_for(tmp_path / "out", tmp_path / "again"), WeightsError, "is quantised already"),
        (config_for(damaged, tmp_path / "nan"), WeightsError, "up_proj.weight' holds NaN"),
    ]
    for config, kind, message in cases:
        with pytest.raises(kind, match=message):
            quantize(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        quantize(config_for(base, tmp_path / "file" / "below"))
    assert not (tmp_path / "out" / STATE_FILE).exists()


def test_a_full_disk_is_seen_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsdp_qlora.export.standalone.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"0\.0 GB are free"):
        quantize(config_for(base, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_memory_does_not_grow_with_the_model(base: Path, tmp_path: Path) -> None:
    large = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    model = save_tiny("llama", tmp_path / "large", torch.bfloat16, **large)
    extra = 40 << 20
    assert weights_bytes(model) > 3 * extra
    result = run_limited(
        ["quantize", "--model", str(base), "--output_dir", str(tmp_path / "warm")],
        ["quantize", "--model", str(model), "--output_dir", str(tmp_path / "out")],
        extra,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert weights_bytes(tmp_path / "out") > 0.25 * weights_bytes(model)

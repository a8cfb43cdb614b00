"""Adapters in PEFT's format: gathered whole, written, read again, and refused where they do not fit."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fsdp_qlora import adapters
from fsdp_qlora.adapters import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    gather_adapter,
    read_adapter,
    save_adapter,
)
from fsdp_qlora.build import BuiltModel, build_model
from fsdp_qlora.distributed import Ranks, process_group
from fsdp_qlora.errors import CheckpointError, FsdpQloraError
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from tests.ranks import run_ranks
from tests.tiny import save_tiny

LORA = LoraSettings(rank=5, alpha=10, target_modules="q_proj,down_proj")
SHAPES = {
    "self_attn.q_proj.lora_A": (5, 64),
    "self_attn.q_proj.lora_B": (64, 5),
    "mlp.down_proj.lora_A": (5, 104),
    "mlp.down_proj.lora_B": (64, 5),
}
EXPECTED = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in SHAPES.items()}


def build(
    folder: Path, ranks: Ranks, lora: LoraSettings = LORA, adapter: dict[str, Tensor] | None = None, seed: int = 7
) -> BuiltModel:
    quant = QuantSettings(num_shards=ranks.num_shards)
    return build_model(folder, ranks, quant, lora, torch.float32, adapter=adapter, seed=seed)


def random_adapter() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in EXPECTED.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("adapters") / "llama", num_hidden_layers=2)


@pytest.fixture
def saved(base: Path, ranks: Ranks, tmp_path: Path) -> Path:
    built = build(base, ranks, adapter=random_adapter())
    save_adapter(built.root, LORA, "owner/base", tmp_path / "adapter", ranks)
    return tmp_path / "adapter"


def round_trip_on_rank(base: Path, folder: Path) -> dict[str, np.ndarray]:
    """Build with an adapter, save it, read it, build again; return what the second model holds."""
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        built = build(base, ranks, adapter=random_adapter())
        save_adapter(built.root, LORA, "owner/base", folder, ranks)
        _, matrices = read_adapter(folder)
        again = gather_adapter(build(base, ranks, adapter=matrices).root, ranks)
        return {name: value.numpy() for name, value in again.items()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_round_trip_over_any_number_of_ranks(base: Path, tmp_path: Path, world_size: int) -> None:
    # rank 5 and 64 rows divide by neither 2 nor 3 ranks
    for found in run_ranks(round_trip_on_rank, world_size, base, tmp_path / "adapter"):
        expected = {f"{PREFIX}{name}.weight": value.numpy() for name, value in random_adapter().items()}
        assert found.keys() == expected.keys()
        assert all((found[name] == value).all() for name, value in expected.items())
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        f"{PREFIX}{name}.weight": shape for name, shape in EXPECTED.items()
    }
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def initial_on_rank(base: Path) -> dict[str, np.ndarray]:
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        return {name: value.numpy() for name, value in gather_adapter(build(base, ranks).root, ranks).items()}


def test_initial_values_do_not_depend_on_the_ranks(base: Path) -> None:
    found = [run_ranks(initial_on_rank, world_size, base)[0] for world_size in (1, 3)]
    for name, value in found[0].items():
        assert (found[1][name] == value).all()
        if "lora_B" in name:
            assert not value.any()
        else:  # PEFT's: uniform within 1 / sqrt(in)
            limit = 1 / np.sqrt(value.shape[1])
            assert np.abs(value).max() <= limit
            assert value.std() == pytest.approx(limit / np.sqrt(3), rel=0.15)
    matrices = [value.tobytes() for name, value in found[0].items() if "lora_A" in name]
    assert len(set(matrices)) == len(matrices), "every layer has values of its own"


def initial_dora_on_rank(base: Path) -> dict[str, np.ndarray]:
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        root = build(base, ranks, dataclasses.replace(LORA, use_dora=True)).root
        return {name: value.numpy() for name, value in gather_adapter(root, ranks).items()}


def test_the_seed_decides_the_initial_values(base: Path, ranks: Ranks) -> None:
    def values(seed: int) -> list[Tensor]:
        found = gather_adapter(build(base, ranks, seed=seed).root, ranks)
        return [value for name, value in found.items() if "lora_A" in name]

    assert all(a.equal(b) for a, b in zip(values(7), values(7), strict=True))
    assert not any(a.equal(b) for a, b in zip(values(7), values(8), strict=True))


def test_initial_magnitudes_are_row_lengths_whatever_the_ranks(base: Path) -> None:
    one, three = (run_ranks(initial_dora_on_rank, world_size, base)[0] for world_size in (1, 3))
    assert all((three[name] == value).all() for name, value in one.items())
    name = "model.layers.1.mlp.down_proj"
    weight = load_file(base / "model.safetensors")[f"{name}.weight"]
    dequantised = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    found = torch.from_numpy(one[f"{PREFIX}{name}.lora_magnitude_vector"])
    torch.testing.assert_close(found, dequantised.norm(dim=1))


def test_config_is_pefts(saved: Path) -> None:
    config = json.loads((saved / CONFIG_FILE).read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"]) == (5, 10)
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert config["base_model_name_or_path"] == "owner/base"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_modes_follow_the_umask(base: Path, ranks: Ranks, tmp_path: Path, umask: int, mode: int) -> None:
    built = build(base, ranks)
    before = os.umask(umask)
    try:
        save_adapter(built.root, LORA, "owner/base", tmp_path / "adapter", ranks)
    finally:
        os.umask(before)
    files = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()}
    assert files == {WEIGHTS_FILE: mode, CONFIG_FILE: mode}


@pytest.mark.parametrize("damage", [lambda value: value[: len(value) // 2], lambda value: value * float("nan")])
def test_incomplete_matrices_are_not_saved(
    base: Path, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Tensor], Tensor]
) -> None:
    whole = adapters.full_tensor
    monkeypatch.setattr(adapters, "full_tensor", lambda parameter, device: damage(whole(parameter, device)))
    built = build(base, ranks, adapter=random_adapter())
    with pytest.raises(CheckpointError, match=r"q_proj.lora_A.weight' has shape .* or is not finite"):
        save_adapter(built.root, LORA, "owner/base", tmp_path / "adapter", ranks)
    assert not (tmp_path / "adapter").exists()


def save_into_file_on_rank(base: Path, folder: Path) -> tuple[str, str]:
    with process_group("full", timeout_s=60, device="cpu") as ranks:
        built = build(base, ranks)
        try:
            save_adapter(built.root, LORA, "owner/base", folder, ranks)
        except FsdpQloraError as error:
            return type(error).__name__, str(error)
        return "", ""


def test_a_folder_that_cannot_be_written_is_an_error_on_every_rank(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (first, message), (second, told) = run_ranks(save_into_file_on_rank, 2, base, tmp_path / "file" / "adapter")
    assert (first, second) == ("CheckpointError", "TrainingError")
    assert "the adapter cannot be written (Not a directory)" in message
    assert told == f"rank 0 failed while saving the adapter: {message}"


def change_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps({**config, **changes}))

    return damage


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


UNREADABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), f"no {CONFIG_FILE}; give the --output_dir of a training run"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), f"no {WEIGHTS_FILE}"),
    "config cut short": (cut(CONFIG_FILE, 20), "is unreadable"),
    "config is a list": (lambda f: (f / CONFIG_FILE).write_text("[]"), "is unreadable"),
    "config is no text": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe"), "is unreadable"),
    "weights cut short": (cut(WEIGHTS_FILE, 1000), "is unreadable"),
    "weights empty": (cut(WEIGHTS_FILE, 0), "is unreadable"),
    "weights without the last byte": (
        lambda f: os.truncate(f / WEIGHTS_FILE, (f / WEIGHTS_FILE).stat().st_size - 1),
        "is unreadable",
    ),
    "rank is a word": (change_config(r="many"), "is unreadable"),
    "another kind": (change_config(peft_type="IA3"), "only LoRA adapters .* are read; this one uses IA3"),
    "biases": (change_config(lora_bias=True), r"uses \['lora_bias'\]"),
    "whole layers": (change_config(modules_to_save=["score"]), r"uses \['modules_to_save score'\]"),
    "rank 0": (change_config(r=0), "only LoRA adapters"),
    "alpha 0": (change_config(lora_alpha=0), "only LoRA adapters"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_and_foreign_adapters_are_refused(saved: Path, case: str) -> None:
    damage, message = UNREADABLE[case]
    damage(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(saved)
    assert str(saved) in str(caught.value)


def test_what_to_use_of_an_unfinished_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone: no such folder; .* or a PEFT adapter's$"):
        read_adapter(tmp_path / "gone")
    for step in (90, 100):
        (tmp_path / "checkpoints" / f"step-{step:06}" / "adapter").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r", or .*step-000100/adapter, the newest one of this unfinished run$"):
        read_adapter(tmp_path)


def test_values_are_float32_whatever_was_saved(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS_FILE)
    save_file({name: value.bfloat16() for name, value in tensors.items()}, saved / WEIGHTS_FILE)
    config, matrices = read_adapter(saved)
    assert config["r"] == 5
    assert {name: tuple(value.shape) for name, value in matrices.items()} == EXPECTED
    assert {value.dtype for value in matrices.values()} == {torch.float32}


def one_less(matrices: dict[str, Tensor]) -> None:
    matrices.pop("model.layers.1.mlp.down_proj.lora_A")


def one_more(matrices: dict[str, Tensor]) -> None:
    matrices["model.layers.2.mlp.down_proj.lora_A"] = torch.zeros(5, 104)


def other_shape(matrices: dict[str, Tensor]) -> None:
    matrices["model.layers.0.self_attn.q_proj.lora_B"] = torch.zeros(96, 5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (one_less, r"'model.layers.1.mlp.down_proj.lora_A' has shape none; this base expects \(5, 104\)"),
        (one_more, r"'model.layers.2.mlp.down_proj.lora_A' has shape \(5, 104\); this base expects none"),
        (other_shape, r"'model.layers.0.self_attn.q_proj.lora_B' has shape \(96, 5\); this base expects \(64, 5\)"),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    base: Path, ranks: Ranks, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    matrices = random_adapter()
    damage(matrices)
    with pytest.raises(CheckpointError, match=message):
        build(base, ranks, adapter=matrices)

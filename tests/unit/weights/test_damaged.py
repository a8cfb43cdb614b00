"""Damaged checkpoint folders: a WeightsError that names file and tensor, before memory is taken for the model."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fsdp_qlora.build
from fsdp_qlora.build import build_model
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.errors import ModelError, WeightsError
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from tests.distributed.checkpoints import save_quantized
from tests.tiny import save_tiny

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("damaged") / "llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    return save_quantized(source, source.parent / "nf4")


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it an error to begin loading."""

    def load(*_: Any) -> None:
        raise AssertionError("memory would have been taken for the model")

    monkeypatch.setattr(fsdp_qlora.build.Loader, "load", load)


def build(folder: Path, ranks: Ranks) -> None:
    build_model(folder, ranks, QuantSettings(), LoraSettings(2, 4), torch.float32)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def split(folder: Path) -> None:
    """Turn a checkpoint of one file into one of two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in (0, 1):
        part = dict(sorted(tensors.items())[number::2])
        save_file(part, folder / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def remove_shard(folder: Path) -> None:
    split(folder)
    (folder / "model-1.safetensors").unlink()


def redirect(name: str) -> Callable[[Path], None]:
    """Return a damage: the index leads to another place, where a good file is."""

    def damage(folder: Path) -> None:
        split(folder)
        shutil.copy(folder / "model-1.safetensors", folder.parent / "x.safetensors")
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        target = name.replace("PARENT", str(folder.parent))
        weight_map = index["weight_map"]
        index["weight_map"] = {
            key: target if file == "model-1.safetensors" else file for key, file in weight_map.items()
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def config_of_more_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Return a damage: one tensor replaced."""
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing shard": (remove_shard, ("model-1.safetensors named by the index is missing",)),
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(UP)), (f"tensor '{UP}' is missing (1 in all)",)),
    "extra tensor": (
        lambda f: rewrite(f, lambda t: t.update({"model.extra": torch.zeros(2)})),
        ("model.safetensors", "tensor 'model.extra' is not part of this model"),
    ),
    "fewer layers than the config says": (config_of_more_layers, ("model.layers.2.input_layernorm.weight",)),
    "matrix of another shape": (changed(UP, lambda w: w[:-1]), ("model.safetensors", f"'{UP}' has shape [103, 64]")),
    "transposed matrix": (changed(UP, lambda w: w.t()), (f"'{UP}' has shape [64, 104]; the model expects [104, 64]",)),
    "embedding of another shape": (changed(EMBEDDING, lambda w: w[:-3]), (f"'{EMBEDDING}' has shape [317, 64]",)),
    "norm of another shape": (changed(NORM, lambda w: w[:-1]), (f"'{NORM}' has shape [63]",)),
    "matrix of integers": (changed(UP, lambda w: w.int()), ("model.safetensors", f"'{UP}' has dtype torch.int32")),
    "matrix of doubles": (changed(UP, lambda w: w.double()), (f"'{UP}' has dtype torch.float64",)),
    "norm of bytes": (changed(NORM, lambda w: w.to(torch.uint8)), (f"'{NORM}' has dtype torch.uint8",)),
    "cut short": (cut, ("model.safetensors", "cut short")),
    "index leads up": (redirect("../x.safetensors"), ("index.json", "'../x.safetensors'; only plain names")),
    "index leads elsewhere": (redirect("PARENT/x.safetensors"), ("index.json", "/x.safetensors'; only plain names")),
    "half quantised": (
        lambda f: rewrite(f, lambda t: t.update({UP + ".absmax": torch.zeros(2)})),
        (f"'{UP}' has scales but no",),
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_found_before_memory_is_taken(
    source: Path, tmp_path: Path, ranks: Ranks, no_memory: None, case: str
) -> None:
    damage, messages = DAMAGES[case]
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    damage(folder)
    with pytest.raises(WeightsError) as caught:
        build(folder, ranks)
    assert all(message in str(caught.value) for message in messages), str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_undamaged_checkpoints_are_accepted(
    source: Path, quantized: Path, tmp_path: Path, ranks: Ranks, no_memory: None
) -> None:
    shutil.copytree(source, tmp_path / "split")
    split(tmp_path / "split")
    for folder in (source, quantized, tmp_path / "split"):
        with pytest.raises(AssertionError, match="memory would have been taken"):
            build(folder, ranks)


QUANTIZED_DAMAGES: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "scale is NaN": (".nested_absmax", lambda s: s * float("nan"), "holds NaN or infinite values"),
    "scale is infinite": (".nested_absmax", lambda s: s / 0, "holds NaN or infinite values"),
    "scales missing": (".absmax", lambda s: s[:-1], "absmax' has 103 bytes"),
    "codes missing": ("", lambda s: s[:-1], "has 3327 bytes"),
}


@pytest.mark.parametrize("case", QUANTIZED_DAMAGES)
def test_damaged_quantized_checkpoints(quantized: Path, tmp_path: Path, ranks: Ranks, case: str) -> None:
    part, change, message = QUANTIZED_DAMAGES[case]
    shutil.copytree(quantized, tmp_path / "model")
    changed(UP + part, change)(tmp_path / "model")
    with pytest.raises(WeightsError, match=message) as caught:
        build(tmp_path / "model", ranks)
    assert UP + part in str(caught.value)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("name", [UP, NORM, EMBEDDING, "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(
    source: Path, tmp_path: Path, ranks: Ranks, name: str, value: float
) -> None:
    shutil.copytree(source, tmp_path / "model")
    changed(name, lambda w: w.view(-1).index_fill(0, torch.tensor([5]), value).view(w.shape))(tmp_path / "model")
    with pytest.raises(WeightsError, match=rf"model\.safetensors: '{name}' holds NaN or infinite values"):
        build(tmp_path / "model", ranks)


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "ran")


CANARIES = ["pytorch_model.bin", "model.pt", "training_args.bin", "model.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", CANARIES)
@pytest.mark.parametrize("alone", [True, False])
def test_pickles_never_run(source: Path, tmp_path: Path, ranks: Ranks, name: str, alone: bool) -> None:
    folder, trace = tmp_path / "model", tmp_path / "trace"
    shutil.copytree(source, folder)
    if alone:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Canary(trace)))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary(trace)))
    beside_good_weights = not alone and not name.startswith("model.safetensors")
    with nullcontext() if beside_good_weights else pytest.raises(WeightsError):
        build(folder, ranks)
    assert not trace.exists()
    pickle.loads((folder / name).read_bytes())
    assert trace.exists(), "the canary itself works"


def test_custom_code_of_a_model_never_runs(source: Path, tmp_path: Path, ranks: Ranks) -> None:
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w').write('ran')\n")
    with pytest.raises(ModelError, match="auto_map"):
        build(folder, ranks)
    assert not (tmp_path / "trace").exists()

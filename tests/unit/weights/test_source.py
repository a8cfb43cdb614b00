"""Matching checkpoint tensors with the model, and descriptions of quantised matrices."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fsdp_qlora.errors import WeightsError
from fsdp_qlora.models.families import FAMILIES
from fsdp_qlora.quant.adapt import QuantSettings
from fsdp_qlora.quant.layout import Layout
from fsdp_qlora.weights.index import TensorEntry, read_header
from fsdp_qlora.weights.reader import Reader
from fsdp_qlora.weights.source import (
    check_complete,
    check_quantized,
    check_shape,
    detect_quantization,
    is_quantized,
    model_names,
    read_quant_state,
    require_finite,
)

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPE = (40, 96)


def quantized(quant_type: str = "nf4", double_quant: bool = True) -> dict[str, Tensor]:
    """Return a matrix as bitsandbytes saves it."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=double_quant)
    return {NAME: codes, **{f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}}


def reader_of(tensors: dict[str, Tensor], folder: Path) -> Reader:
    save_file(tensors, folder / "x.safetensors")
    return Reader(read_header(folder / "x.safetensors"))


def describe(tensors: dict[str, Tensor], **changes: Any) -> None:
    """Change entries of a matrix's description; None removes one."""
    key = next(name for name in tensors if "quant_state" in name)
    state = json.loads(bytes(tensors[key].tolist()))
    state = {name: value for name, value in {**state, **changes}.items() if value is not None}
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_bitsandbytes_own_description_is_understood(tmp_path: Path, quant_type: str, double_quant: bool) -> None:
    reader = reader_of(quantized(quant_type, double_quant), tmp_path)
    assert is_quantized(reader.tensors, NAME)
    state = read_quant_state(reader, NAME)
    assert (state.quant_type, state.double_quant, state.shape) == (quant_type, double_quant, SHAPE)
    assert (state.offset != 0) == double_quant
    check_quantized(reader, NAME, Layout(*SHAPE, quant_type, double_quant))
    wanted = QuantSettings("nf4", True, "uint8", 4)
    found = detect_quantization(reader, ["absent.weight", NAME], wanted)
    assert found == replace(wanted, quant_type=quant_type, double_quant=double_quant)
    assert detect_quantization(reader, ["absent.weight"], wanted) is wanted


def change_code(tensors: dict[str, Tensor], part: str) -> None:
    tensors[NAME + part] = tensors[NAME + part].clone()
    tensors[NAME + part][3] *= 1.01


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "unknown block size": (lambda t: describe(t, blocksize=128), r"uses block sizes \(128, 256\); only 64 and 256"),
    "unknown nested block size": (lambda t: describe(t, nested_blocksize=64), r"uses block sizes \(64, 64\)"),
    "no block size": (lambda t: describe(t, blocksize=None), "is unreadable .*blocksize"),
    "block size is a list": (lambda t: describe(t, blocksize=[64]), "is unreadable"),
    "infinite block size": (lambda t: describe(t, blocksize=float("inf")), "is unreadable"),
    "no shape": (lambda t: describe(t, shape=None), "is unreadable .*shape"),
    "shape of words": (lambda t: describe(t, shape=["a", "b"]), "is unreadable"),
    "offset is NaN": (lambda t: describe(t, nested_offset=float("nan")), "holds the offset nan"),
    "another shape": (lambda t: describe(t, shape=[96, 40]), r"is nf4 \[96, 40\].*expected nf4 \[40, 96\]"),
    "not JSON": (
        lambda t: t.update({f"{NAME}.quant_state.bitsandbytes__nf4": torch.tensor([123], dtype=torch.uint8)}),
        "is unreadable",
    ),
    "description of another type": (
        lambda t: t.update({f"{NAME}.quant_state.bitsandbytes__nf4": torch.tensor([1.5])}),
        "is unreadable",
    ),
    "no description": (
        lambda t: t.pop(f"{NAME}.quant_state.bitsandbytes__nf4"),
        "has scales but no .quant_state.bitsandbytes__nf4 or fp4 entry",
    ),
    "too few codes": (lambda t: t.update({NAME: t[NAME][:-1]}), rf"'{NAME}' has 1919 bytes .*instead of 1920"),
    "codes of another dtype": (
        lambda t: t.update({NAME: t[NAME].view(-1).view(torch.bfloat16)}),
        rf"'{NAME}' has 1920 bytes of torch.bfloat16 instead of 1920 of torch.uint8",
    ),
    "too few scales": (lambda t: t.update({NAME + ".absmax": t[NAME + ".absmax"][1:]}), "absmax' has 59 bytes"),
    "nested scales of another dtype": (
        lambda t: t.update({NAME + ".nested_absmax": t[NAME + ".nested_absmax"].view(torch.int32)}),
        r"nested_absmax' has 4 bytes of torch.int32 instead of 4 of torch.float32",
    ),
    "no nested scales": (lambda t: t.pop(NAME + ".nested_absmax"), "double quantisation False; expected nf4.*True"),
    "no code": (lambda t: t.pop(NAME + ".quant_map"), "quant_map' is missing"),
    "no nested code": (lambda t: t.pop(NAME + ".nested_quant_map"), "nested_quant_map' is missing"),
    "another code": (lambda t: change_code(t, ".quant_map"), ".quant_map' is not bitsandbytes' own code"),
    "another nested code": (lambda t: change_code(t, ".nested_quant_map"), "nested_quant_map' is not bitsandbytes'"),
    "short code": (lambda t: t.update({NAME + ".quant_map": t[NAME + ".quant_map"][:8]}), "is not bitsandbytes'"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_descriptions_are_refused(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGES[case]
    tensors = quantized()
    damage(tensors)
    reader = reader_of(tensors, tmp_path)
    with pytest.raises(WeightsError, match=message) as caught:
        check_quantized(reader, NAME, Layout(*SHAPE))
    assert NAME in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def named(*names: str) -> dict[str, TensorEntry]:
    return {name: TensorEntry(name, Path("/m/x.safetensors"), torch.float32, (1,), 0, 4) for name in names}


def test_names_of_the_image_models_are_those_of_the_text_model() -> None:
    tensors = named(
        "language_model.model.layers.0.mlp.up_proj.weight",
        "language_model.lm_head.weight",
        "model.language_model.norm.weight",
        "vision_tower.x",
        "model.vision_tower.y",
        "multi_modal_projector.z",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    )
    found = model_names(tensors, FAMILIES["gemma3"])
    assert set(found) == {NAME, "lm_head.weight", "model.norm.weight"}
    assert found[NAME].name == "language_model." + NAME
    plain = named(NAME, "model.norm.weight")
    assert model_names(plain, FAMILIES["llama"]) == plain


@pytest.mark.parametrize(
    ("tensors", "tied", "message"),
    [
        (named("a"), False, r"tensor 'b' is missing \(2 in all\)"),
        (named("a", "b", "lm_head.weight", "x"), False, "tensor 'x' is not part of this model"),
        (named("a", "b", "lm_head.weight", "a.absmax.absmax.x"), False, "'a.absmax.absmax.x' is not part"),
        (named("a", "b", "lm_head.weight", "lm_head.weight.bias"), True, "lm_head.weight.bias"),
        ({}, False, "the checkpoint: tensor 'a' is missing"),
    ],
)
def test_missing_and_extra_tensors_are_named(tensors: dict[str, TensorEntry], tied: bool, message: str) -> None:
    expected = {"a", "b"} | (set() if tied else {"lm_head.weight"})
    with pytest.raises(WeightsError, match=message):
        check_complete(tensors, expected, tied)


def test_complete_checkpoints_pass() -> None:
    check_complete(named("a", "lm_head.weight"), {"a", "lm_head.weight"}, tied=False)
    check_complete(named("a", "lm_head.weight"), {"a"}, tied=True)  # a copy of the embedding, not needed
    parts = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
    check_complete(named(*(f"a{part}" for part in parts)), {"a"}, tied=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.bool])
def test_dtypes_that_are_not_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    reader = reader_of({NAME: torch.zeros(SHAPE, dtype=dtype)}, tmp_path)
    with pytest.raises(WeightsError, match=rf"x\.safetensors: '{NAME}' has dtype {dtype}; expected bfloat16"):
        check_shape(reader, NAME, SHAPE)


@pytest.mark.parametrize("shape", [(96, 40), (40,), (40, 96, 1), ()])
def test_other_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    reader = reader_of({NAME: torch.zeros(shape)}, tmp_path)
    with pytest.raises(WeightsError, match=rf"'{NAME}' has shape .*; the model expects \[40, 96\]"):
        check_shape(reader, NAME, SHAPE)
    check_shape(reader, NAME, shape)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    for size in (1, 7, 100, 4099):
        reader = reader_of({NAME: torch.randn(size).to(dtype)}, tmp_path)
        require_finite(reader.read(NAME), reader, NAME)
        for position in {0, size // 3, size - 1}:
            values = reader.read(NAME)
            values[position] = value
            with pytest.raises(WeightsError, match=rf"x\.safetensors: '{NAME}' holds NaN or infinite values"):
                require_finite(values, reader, NAME)


def test_no_values_are_finite(tmp_path: Path) -> None:
    reader = reader_of({NAME: torch.zeros(3)}, tmp_path)
    require_finite(reader.read(NAME, 0, 0), reader, NAME)

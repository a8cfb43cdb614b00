"""Which layers get LoRA, of which rank and scale."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fsdp_qlora.errors import ModelError
from fsdp_qlora.quant.lora import LoraSettings, adapted_layers, is_names, is_targets, parse_layers, parse_patterns

NAMES = [
    f"model.layers.{block}.{part}"
    for block in range(12)
    for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
]


@pytest.mark.parametrize(
    ("targets", "layers", "expected"),
    [
        ("all-linear", None, NAMES),
        ("q_proj", None, [name for name in NAMES if "q_proj" in name]),
        (" mlp.up_proj , q_proj", (1,), ["model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"]),
        ("model.layers.1.mlp.up_proj", None, ["model.layers.1.mlp.up_proj"]),
        (r".*\.1\.mlp\.(up|down)_proj", None, ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]),
        ("all-linear", (11,), [name for name in NAMES if ".11." in name]),
    ],
)
def test_layers_that_get_lora(targets: str, layers: tuple[int, ...] | None, expected: list[str]) -> None:
    assert adapted_layers(NAMES, LoraSettings(4, 8, target_modules=targets, layers=layers)) == set(expected)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            LoraSettings(4, 8, target_modules="q_proj,proj"),
            "no linear layer is named proj; this model has q_proj, up_proj",
        ),
        (
            LoraSettings(4, 8, target_modules=".*k_proj"),
            "matches no linear layer; it must match whole names such as model",
        ),
        (LoraSettings(4, 8, layers=(3, 12)), "layers_to_transform 12: this model's blocks are 0 to 11"),
        (LoraSettings(4, 8, "q_proj", rank_pattern=(("k_proj", 2),)), "rank_pattern 'k_proj': matches no layer"),
        (
            LoraSettings(4, 8, target_modules="q_proj", alpha_pattern=(("up_proj", 2),)),
            "alpha_pattern 'up_proj': matches no layer that gets LoRA",
        ),
    ],
)
def test_what_matches_nothing_is_an_error(lora: LoraSettings, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        adapted_layers(NAMES, lora)
    assert message in str(caught.value)


EXPERTS = [
    f"model.layers.{block}.mlp.experts.{parameter}"
    for block in range(12)
    for parameter in ("gate_up_proj", "down_proj")
]


@pytest.mark.parametrize(
    ("targets", "layers", "expected"),
    [
        ((), None, []),
        (("experts",), None, EXPERTS),
        (("experts",), (3,), EXPERTS[6:8]),
        (("mlp.experts.down_proj",), None, EXPERTS[1::2]),
        (("down_proj", "model.layers.1.mlp.experts.gate_up_proj"), (1, 2), EXPERTS[2:4] + EXPERTS[5:6]),
    ],
)
def test_experts_that_get_lora(targets: tuple[str, ...], layers: tuple[int, ...] | None, expected: list[str]) -> None:
    lora = LoraSettings(4, 8, target_modules="q_proj", layers=layers, target_parameters=targets)
    assert {name for name in adapted_layers(NAMES, lora, EXPERTS) if "experts" in name} == set(expected)


@pytest.mark.parametrize(
    ("settings", "experts", "message"),
    [
        ({"target_parameters": ("experts",)}, [], "'experts': this model has no experts; leave it out"),
        (
            {"target_parameters": ("experts.proj",)},
            EXPERTS,
            "'experts.proj': this model has mlp.experts.gate_up_proj, mlp",
        ),
        ({"target_parameters": ("experts",), "dropout": 0.1}, EXPERTS, "--lora_dropout=0.1: PEFT"),
        ({"target_parameters": ("experts",), "use_dora": True}, EXPERTS, "--use_dora=true: PEFT"),
    ],
)
def test_lora_that_experts_cannot_have_is_an_error(settings: dict[str, Any], experts: list[str], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        adapted_layers(NAMES, LoraSettings(4, 8, **settings), experts)
    assert message in str(caught.value)


def test_rank_and_scaling_of_a_layer() -> None:
    patterns = (("up_proj", 2.0), (r".*\.1\.mlp\..*", 16.0))
    lora = LoraSettings(4, 8.0, rank_pattern=patterns, alpha_pattern=(("down_proj", 32.0),))
    expected = {"0.self_attn.q_proj": (4, 2.0), "1.mlp.up_proj": (2, 4.0), "1.mlp.down_proj": (16, 2.0)}
    found = {name: (lora.rank_of(f"model.layers.{name}"), lora.scaling_of(f"model.layers.{name}")) for name in expected}
    assert found == expected
    assert lora.rank_of("model.layers.0.mlp.gate_up_proj") == 4, "a name ends behind a dot"
    assert LoraSettings(4, 8.0, use_rslora=True).scaling_of("q_proj") == 8.0 / math.sqrt(4)


def test_texts_of_layers_and_patterns() -> None:
    assert parse_layers("0-2, 8,1-3") == (0, 1, 2, 3, 8)
    assert parse_patterns("q_proj=8, .*[01]{1,2}.up=2.5") == (("q_proj", 8.0), (".*[01]{1,2}.up", 2.5))
    assert parse_patterns(r"(?=x)=4") == (("(?=x)", 4.0),)


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "2-1"])
def test_texts_that_name_no_layers(text: str) -> None:
    with pytest.raises(ValueError, match="names no blocks"):
        parse_layers(text)


@pytest.mark.parametrize("text", ["q_proj", "q_proj=", "=8", "q_proj=8 up=4", "(=8", "q_proj=-1"])
def test_texts_that_are_no_patterns(text: str) -> None:
    with pytest.raises(ValueError, match="no list of pattern=value"):
        parse_patterns(text)


@pytest.mark.parametrize(
    ("text", "names", "valid"),
    [
        ("all-linear", True, True),
        ("q_proj, mlp.up_proj", True, True),
        ("q_proj,,v_proj", True, False),
        (".*q_proj", False, True),
        ("(q|v", False, False),
    ],
)
def test_names_and_regular_expressions(text: str, names: bool, valid: bool) -> None:
    assert (is_names(text), is_targets(text)) == (names, valid)

"""The model without weights: parameters on the meta device, real buffers, nothing but what transformers defines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fsdp_qlora.errors import ModelError
from fsdp_qlora.models.attention import ATTENTION
from fsdp_qlora.models.families import FAMILIES as SUPPORTED
from fsdp_qlora.models.families import family_of
from fsdp_qlora.models.skeleton import build_skeleton, read_config
from tests.tiny import FAMILIES, save_tiny


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_parameters_are_frozen_and_on_meta(folder: Path) -> None:
    skeleton = build_skeleton(folder, torch.bfloat16)
    parameters = list(skeleton.model.parameters())
    assert parameters
    assert all(p.is_meta and not p.requires_grad and p.dtype == torch.bfloat16 for p in parameters)


def test_buffers_are_those_of_from_pretrained(folder: Path) -> None:
    """They are in no checkpoint: rotary tables and embedding scales are made, not loaded."""
    expected = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).named_buffers())
    found = dict(build_skeleton(folder, torch.bfloat16).model.named_buffers())
    assert expected
    assert set(found) == set(expected)
    for name, buffer in expected.items():
        assert found[name].dtype == buffer.dtype, name
        assert found[name].equal(buffer), name


def test_parameters_are_those_of_the_checkpoint(folder: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder)
    skeleton = build_skeleton(folder, torch.float32)
    expected = {name: p.shape for name, p in reference.named_parameters()}
    assert {name: p.shape for name, p in skeleton.model.named_parameters()} == expected
    assert skeleton.tied == (reference.lm_head.weight is reference.model.embed_tokens.weight)
    assert (skeleton.model.lm_head.weight is skeleton.embedding.weight) == skeleton.tied
    assert skeleton.vocabulary is (skeleton.embedding if skeleton.tied else skeleton.model.lm_head)
    assert len(skeleton.blocks) == reference.config.num_hidden_layers


def test_dropout_of_the_base_is_off(tmp_path: Path) -> None:
    """A recomputed block would draw other masks than in forward."""
    folder = save_tiny("phi3", tmp_path, resid_pdrop=0.5, attention_dropout=0.5)
    skeleton = build_skeleton(folder, torch.float32)
    rates = [module.p for module in skeleton.model.modules() if isinstance(module, torch.nn.Dropout)]
    assert rates
    assert not any([*rates, skeleton.config.attention_dropout])


def test_uses_packed_attention_without_cache(folder: Path) -> None:
    config = build_skeleton(folder, torch.float32).config
    assert config._attn_implementation == ATTENTION
    assert config.use_cache is False


def test_soft_cap_comes_from_the_config(tmp_path: Path) -> None:
    assert build_skeleton(save_tiny("gemma2", tmp_path / "capped"), torch.float32).logit_softcap == 3.0
    assert build_skeleton(save_tiny("llama", tmp_path / "plain"), torch.float32).logit_softcap is None


def test_logit_scale_comes_from_the_config(tmp_path: Path) -> None:
    scales = {
        name: build_skeleton(save_tiny(name, tmp_path / name), torch.float32).logit_scale
        for name in ("llama", "granite", "cohere")
    }
    assert scales == {"llama": 1.0, "granite": 1 / 3, "cohere": 0.3}


def test_quantisation_of_the_checkpoint_is_not_applied_by_transformers(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    skeleton = build_skeleton(folder, torch.float32)
    assert type(skeleton.model.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_custom_code_is_refused(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="auto_map"):
        read_config(folder)


def test_unknown_family_lists_the_supported_ones(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path)
    edit_config(folder, model_type="gpt2")
    with pytest.raises(ModelError, match=r"'gpt2' is not supported; supported are llama, .*phi3"):
        read_config(folder)


def test_every_supported_family_has_a_tiny_model_for_the_parity_tests() -> None:
    tiny = {settings.get("model_type", family) for family, settings in FAMILIES.items()}
    # text parts of image models, which tests/parity/test_peft.py makes itself
    assert set(SUPPORTED) == tiny | {"gemma3", "mistral3"}
    assert all(family_of(name).title for name in SUPPORTED)


def test_the_shape_of_the_405b_plan_is_that_of_the_model() -> None:
    folder = Path(__file__).resolve().parents[3] / "docs" / "shapes" / "llama-405b"
    assert build_skeleton(folder, torch.bfloat16).model.num_parameters() == 405_853_388_800

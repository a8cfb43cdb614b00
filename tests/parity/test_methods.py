"""Every kind of LoRA against PEFT: losses, gradients, and adapters that change hands in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from fsdp_qlora.adapters import open_adapter, save_adapter
from fsdp_qlora.build import build_model
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.errors import ModelError
from fsdp_qlora.models.vocabulary import trained_vocabularies
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, lora_linears
from tests.batches import random_examples, random_ids, unpacked_loader, whole_rows
from tests.parity import reference
from tests.parity.methods import FAMILIES, METHODS, TOKENS, measure
from tests.parity.reference import NF4
from tests.tiny import COMMON, save_tiny


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = {"llama", *FAMILIES.values()}
    return {family: save_tiny(family, tmp_path_factory.mktemp("methods")) for family in families}


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> Path:
    return bases["llama"]


@pytest.mark.parametrize("method", METHODS)
def test_method_is_pefts(method: str, bases: dict[str, Path], ranks: Ranks, tmp_path: Path) -> None:
    found = measure(bases[FAMILIES.get(method, "llama")], METHODS[method], ranks, tmp_path)
    assert found.loss < 1e-6
    assert found.gradients < 1e-4
    assert found.exported < 1e-5
    assert found.imported < 1e-5
    assert found.update > 1e-2


def test_dora_begins_with_pefts_magnitudes(base: Path, ranks: Ranks) -> None:
    lora = METHODS["DoRA"]
    ours = build_model(base, ranks, NF4, lora, torch.float32)
    peft = get_peft_model(reference.load_base(base, NF4, torch.float32), reference.peft_config(lora))
    named = dict(peft.named_parameters())
    for linear in lora_linears(ours.root):
        expected = named[reference.peft_name(linear.name, "lora_magnitude_vector")]
        torch.testing.assert_close(reference.local(linear.lora_magnitude_vector), expected.data, rtol=1e-5, atol=0)


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_is_pefts(base: Path, ranks: Ranks, use_dora: bool) -> None:
    lora = LoraSettings(8, 16.0, dropout=0.3, use_dora=use_dora)
    pair = reference.load_pair(base, ranks, lora=lora)
    ids = random_ids(1, TOKENS, COMMON["vocab_size"])
    torch.manual_seed(0)
    found = reference.our_gradients(pair.ours, ranks, whole_rows(ids))
    torch.manual_seed(0)
    expected = reference.reference_gradients(pair.peft, ids)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert reference.max_gradient_difference(found, expected) < 1e-4


@pytest.mark.parametrize(
    ("family", "use_dora", "dtype"),
    [
        ("llama", False, torch.float32),
        ("llama", True, torch.float32),
        ("llama", False, torch.bfloat16),
        ("llama", True, torch.bfloat16),
        ("qwen3_moe", False, torch.float32),  # in bf16 tokens near a tie go to other experts
    ],
)
def test_a_base_that_is_not_quantised(
    tmp_path: Path, ranks: Ranks, family: str, use_dora: bool, dtype: torch.dtype
) -> None:
    folder = save_tiny(family, tmp_path, dtype=dtype)
    pair = reference.load_pair(folder, ranks, QuantSettings("none"), LoraSettings(8, 16.0, use_dora=use_dora), dtype)
    assert pair.ours.quant.quant_type == str(dtype).removeprefix("torch.")
    ids = random_ids(2, TOKENS, COMMON["vocab_size"])
    found = reference.our_gradients(pair.ours, ranks, whole_rows(ids))
    expected = reference.reference_gradients(pair.peft, ids)
    exact = dtype == torch.float32
    assert found.loss == pytest.approx(expected.loss, rel=1e-6 if exact else 1e-2)
    if exact:
        assert reference.max_gradient_difference(found, expected) < 1e-4
    else:
        assert reference.gradient_distance(found, expected) < 5e-2


def test_loraplus_steps_follow_peft(base: Path, ranks: Ranks) -> None:
    loader = unpacked_loader(random_examples(8, TOKENS, COMMON["vocab_size"]), TOKENS)
    curves = []
    for ratio in (1.0, 8.0):
        pair = reference.load_pair(base, ranks, zero_lora_B=True)
        curves.append(reference.train_both(pair, ranks, loader, num_steps=4, lr=1e-3, lr_ratio=ratio))
    plain, faster = curves
    assert faster.max_deviation < 1e-5
    assert abs(faster.ours[-1] - plain.ours[-1]) > 1e-3 * plain.ours[-1], "the ratio changes nothing"


BOTH = LoraSettings(8, 16.0, modules_to_save=("embed_tokens", "lm_head"))


@pytest.mark.parametrize("family", ["llama", "llama3"])
def test_steps_with_whole_modules_follow_peft(bases: dict[str, Path], ranks: Ranks, family: str) -> None:
    """AdamW and the clipping of one norm over everything, with embedding and head apart or tied."""
    loader = unpacked_loader(random_examples(8, TOKENS, COMMON["vocab_size"]), TOKENS)
    pair = reference.load_pair(bases[family], ranks, lora=BOTH)
    modules = [module.weight for _, module in trained_vocabularies(pair.ours.root.model)]
    before = [reference.local(weight).clone() for weight in modules]
    curves = reference.train_both(pair, ranks, loader, num_steps=4, lr=1e-3)
    assert curves.max_deviation < 1e-5
    named = dict(pair.peft.named_parameters())
    for name, parameter in reference.trained_by_pefts_names(pair.ours):
        # of steps of 1e-3: where a gradient is next to nothing, AdamW goes by its rounding
        torch.testing.assert_close(reference.local(parameter), named[name].data, rtol=0, atol=3e-5)
    assert all((reference.local(weight) - old).abs().max() > 2e-3 for weight, old in zip(modules, before, strict=True))


def test_padding_rows_learn_what_they_do_in_transformers(bases: dict[str, Path], ranks: Ranks) -> None:
    """nn.Embedding gives the padding token's row no gradient, also where the token is a real one (SmolLM2's end)."""
    pair = reference.load_pair(bases["llama"], ranks, lora=BOTH)
    ids = random_ids(2, TOKENS, COMMON["vocab_size"])
    ids[:, 5] = COMMON["pad_token_id"]
    found = reference.our_gradients(pair.ours, ranks, whole_rows(ids))
    expected = reference.reference_gradients(pair.peft, ids)
    assert reference.max_gradient_difference(found, expected) < 1e-4
    rows = found.grads[reference.peft_name("model.embed_tokens", "modules_to_save")]
    assert (rows[COMMON["pad_token_id"]] == 0).all()
    assert (rows[ids[0, 6]] != 0).any()


def test_whole_modules_are_float32_where_the_model_is_not(ranks: Ranks, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    pair = reference.load_pair(folder, ranks, lora=BOTH, dtype=torch.bfloat16)
    modules = {module.weight.dtype for _, module in trained_vocabularies(pair.ours.root.model)}
    assert modules == {torch.float32}
    ids = random_ids(2, TOKENS, COMMON["vocab_size"])
    found = reference.our_gradients(pair.ours, ranks, whole_rows(ids))
    expected = reference.reference_gradients(pair.peft, ids)
    assert found.loss == pytest.approx(expected.loss, rel=1e-2)
    assert reference.gradient_distance(found, expected) < 5e-2


def test_a_head_that_peft_untied_is_refused(bases: dict[str, Path], ranks: Ranks, tmp_path: Path) -> None:
    base = bases["llama3"]
    for modules, message in ((["lm_head"], "use embed_tokens"), (["embed_tokens"], "ensure_weight_tying")):
        lora = LoraSettings(8, 16.0, modules_to_save=tuple(modules))
        peft = get_peft_model(reference.load_base(base, NF4, torch.float32), reference.peft_config(lora))
        peft.save_pretrained(tmp_path / modules[0])
        adapter = open_adapter(tmp_path / modules[0], str(base))
        with pytest.raises(ModelError, match=message):
            build_model(base, ranks, NF4, adapter.lora, torch.float32, adapter=adapter.matrices)


def test_unsharded_model_computes_with_its_own_modules(bases: dict[str, Path], ranks: Ranks, tmp_path: Path) -> None:
    """As `generate` loads it."""
    for family in ("llama", "llama3"):
        pair = reference.load_pair(bases[family], ranks, lora=BOTH)
        save_adapter(pair.ours.root, BOTH, str(bases[family]), tmp_path / family, ranks)
        adapter = open_adapter(tmp_path / family, None)
        own = {"adapter": adapter.matrices, "shard": False}
        plain = build_model(bases[family], ranks, NF4, adapter.lora, torch.float32, **own)
        batch = whole_rows(random_ids(2, TOKENS, COMMON["vocab_size"]))
        expected = reference.logits(pair.ours, ranks, batch)
        assert reference.relative_difference(reference.logits(plain, ranks, batch), expected) < 1e-6

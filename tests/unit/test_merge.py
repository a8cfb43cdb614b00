"""`merge` gives what PEFT computes with base + adapter, in every form, and says how far it is from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fsdp_qlora.commands.merge import run
from fsdp_qlora.commands.quantize import quantize
from fsdp_qlora.config import MergeConfig, QuantizeConfig
from fsdp_qlora.errors import CheckpointError, ConfigError, FsdpQloraError
from fsdp_qlora.export.merge_error import compare, tokenize
from fsdp_qlora.export.merged_weights import Lora
from fsdp_qlora.output_files import CONFIG_FILE, WEIGHTS_FILE
from tests.e2e.conftest import save_tokenizer
from tests.limited import run_limited, weights_bytes
from tests.parity.reference import NF4, load_base
from tests.tiny import save_tiny
from tests.unit.test_quantize import save_gemma3, tensors_of

IDS = torch.arange(3, 60)[None]


def save_adapter(base: Path, folder: Path, **changes: Any) -> Path:
    """Save a PEFT adapter of random values for a base."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "modules_to_save" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    return folder


def save_base(family: str, folder: Path, **changes: Any) -> Path:
    base = save_tiny(family, folder, torch.bfloat16, num_hidden_layers=2, **changes)
    save_tokenizer(base)
    return base


def merge(adapter: Path, target: Path, **changes: Any) -> dict[str, Any]:
    """Merge and return the record's part on it."""
    run(MergeConfig(**{"adapter": str(adapter), "output_dir": str(target), "device": "cpu", **changes}))
    record: dict[str, Any] = json.loads((target / "run.json").read_text())["merge"]
    return record


def with_adapter(base: Path, adapter: Path, quant_type: str = "nf4", double_quant: bool = True) -> PeftModel:
    """Return PEFT's model on the quantised base, in float32.

    In training mode, in which it computes the same: in the other, bitsandbytes has a form for some CPUs that refuses small
    matrices.
    """
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).train()


def logits_of(folder: Path, ids: Tensor = IDS) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base("llama", tmp_path_factory.mktemp("merge") / "llama")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapts some of the layers."""
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize(
    ("family", "quant_type", "double_quant"),
    [("llama3", "nf4", True), ("qwen2", "fp4", False), ("gemma3_text", "nf4", False), ("phi3", "fp4", True)],
)
def test_merged_is_base_and_adapter(tmp_path: Path, family: str, quant_type: str, double_quant: bool) -> None:
    base = save_base(family, tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    form: dict[str, Any] = {"quant_type": quant_type, "double_quant": double_quant}
    record = merge(adapter, tmp_path / "out", output="fp32", **form)
    with torch.no_grad():
        expected = with_adapter(base, adapter, **form)(IDS).logits
    found = logits_of(tmp_path / "out")
    assert (found - expected).abs().max() < 1e-4
    assert (expected - logits_of(base)).abs().max() > 1e-1, "the adapter must matter"
    errors = record["logit_errors"]
    assert errors["dequantized (written)"]["largest"] < 1e-4
    assert errors["original"]["mean"] > 100 * errors["dequantized (written)"]["mean"]
    assert errors["no adapter"]["divergence"] > 100 * errors["dequantized (written)"]["divergence"]


@pytest.mark.parametrize("family", ["llama", "granite"])  # Granite scales its logits
def test_printed_errors_are_those_of_transformers_and_peft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    base = save_base(family, tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    record = merge(adapter, tmp_path / "out")
    printed = capsys.readouterr().out
    merge(adapter, tmp_path / "other", merge_base="original")
    tokens, counts = tokenize(AutoTokenizer.from_pretrained(base))
    with torch.no_grad():
        reference = with_adapter(base, adapter)(tokens).logits[counts]
        without = with_adapter(base, adapter)
        with without.disable_adapter():
            unadapted = without(tokens).logits[counts]
    found = {
        "dequantized (written)": logits_of(tmp_path / "out", tokens)[counts],
        "original": logits_of(tmp_path / "other", tokens)[counts],
        "no adapter": unadapted,
    }
    assert record["logit_errors"].keys() == found.keys()
    for title, logits in found.items():
        expected = compare(reference, logits)
        assert f"{title} " in printed
        assert f"  {record['logit_errors'][title]['mean']:.2e}  " in printed
        assert record["logit_errors"][title]["mean"] == pytest.approx(expected.mean, rel=1e-2)
        assert record["logit_errors"][title]["divergence"] == pytest.approx(expected.divergence, rel=1e-2, abs=1e-7)
    weights = tensors_of(tmp_path / "out")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert (tmp_path / "out/tokenizer.json").exists()


def test_rslora_and_patterns_scale_as_in_peft(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(
        base,
        tmp_path / "adapter",
        use_rslora=True,
        rank_pattern={"up_proj": 6, "model.layers.1.self_attn.q_proj": 2},
        alpha_pattern={r"layers\.0\.mlp\.\w+": 3, "k_proj": 16},
    )
    merge(adapter, tmp_path / "out", output="fp32", merge_base="original", measure=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    for name, value in tensors_of(tmp_path / "out").items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


def test_dora_is_merged_as_by_peft(tmp_path: Path) -> None:
    base = save_base("qwen2", tmp_path / "base")  # has biases, which DoRA must not scale
    adapter = save_adapter(base, tmp_path / "adapter", use_dora=True)
    record = merge(adapter, tmp_path / "out", output="fp32")
    assert record["logit_errors"]["dequantized (written)"]["largest"] < 1e-4
    with torch.no_grad():
        expected = with_adapter(base, adapter)(IDS).logits
    assert (logits_of(tmp_path / "out") - expected).abs().max() < 1e-4


def test_a_row_of_zeros_stays_one_with_dora() -> None:
    """As in training, whose magnitudes of such rows are the least length that they divide by."""
    base = torch.randn(4, 6)
    base[2] = 0
    lora_A, lora_B = torch.randn(2, 6), torch.randn(4, 2)
    lora_B[2] = 0
    updated = base + 0.5 * lora_B @ lora_A
    magnitudes = updated.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny ** 0.5) * 1.5
    merged = Lora(lora_A, lora_B, 0.5, magnitudes).add_to(base.clone())
    assert torch.allclose(merged, 1.5 * updated)
    assert not merged[2].any()


@pytest.mark.parametrize(
    ("family", "modules"),
    [("llama", ["embed_tokens", "lm_head"]), ("llama", ["lm_head"]), ("gemma2", ["embed_tokens"])],  # gemma2 is tied
)
def test_whole_modules_are_merged_as_by_peft(tmp_path: Path, family: str, modules: list[str]) -> None:
    base = save_base(family, tmp_path / "base")
    tied = family == "gemma2"
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=list(modules), ensure_weight_tying=tied)
    record = merge(adapter, tmp_path / "out", output="fp32")
    peft = with_adapter(base, adapter)
    with torch.no_grad():
        assert (logits_of(tmp_path / "out") - peft(IDS).logits).abs().max() < 1e-4
        tokens, counts = tokenize(AutoTokenizer.from_pretrained(base))
        reference = peft(tokens).logits[counts]
        with peft.disable_adapter():
            unadapted = peft(tokens).logits[counts]
    errors = record["logit_errors"]
    assert errors["dequantized (written)"]["largest"] < 1e-4
    assert errors["no adapter"]["mean"] == pytest.approx(compare(reference, unadapted).mean, rel=1e-4)
    merge(adapter, tmp_path / "other", output="fp32", merge_base="original")
    other = compare(reference, logits_of(tmp_path / "other", tokens)[counts])
    assert errors["original"]["mean"] == pytest.approx(other.mean, rel=1e-3)
    merge(adapter, tmp_path / "4bit", output="4bit", measure=False)
    trained = load_file(adapter / WEIGHTS_FILE)
    found = tensors_of(tmp_path / "4bit")
    for module in modules:
        name = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}[module]
        assert found[name].equal(trained[f"base_model.model.{name}"].bfloat16())


def test_a_base_that_was_not_quantised(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / "adapter" / name).write_bytes((adapter / name).read_bytes())
    (folder / "run.json").write_text(json.dumps({"base": {"quant_type": "bfloat16", "double_quant": False}}))
    record = merge(folder, tmp_path / "out", output="fp32")
    assert record["quant_type"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(model, adapter)(IDS).logits
    assert (logits_of(tmp_path / "out") - expected).abs().max() < 1e-4
    with pytest.raises(ConfigError, match="the base was not quantised in training"):
        merge(folder, tmp_path / "no", output="4bit")


def test_4bit_result_is_the_merged_model_quantised(base: Path, adapter: Path, tmp_path: Path) -> None:
    record = merge(adapter, tmp_path / "out", output="4bit")
    merge(adapter, tmp_path / "bf16")
    for source, output in ((tmp_path / "bf16", tmp_path / "again"), (base, tmp_path / "base4")):
        quantize(QuantizeConfig(str(source), str(output), device="cpu"))
    found, again, untouched = (tensors_of(tmp_path / name) for name in ("out", "again", "base4"))
    assert found.keys() == again.keys()
    for name, value in found.items():
        adapted = "q_proj" in name or "down_proj" in name
        assert value.equal((again if adapted else untouched)[name]), name
    loaded = logits_of(tmp_path / "out")
    with torch.no_grad():
        error = (loaded - with_adapter(base, adapter)(IDS).logits).abs().mean()
        effect = (logits_of(tmp_path / "base4") - with_adapter(base, adapter)(IDS).logits).abs().mean()
    assert error < 0.5 * effect
    assert 0 < record["logit_errors"]["dequantized (written)"]["mean"] < record["logit_errors"]["no adapter"]["mean"]


def test_an_adapter_lost_in_rounding_is_warned_of(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weak = tmp_path / "weak"
    weak.mkdir()
    (weak / CONFIG_FILE).write_bytes((adapter / CONFIG_FILE).read_bytes())
    save_file({name: value * 0.05 for name, value in load_file(adapter / WEIGHTS_FILE).items()}, weak / WEIGHTS_FILE)
    warning = "hardly nearer to base + adapter than the base alone"
    merge(weak, tmp_path / "fp32", output="fp32")
    assert warning not in capsys.readouterr().out
    merge(weak, tmp_path / "4bit", output="4bit")
    assert warning in capsys.readouterr().out


def test_quantised_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    quantize(QuantizeConfig(str(base), str(tmp_path / "base4"), quant_type="fp4", double_quant=False, device="cpu"))
    model = {"model": str(tmp_path / "base4")}
    record = merge(adapter, tmp_path / "out", **model)
    assert (record["quant_type"], record["double_quant"]) == ("fp4", False)
    assert "original" not in record["logit_errors"]
    merge(adapter, tmp_path / "same", quant_type="fp4", double_quant=False, measure=False)
    same = tensors_of(tmp_path / "same")
    assert all(value.equal(same[name]) for name, value in tensors_of(tmp_path / "out").items())
    merge(adapter, tmp_path / "out4", output="4bit", measure=False, **model)
    merge(adapter, tmp_path / "same4", output="4bit", quant_type="fp4", double_quant=False, measure=False)
    same = tensors_of(tmp_path / "same4")
    assert all(value.equal(same[name]) for name, value in tensors_of(tmp_path / "out4").items())
    with pytest.raises(ConfigError, match=r"--merge_base=original: .* is quantised already"):
        merge(adapter, tmp_path / "no", merge_base="original", **model)
    with pytest.raises(ConfigError, match="is quantised already, as fp4"):
        merge(adapter, tmp_path / "no", quant_type="nf4", **model)


def test_image_models(tmp_path: Path) -> None:
    base = save_gemma3(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=r"model\.language_model\.layers\..*\.o_proj")
    merge(adapter, tmp_path / "out", output="fp32", merge_base="original", measure=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with torch.no_grad():
        assert (logits_of(tmp_path / "out") - merged(IDS).logits).abs().max() < 1e-5
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    changed = {name for name, value in before.items() if not after[name].equal(value.float())}
    assert changed == {name for name in before if "language_model" in name and "o_proj" in name}


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("qwen2_moe", {"target_modules": ["q_proj", "down_proj", "shared_expert_gate"], "target_parameters": BOTH}),
        ("mixtral", {"target_parameters": BOTH, "use_rslora": True}),
        ("qwen3_moe", {"target_parameters": BOTH, "rank_pattern": {"mlp.experts.down_proj": 3}}),
        ("qwen3_moe", {"target_parameters": BOTH[:1], "alpha_pattern": {"experts.gate_up_proj": 9}}),
    ],
)
def test_mixtures_of_experts(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    """Experts without an update get the values that training computed with."""
    base = save_base(family, tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", **{"target_modules": ["q_proj", "v_proj"], **settings})
    record = merge(adapter, tmp_path / "out", output="fp32")
    written = record["logit_errors"]["dequantized (written)"]
    reference = PeftModel.from_pretrained(load_base(base, NF4, torch.float32), adapter).train()
    with torch.no_grad():
        expected = reference(IDS).logits
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)
    assert written["largest"] < 1e-5
    assert record["logit_errors"]["original"]["largest"] > 1e-3


def test_the_record_of_the_run_says_what_the_base_was(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / "adapter" / name).write_bytes((adapter / name).read_bytes())
    trained = {"quant_type": "fp4", "double_quant": False, "fingerprint": "00"}
    (folder / "run.json").write_text(json.dumps({"base": trained, "world_size": 2}))
    merge(folder, tmp_path / "out")
    assert "warning: this base's 4-bit bytes" in capsys.readouterr().out
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert (record["world_size"], record["merge"]["quant_type"], record["merge"]["double_quant"]) == (2, "fp4", False)


REFUSED: dict[str, tuple[dict[str, Any], type[FsdpQloraError], str]] = {
    "DoRA without its magnitudes": ({"use_dora": True}, CheckpointError, "has no place in this base"),
    "head without its weight": ({"modules_to_save": ["lm_head"]}, CheckpointError, "names 'lm_head.weight'"),
    "other modules": ({"modules_to_save": ["score"]}, CheckpointError, "this one uses .'modules_to_save score'."),
    "not LoRA": ({"peft_type": "IA3"}, CheckpointError, "only LoRA adapters with rank and alpha above 0 are read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_kinds_of_adapters_are_refused(base: Path, adapter: Path, tmp_path: Path, case: str) -> None:
    changes, kind, message = REFUSED[case]
    config = json.loads((adapter / CONFIG_FILE).read_text())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / CONFIG_FILE).write_text(json.dumps({**config, **changes}))
    (tmp_path / "adapter" / WEIGHTS_FILE).write_bytes((adapter / WEIGHTS_FILE).read_bytes())
    with pytest.raises(kind, match=message):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_bases_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = save_base("llama", tmp_path / "other", hidden_size=32)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        merge(adapter, tmp_path / "out", model=str(other))
    tensors = load_file(adapter / WEIGHTS_FILE)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    half = tmp_path / "half"
    half.mkdir()
    save_file(tensors, half / WEIGHTS_FILE)
    (half / CONFIG_FILE).write_bytes((adapter / CONFIG_FILE).read_bytes())
    with pytest.raises(CheckpointError, match=r"lora_A' of shape .* has no place in this base"):
        merge(half, tmp_path / "out")


def test_a_model_larger_than_the_memory_is_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    large = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 48}
    model = save_tiny("llama", tmp_path / "large", torch.bfloat16, **large)
    save_tokenizer(model)
    update = save_adapter(model, tmp_path / "update", target_modules=["q_proj", "down_proj"])
    extra = 32 << 20
    assert weights_bytes(model) > 2.5 * extra
    result = run_limited(
        ["merge", "--adapter", str(adapter), "--output_dir", str(tmp_path / "warm")],
        ["merge", "--adapter", str(update), "--output_dir", str(tmp_path / "out")],
        extra,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert weights_bytes(tmp_path / "out") == pytest.approx(weights_bytes(model), rel=0.01)

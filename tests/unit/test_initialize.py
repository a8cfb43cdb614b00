"""PiSSA and LoftQ: PEFT's own results, on bases that PEFT and training load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fsdp_qlora.adapters import open_adapter
from fsdp_qlora.build import build_model
from fsdp_qlora.commands.initialize import low_rank_factors, run
from fsdp_qlora.config import InitializeConfig
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.errors import ConfigError, FsdpQloraError, WeightsError
from fsdp_qlora.output_files import CONFIG_FILE, WEIGHTS_FILE
from tests.batches import random_ids, whole_rows
from tests.faults.jobs import SETTINGS, losses, make_inputs, train
from tests.parity import reference
from tests.parity.reference import NF4
from tests.tiny import save_tiny

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("initialize") / "base", num_hidden_layers=2)


def initialize(base: Path, output: Path, **changes: Any) -> Path:
    settings = {"lora_rank": 4, "lora_alpha": 8.0, "iterations": 0, "device": "cpu", **changes}
    run(InitializeConfig(model=str(base), output_dir=str(output), **settings))
    return output


def logits_of_both(base: Path, adapter: Path, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """Return our logits and PEFT's of an adapter on the 4-bit form of a base."""
    opened = open_adapter(adapter, str(base))
    ours = build_model(base, ranks, NF4, opened.lora, torch.float32, adapter=opened.matrices)
    peft = PeftModel.from_pretrained(reference.load_base(base, NF4, torch.float32), adapter / "adapter").train()
    ids = random_ids(2, 32, 320)
    with torch.no_grad():
        return reference.logits(ours, ranks, whole_rows(ids)), peft(input_ids=ids).logits


def test_pissa_is_pefts(base: Path, ranks: Ranks, tmp_path: Path) -> None:
    output = initialize(base, tmp_path / "pissa", rank_pattern="down_proj=6", lora_target_modules="up_proj,down_proj")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        rank_pattern={"down_proj": 6},
        target_modules=["up_proj", "down_proj"],
        init_lora_weights="pissa",
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(model, config)
    expected = dict(peft.named_parameters())
    residuals, adapter = load_file(output / "model.safetensors"), load_file(output / "adapter" / WEIGHTS_FILE)
    assert len(adapter) == 2 * 2 * 2
    for name, found in adapter.items():
        theirs = expected[name.replace(".weight", ".default.weight")].data
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)
    changed = 0
    for name, weight in load_file(base / "model.safetensors").items():
        theirs = expected.get(f"base_model.model.{name.replace('.weight', '.base_layer.weight')}")
        changed += theirs is not None
        torch.testing.assert_close(residuals[name], weight if theirs is None else theirs.data, rtol=1e-5, atol=1e-5)
    assert changed == 4
    ours, pefts = logits_of_both(output, output, ranks)
    assert reference.relative_difference(ours, pefts) < 1e-5


def test_loftq_corrects_the_4bit_error_as_peft_does(base: Path, ranks: Ranks, tmp_path: Path) -> None:
    output = initialize(base, tmp_path / "loftq", method="loftq", lora_alpha=4.0)
    assert [path.name for path in output.iterdir()] == ["adapter"]
    adapter = load_file(output / "adapter" / WEIGHTS_FILE)
    weight = load_file(base / "model.safetensors")[f"{LAYER}.weight"]
    residual = weight - bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    expected = _low_rank_decomposition(residual, reduced_rank=4)
    torch.testing.assert_close(adapter[f"base_model.model.{LAYER}.lora_A.weight"], expected["R"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(adapter[f"base_model.model.{LAYER}.lora_B.weight"], expected["L"], rtol=1e-3, atol=1e-5)
    ours, pefts = logits_of_both(base, output, ranks)
    assert reference.relative_difference(ours, pefts) < 1e-5


@pytest.mark.parametrize("method", ["pissa", "loftq"])
@pytest.mark.parametrize(("tied", "modules"), [(False, "embed_tokens,lm_head"), (True, "embed_tokens")])
def test_modules_to_save_are_pefts(ranks: Ranks, tmp_path: Path, method: str, tied: bool, modules: str) -> None:
    base = save_tiny("llama", tmp_path / "base", num_hidden_layers=2, tie_word_embeddings=tied)
    output = initialize(base, tmp_path / "output", method=method, modules_to_save=modules)
    config = LoraConfig(
        r=4,
        target_modules="all-linear",
        modules_to_save=modules.split(","),
        ensure_weight_tying=tied,
        task_type="CAUSAL_LM",
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = get_peft_model_state_dict(get_peft_model(model, config))
    path = output / "adapter" / WEIGHTS_FILE
    adapter = load_file(path)
    whole = {name for name in adapter if "lora_" not in name}
    assert adapter.keys() == expected.keys()
    assert len(whole) == 2
    assert all(adapter[name].equal(expected[name]) for name in whole)
    # other values than the base's, so that whoever leaves them out is found; a tied head is the embedding
    noise = {name: torch.randn(adapter[name].shape) * 0.1 for name in sorted(whole)}
    changed = {name: adapter[name] + noise[min(whole) if tied else name] for name in whole}
    before, _ = logits_of_both(base if method == "loftq" else output, output, ranks)
    save_file(adapter | changed, path)
    ours, pefts = logits_of_both(base if method == "loftq" else output, output, ranks)
    assert reference.relative_difference(ours, pefts) < 1e-5
    assert reference.relative_difference(before, ours) > 1e-2


def test_scaling_is_taken_out_of_the_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(24, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    for iterations in (0, 8):
        lora_A, lora_B = low_rank_factors(matrix, 3, 0.25, iterations)
        assert (lora_A.shape, lora_B.shape) == ((3, 40), (24, 3))
        torch.testing.assert_close(0.25 * lora_B @ lora_A, matrix, rtol=1e-4, atol=1e-4)


def test_the_randomised_decomposition_repeats(base: Path, tmp_path: Path) -> None:
    first, second, other = (
        load_file(initialize(base, tmp_path / name, method="loftq", iterations=4, seed=seed) / "adapter" / WEIGHTS_FILE)
        for name, seed in (("first", 1), ("second", 1), ("other", 2))
    )
    assert all(second[name].equal(value) for name, value in first.items())
    assert not all(other[name].equal(value) for name, value in first.items())


@pytest.mark.parametrize("method", ["pissa", "loftq"])
def test_training_starts_from_it(tmp_path: Path, method: str) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    output = initialize(Path(inputs["model"]), tmp_path / "init", method=method, modules_to_save="embed_tokens")
    if method == "pissa":
        inputs["model"] = str(output)
    kept = {name: value for name, value in SETTINGS.items() if name != "lora_rank"}
    run_dir = tmp_path / "run"
    settings = {**kept, **inputs, "adapter": output, "max_steps": 2, "output_dir": run_dir}
    assert train(2, settings) == [0, 0], run_dir.with_suffix(".log").read_text()
    assert len(losses(run_dir)) == 2
    assert "names another base" not in run_dir.with_suffix(".log").read_text()
    config = json.loads((run_dir / "adapter" / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 8, ["embed_tokens"])


def test_an_adapter_on_another_base_is_told(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    output = initialize(Path(inputs["model"]), tmp_path / "init")
    kept = {name: value for name, value in SETTINGS.items() if name != "lora_rank"}
    settings = {**kept, **inputs, "adapter": output, "max_steps": 1, "output_dir": tmp_path / "run"}
    assert train(1, settings) == [0]
    assert f"warning: it names another base, {output}" in (tmp_path / "run.log").read_text()


def test_what_cannot_be_made_is_refused(base: Path, tmp_path: Path) -> None:
    output = initialize(base, tmp_path / "loftq", method="loftq")
    refused: list[tuple[type[FsdpQloraError], str, dict[str, Any]]] = [
        (ConfigError, "holds an adapter", {"method": "loftq", "output": output}),
        (ConfigError, "is not empty", {"output": output}),
        (ConfigError, "has rank 64 at most", {"lora_rank": 65, "output": tmp_path / "new"}),
    ]
    for kind, message, changes in refused:
        with pytest.raises(kind, match=message):
            initialize(base, changes.pop("output"), **changes)
    reference.load_base(base, NF4, torch.float32).save_pretrained(tmp_path / "quantised")
    with pytest.raises(WeightsError, match="is quantised already"):
        initialize(tmp_path / "quantised", tmp_path / "new")

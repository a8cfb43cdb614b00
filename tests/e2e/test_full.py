"""Full fine-tuning from the command line: trained, resumed, and the model it leaves used by everything else."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsdp_qlora.adapters import trained_step
from fsdp_qlora.build import BuiltModel, build_model
from fsdp_qlora.commands import evaluate, generate, quantize
from fsdp_qlora.commands.push import collect
from fsdp_qlora.config import EvaluateConfig, GenerateConfig, QuantizeConfig
from fsdp_qlora.distributed import process_group
from fsdp_qlora.errors import ModelError
from fsdp_qlora.plan.model_shape import model_shape
from fsdp_qlora.quant.adapt import QuantSettings
from tests.e2e.conftest import TEMPLATE
from tests.faults.faults import kill_after_step
from tests.faults.jobs import SETTINGS, ended, losses, make_inputs, state, train
from tests.faults.trials import printed
from tests.tiny import save_tiny

STEPS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    common = {name: value for name, value in SETTINGS.items() if not name.startswith("lora")}
    made = make_inputs(tmp_path_factory.mktemp("inputs"), vocab_size=321)  # no number of ranks divides it
    return {**common, **made, "train_type": "full", "max_steps": STEPS, "lr": 1e-3}


@pytest.fixture(scope="module")
def runs(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Uninterrupted runs by number of ranks, with the same sequences a step."""
    found = {}
    for world_size in (1, 2):
        found[world_size] = tmp_path_factory.mktemp("runs") / f"{world_size}"
        settings = {**inputs, **of_world(world_size), "output_dir": found[world_size]}
        assert train(world_size, settings) == [0] * world_size, printed(found[world_size])
    return found


def of_world(world_size: int) -> dict[str, Any]:
    return {"gradient_accumulation_steps": 4 // world_size}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def masters_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the parameters that a checkpoint of a run holds in the files of its ranks."""
    files = sorted((run / f"checkpoints/step-{step:06d}").glob("rank-*.safetensors"))
    parts = [part for part in map(load_file, files) if "model.norm.weight" in part]  # other ranks have replicas
    names = [name for name in parts[0] if name.endswith((".weight", ".bias"))]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def test_one_and_two_ranks_train_the_same_model(inputs: dict[str, Any], runs: dict[int, Path]) -> None:
    one, two = (weights_of(run / "model") for run in runs.values())
    base = weights_of(Path(inputs["model"]))
    assert one.keys() == two.keys() == base.keys()
    for name, value in base.items():
        assert one[name].dtype == value.dtype
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4)
        assert (one[name] - value).abs().max() > 1e-3, f"{name} was not trained"
    assert losses(runs[1]) == pytest.approx(losses(runs[2]), rel=1e-5)


def test_a_checkpoint_is_written_shard_by_shard(runs: dict[int, Path]) -> None:
    (folder,) = (runs[2] / "checkpoints").glob(f"step-{STEPS:06d}")
    parts = [load_file(folder / f"rank-{rank:05d}.safetensors") for rank in range(2)]
    for name, value in weights_of(runs[2] / "model").items():
        for suffix in ("", ".exp_avg", ".exp_avg_sq"):
            rows = [len(part[name + suffix]) for part in parts]
            assert sum(rows) == len(value)
            assert max(rows) == -(-len(value) // 2)
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, rtol=0, atol=0)
    assert not (folder / "adapter").exists()


def test_transformers_loads_the_model(inputs: dict[str, Any], runs: dict[int, Path]) -> None:
    """Its logits are those of the trained parameters, which the last checkpoint holds."""
    folder = runs[2] / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    masters = masters_of(runs[2], STEPS)
    expected = AutoModelForCausalLM.from_pretrained(inputs["model"])
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        before = expected(ids).logits
        for name, parameter in expected.named_parameters():
            parameter.copy_(masters[name])
        assert loaded(ids).logits.equal(expected(ids).logits)
        assert not torch.allclose(loaded(ids).logits, before, atol=0.1)
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    assert json.loads((folder / "run.json").read_text())["config"]["train_type"] == "full"


@pytest.mark.parametrize(
    "settings",
    [
        {"cpu_offload": "all", "activation_checkpointing": "full", "packing": True},
        {"sharding": "none", "loading": "broadcast", "precision": "bf16", "eval_split": 0.2},
        {"sharding": "hybrid", "keep_best": True, "eval_steps": 2, "eval_split": 0.2, "cpu_offload": "1"},
    ],
    ids=["offloaded", "replicated", "hybrid"],
)
def test_other_settings(inputs: dict[str, Any], tmp_path: Path, settings: dict[str, Any]) -> None:
    run = tmp_path / "run"
    assert train(2, {**inputs, **settings, "max_steps": 2, "output_dir": run}) == [0, 0], printed(run)
    base, trained = (weights_of(folder) for folder in (Path(inputs["model"]), run / "model"))
    assert all((trained[name] - value).abs().max() > 1e-4 for name, value in base.items())
    assert all(value.equal(trained[name]) for name, value in masters_of(run, 2).items())
    if "keep_best" in settings:
        assert trained_step(run / "best") == 2
        assert all(value.equal(trained[name]) for name, value in weights_of(run / "best").items())


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks(
    inputs: dict[str, Any], runs: dict[int, Path], tmp_path: Path, before: int, after: int
) -> None:
    run = tmp_path / "run"
    codes = train(before, {**inputs, **of_world(before), "output_dir": run}, functools.partial(kill_after_step, 3))
    assert codes == [-9] * before
    assert train(after, {**inputs, **of_world(after), "output_dir": run}) == [0] * after, printed(run)
    assert losses(run) == pytest.approx(losses(runs[1]), rel=1e-5)
    found, expected = weights_of(run / "model"), weights_of(runs[1] / "model")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_run_ends_with_the_same_bits(
    inputs: dict[str, Any], runs: dict[int, Path], tmp_path: Path, world_size: int
) -> None:
    settings = {**inputs, **of_world(world_size), "output_dir": tmp_path / "run"}
    codes = train(world_size, settings, functools.partial(kill_after_step, 3))
    assert codes == [-9] * world_size
    assert train(world_size, settings) == [0] * world_size, printed(tmp_path / "run")
    assert losses(tmp_path / "run") == losses(runs[world_size])
    assert state(tmp_path / "run", STEPS) == state(runs[world_size], STEPS)


def test_the_other_commands_take_the_run(inputs: dict[str, Any], runs: dict[int, Path]) -> None:
    run = runs[2]
    held: list[str] = []

    def build(*args: Any, **settings: Any) -> BuiltModel:
        built = build_model(*args, **settings)
        held.append(built.quant.quant_type)
        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "build_model", build)
        patch.setattr(generate, "build_model", build)
        rows = {"dataset": inputs["dataset"], "context_length": 64, "packing": False, "device": "cpu"}
        with process_group("full", 60, device="cpu") as ranks:
            trained, _ = evaluate.score(EvaluateConfig(model=str(run), **rows), ranks)
            before, _ = evaluate.score(EvaluateConfig(model=inputs["model"], **rows), ranks)
        generate.answer(GenerateConfig(model=str(run), prompt="What colour is coal?", max_new_tokens=2, device="cpu"))
    assert trained["eval_loss"] < before["eval_loss"] - 0.1
    assert held == ["float32", "nf4", "float32"], "what was trained in full is not quantised"

    files = collect(run, "someone/model").files
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files.keys()
    card = files["README.md"]
    assert isinstance(card, bytes)
    text = card.decode()
    assert "`base` with all parameters fine-tuned" in text
    assert "| train_type | `full` |" in text
    assert 'AutoModelForCausalLM.from_pretrained("someone/model")' in text
    assert "LoRA" not in text
    assert "lora_rank" not in text


def test_lora_goes_on_from_the_model(inputs: dict[str, Any], runs: dict[int, Path], tmp_path: Path) -> None:
    lora = {"train_type": "lora", "model": runs[2], "max_steps": 1, "output_dir": tmp_path / "run"}
    assert train(1, {**inputs, **lora}) == [0], printed(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((runs[2] / "model").resolve())


def test_what_cannot_be_trained_whole(inputs: dict[str, Any], tmp_path: Path) -> None:
    experts = save_tiny("qwen3_moe", tmp_path / "experts")
    quantized = tmp_path / "quantized"
    quantize.run(QuantizeConfig(model=inputs["model"], output_dir=str(quantized), device="cpu"))
    for folder, reason in ((experts, "mixture of experts"), (quantized, "weights of quantized are quantised")):
        with pytest.raises(ModelError, match=f"train_type full: .*{reason}.*--train_type lora"):
            model_shape(folder, QuantSettings("none"), None, torch.float32)


def test_a_folder_that_cannot_be_written_stops_all_ranks(inputs: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes = train(2, {**inputs, "max_steps": 1, "output_dir": run}, fail_to_write_the_model)
    assert codes == [1, 1]
    assert "model.partial: the checkpoint cannot be written (No space left on device)" in ended(run)["reason"]
    assert train(2, {**inputs, "max_steps": 1, "output_dir": run}) == [0, 0], "it goes on and saves the model"
    assert (run / "model" / "config.json").exists()


def fail_to_write_the_model(rank: int) -> None:
    from fsdp_qlora.weights import writer

    finish = writer._ShardFile.finish

    def full_disk(file: writer._ShardFile) -> Any:
        if "model.partial" in str(file.path):
            raise OSError(28, "No space left on device")
        return finish(file)

    writer._ShardFile.finish = full_disk

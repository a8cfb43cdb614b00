"""The command `plan`: the time it expects, what it prints, and the settings it refuses."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fsdp_qlora import cli, config
from fsdp_qlora.commands.plan import Rates, step_seconds
from fsdp_qlora.config import PlanConfig, TrainConfig
from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.models import hub
from fsdp_qlora.models.hub import resolve_config
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.plan.model_shape import model_shape
from fsdp_qlora.plan.planner import Run
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings

# --- time ---


def test_time_scales_with_its_rates_and_says_what_limits(shape_of) -> None:
    shape = shape_of("70b", 2)
    run = Run(1, 2048, MemorySettings(offload_blocks=80, checkpoint_blocks=80))
    usual = step_seconds(shape, run, Rates())
    assert usual.limit == "computation"
    assert usual.compute == pytest.approx(6 * 68.5e9 * 2048 / 100e12, rel=0.06)  # head, attention, LoRA: the rest
    assert usual.host == pytest.approx(2 * 17.65e9 / 20e9, rel=0.01)
    slow = step_seconds(shape, run, Rates(host_bandwidth=2))
    assert slow.seconds == slow.host == pytest.approx(10 * usual.host)
    assert slow.limit == "copies from the host"
    kept = replace(run, memory=MemorySettings())
    assert step_seconds(shape, kept, Rates()).compute < 0.72 * usual.compute
    alone = step_seconds(shape_of("70b"), run, Rates())
    assert alone.seconds == max(alone.compute, alone.host)
    assert alone.links == 0
    # FSDP brings a block whose activations are kept, in a world of one on the stream that computes
    keeping = step_seconds(shape_of("70b"), replace(run, memory=replace(run.memory, checkpoint_blocks=79)), Rates())
    assert keeping.seconds == keeping.compute + keeping.host


def test_few_ranks_exchange_hidden_states_and_more_ranks_the_head(shape_of) -> None:
    def of_more_tokens(num_shards: int) -> float:
        short, long = (
            step_seconds(shape_of("8b", num_shards), Run(1, tokens, local_ranks=16), Rates()).links
            for tokens in (1024, 2048)
        )
        return long - short

    assert of_more_tokens(2) == pytest.approx(2 * 1024 * 4096 * 2 / 10e9), "to the other rank, and gradients back"
    assert of_more_tokens(16) == 0


def test_time_between_machines(shape_of) -> None:
    run = Run(1, 2048, MemorySettings(checkpoint_blocks=80), local_ranks=2)
    full, hybrid = (step_seconds(shape_of("70b", shards), run, Rates(), num_nodes=2) for shards in (4, 2))
    lora = sum(block.lora for block in shape_of("70b", 2).blocks)
    assert hybrid.nodes == pytest.approx(lora / 1e9), "half of the gradients twice, at 1 GB/s"
    assert full.nodes > 20 * hybrid.nodes, "everything is gathered twice"
    assert full.limit == "traffic between machines"
    assert full.seconds == full.nodes
    assert step_seconds(shape_of("70b", 4), run, Rates()).nodes == 0


def test_time_without_sharding_ends_with_the_sum_of_gradients(shape_of) -> None:
    run, rates = Run(1, 2048, MemorySettings(checkpoint_blocks=32)), Rates(link_bandwidth=20, node_bandwidth=2)
    lora = sum(block.lora for block in shape_of("8b").blocks)
    alone = step_seconds(shape_of("8b"), run, rates)
    assert alone.exchange == 0
    for local_ranks, num_nodes, exchange in (
        (4, 1, 2 * lora * 3 / 4 / 20e9),
        (1, 2, 2 * lora / 2 / 2e9),
        (4, 2, 2 * lora / 2 / 2e9),
    ):
        found = step_seconds(shape_of("8b"), replace(run, local_ranks=local_ranks), rates, num_nodes)
        assert found.exchange == pytest.approx(exchange)
        assert found.seconds == alone.seconds + found.exchange
        assert found.links == found.nodes == 0
    # blocks that are not recomputed come from the host on the stream that computes, with several machines too
    kept = step_seconds(shape_of("8b"), replace(run, memory=MemorySettings(offload_blocks=32)), rates, num_nodes=2)
    assert kept.seconds == kept.compute + kept.host + kept.exchange
    slow = step_seconds(shape_of("8b"), run, Rates(node_bandwidth=0.01), num_nodes=2)
    assert slow.limit == "the sums of gradients"


def test_every_row_of_a_trained_vocabulary_crosses_between_machines(llama_folders: dict[str, Path]) -> None:
    run, shapes = Run(1, 2048, local_ranks=2), []
    for modules in ((), ("embed_tokens",)):
        lora = LoraSettings(16, 16.0, modules_to_save=modules)
        shapes.append(model_shape(llama_folders["8b"], QuantSettings(num_shards=2), lora, torch.bfloat16))
    frozen, trained = (step_seconds(shape, run, Rates(), num_nodes=2) for shape in shapes)
    assert trained.nodes - frozen.nodes == pytest.approx(2 * 4 * 128256 * 4096 / 2 / 1e9)


def test_sums_of_full_fine_tuning_overlap(llama_folders: dict[str, Path]) -> None:
    shape = model_shape(llama_folders["8b"], QuantSettings("none"), None, torch.bfloat16)
    weights = sum(block.lora for block in shape.blocks) + shape.trained_rows[0]
    found = step_seconds(shape, Run(1, 2048, local_ranks=2), Rates())
    assert found.exchange == 0
    assert found.seconds == found.links == pytest.approx(2 * weights / 2 / 10e9)


# --- the command ---


def plan(*arguments: str) -> None:
    cli.main(["plan", *arguments])


def test_plan_prints_table_choice_limits_time_and_verdict(
    llama_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    settings = ["--gpus=2", "--gpu_memory=48,24", "--cpu_memory=64", "--lora_rank=16", f"--plot={picture}"]
    plan("--model", str(llama_folders["70b"]), *settings)
    out = capsys.readouterr().out
    for part in (
        "LoRA rank 16",
        "4-bit weights",
        "available                         24.00             64.00",
        "checkpointed: 80 of 80 blocks; offloaded: ",
        "longest context that fits at batch size 1: ",
        "largest batch that fits at 2048 tokens: ",
        "time of one micro-batch: ",
        "100 TFLOP/s",
        "verdict: fits, with ",
    ):
        assert part in out
    assert all(len(line) <= 120 for line in out.splitlines())
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plan_knows_the_methods_of_training(llama_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    plan("--model", str(llama_folders["8b"]), "--gpu_memory=80", "--lora_rank=16", "--use_dora", "--quant_type=none")
    out = capsys.readouterr().out
    for part in ("DoRA rank 16", "16-bit weights                    13.00", "verdict: fits, with "):
        assert part in out


def test_plan_of_a_hopeless_run_ends_with_2_and_the_remedy(
    llama_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        plan(
            "--model",
            str(llama_folders["8b"]),
            "--gpu_memory=10",
            "--cpu_offload=none",
            "--activation_checkpointing=none",
        )
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert "verdict: does not fit; short of " in out
    assert "error: does not fit: 1 x 2048 tokens take " in err
    assert "of 10.0 GiB on a GPU" in err


def test_plan_refuses_a_context_that_train_refuses(
    llama_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        plan("--model", str(llama_folders["8b"]), "--context_length=200000", "--gpu_memory=80", "--cpu_memory=512")
    assert caught.value.code == 2
    assert "error: context_length 200000 is longer than the model's 131072 positions" in capsys.readouterr().err


def test_plan_says_where_a_copy_for_each_gpu_is_faster(
    llama_folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plan("--model", str(llama_folders["8b"]), "--gpus=2", "--gpu_memory=80")
    assert "faster: --sharding none" in capsys.readouterr().out


@pytest.mark.parametrize(("bandwidth", "is_faster"), [("1", False), ("100", True)])
def test_a_copy_for_each_gpu_is_not_advised_over_slow_links_between_machines(
    llama_folders: dict[str, Path], capsys: pytest.CaptureFixture[str], bandwidth: str, is_faster: bool
) -> None:
    """Gradients cross after backward, where those of sharded ranks cross while it goes on."""
    settings = ["--gpus=2", "--nodes=2", "--gpu_memory=80", "--sharding=hybrid", f"--node_bandwidth={bandwidth}"]
    plan("--model", str(llama_folders["8b"]), *settings, "--link_bandwidth=4")
    assert ("faster: --sharding none" in capsys.readouterr().out) == is_faster
    plan("--model", str(llama_folders["8b"]), *settings, "--sharding=none")
    assert "  sums of gradients 0." in capsys.readouterr().out


def test_plot_without_matplotlib_names_the_remedy(
    llama_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit):
        plan("--model", str(llama_folders["8b"]), "--plot=plan.png")
    assert "pip install matplotlib" in capsys.readouterr().err


def test_plan_needs_no_weights_but_a_config(llama_folders: dict[str, Path], tmp_path: Path) -> None:
    assert resolve_config(str(llama_folders["8b"])) == llama_folders["8b"]
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_config(str(tmp_path))


def test_of_a_hub_model_only_the_config_is_fetched(
    llama_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def download(*arguments: object) -> Path:
        asked.append(arguments)
        return llama_folders["70b"]

    monkeypatch.setattr(hub, "_download", download)
    assert resolve_config("llama-70b", "main") == llama_folders["70b"]
    assert asked == [("meta-llama/Llama-3.3-70B-Instruct", "main", ("config.json",))]
    with pytest.raises(ModelError, match="neither a local folder, an alias nor a hub id"):
        resolve_config("llama-71b")


@pytest.mark.parametrize(
    ("cls", "overrides", "text"),
    [
        (PlanConfig, {"gpus": "3", "gpu_memory": "24,24"}, "2 sizes for --gpus=3"),
        (PlanConfig, {"gpu_memory": "24,x"}, "a number of GiB above 0"),
        (PlanConfig, {"gpu_memory": "0"}, "a number of GiB above 0"),
        (TrainConfig, {"cpu_offload": "some"}, "must be auto, none, all or a number of blocks"),
        (TrainConfig, {"activation_checkpointing": "-1"}, "must be auto, none, full or a number of blocks"),
        (TrainConfig, {"activation_offload": "true", "activation_checkpointing": "none"}, "checkpointed blocks"),
        (TrainConfig, {"cpu_memory": "0"}, "must be above 0"),
        (TrainConfig, {"sharding": "none", "cpu_offload": "3"}, "use --sharding=full"),
    ],
)
def test_settings_of_memory_are_checked(cls: type, overrides: dict[str, str], text: str) -> None:
    required = {"model": "m"} if cls is PlanConfig else {}
    with pytest.raises(ConfigError) as caught:
        config.parse({**required, **overrides}, None, cls)
    assert text in str(caught.value)
    config.parse(
        {**required, "cpu_offload": "12", "gpu_memory": "24, 11.5", "gpus": "2"} if required else {}, None, cls
    )

"""The planner: exact counts, estimates that move the right way, choices, refusals and the command."""

from __future__ import annotations

import builtins
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, LlamaConfig

from fsdp_qlora import cli, config
from fsdp_qlora.build import build_model
from fsdp_qlora.commands import train as finetune
from fsdp_qlora.commands.plan import Rates, step_seconds
from fsdp_qlora.config import PlanConfig, TrainConfig
from fsdp_qlora.distributed import process_group
from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.models import hub
from fsdp_qlora.models.hub import resolve_config
from fsdp_qlora.models.vocabulary import ShardedVocabulary
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.plan.choice import (
    Budget,
    Request,
    candidates,
    choose,
    choose_on_cpu,
    largest_batch,
    longest_context,
)
from fsdp_qlora.plan.model_shape import ModelShape, model_shape
from fsdp_qlora.plan.planner import SLACK, Run, estimate
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from tests.ranks import run_ranks
from tests.tiny import COMMON, FAMILIES, save_tiny

GIB = 2**30
LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA3
)
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA3
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a config.json and nothing else."""
    base = tmp_path_factory.mktemp("configs")
    for name, model in (("70b", LLAMA_70B), ("8b", LLAMA_8B)):
        model.save_pretrained(base / name)
    return {"70b": base / "70b", "8b": base / "8b"}


@pytest.fixture(scope="module")
def shape_of(folders: dict[str, Path]):
    """Measure a model once: shape_of(name, num_shards, rank of LoRA)."""

    @functools.cache
    def measure(name: str, num_shards: int = 1, rank: int = 16) -> ModelShape:
        quant, lora = QuantSettings(num_shards=num_shards), LoraSettings(rank, 16.0)
        return model_shape(folders[name], quant, lora, torch.bfloat16)

    return measure


def budget(gpu: float, host: float) -> Budget:
    return Budget(int(gpu * GIB), int(host * GIB))


# --- counts ---


def counted(folder: Path, lora: LoraSettings | None, quant_type: str) -> tuple[int, int, int, int, int]:
    """Load a model and return, for this rank: its place, bytes of 4-bit, frozen and trained parameters, and vocabulary."""
    with process_group("full", 60, device="cpu") as ranks:
        quant = QuantSettings(quant_type, num_shards=ranks.num_shards)
        built = build_model(folder, ranks, quant, lora, torch.bfloat16, full=lora is None)
        sums = {"packed": 0, "lora": 0, "frozen": 0, "vocabulary": 0}
        vocabularies = {module.weight for module in built.root.modules() if isinstance(module, ShardedVocabulary)}
        for name, parameter in built.root.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            kind = "packed" if name.endswith(".packed") else "lora" if parameter.requires_grad else "frozen"
            sums["vocabulary" if parameter in vocabularies else kind] += local.numel() * local.itemsize
        return ranks.shard, sums["packed"], sums["frozen"], sums["lora"], sums["vocabulary"]


def test_trained_vocabulary_is_counted(folders: dict[str, Path]) -> None:
    """In float32: value, gradient and two moments of every row, and the head's whole gradient where it is made."""
    rows = 4 * LLAMA_8B.vocab_size * LLAMA_8B.hidden_size
    run = Run(1, 2048, MemorySettings(checkpoint_blocks=32), accumulates=False)
    found = {}
    for modules in ((), ("embed_tokens",), ("lm_head",)):
        lora = LoraSettings(16, 16.0, modules_to_save=modules)
        shape = model_shape(folders["8b"], QuantSettings(num_shards=2), lora, torch.bfloat16)
        found[modules] = estimate(shape, run)
    frozen, embedding, head = found.values()
    for trained in (embedding, head):
        assert trained.gpu["optimizer state"] - frozen.gpu["optimizer state"] == 2 * rows // 2
        assert trained.gpu["embedding and head"] - frozen.gpu["embedding and head"] == rows // 4  # was bf16
        assert trained.phases["optimizer"] - frozen.phases["optimizer"] == pytest.approx(
            (2.5 + 1.15) * rows / 2, rel=1e-3
        )
        saved = trained.host["checkpoint being saved"] - frozen.host["checkpoint being saved"]
        assert saved == rows + 2 * rows // 2
    assert head.phases["loss"] - frozen.phases["loss"] > 1.5 * rows
    assert "backward of the embedding" in embedding.phases
    assert "backward of the embedding" not in head.phases


@pytest.mark.parametrize(
    ("family", "world_size", "settings", "quant_type"),
    [
        ("llama", 1, {}, "nf4"),
        ("llama", 2, {}, "nf4"),
        ("llama", 2, {"modules_to_save": ("lm_head",)}, "nf4"),
        ("llama", 2, {"modules_to_save": ("embed_tokens", "lm_head")}, "nf4"),
        ("llama", 2, {"use_dora": True}, "none"),
        ("qwen3", 2, {}, "nf4"),
        ("qwen3", 2, {"modules_to_save": ("embed_tokens",)}, "nf4"),
        ("qwen3_moe", 1, {}, "nf4"),
        ("qwen3_moe", 2, {"use_dora": True}, "fp4"),
    ],
)
def test_shape_counts_what_a_loaded_rank_holds(
    family: str, world_size: int, settings: dict[str, Any], quant_type: str, tmp_path: Path
) -> None:
    folder = save_tiny(family, tmp_path / "model", vocab_size=321)
    # 3 rows of lora_A and 321 of the vocabulary: the ranks' parts differ
    lora = LoraSettings(3, 16.0, **settings)
    for shard, *bytes_held in run_ranks(counted, world_size, folder, lora, quant_type):
        shape = model_shape(folder, QuantSettings(quant_type, num_shards=world_size), lora, torch.bfloat16, shard)
        sums = [sum(getattr(block, f"{kind}_part") for block in shape.blocks) for kind in ("packed", "frozen", "lora")]
        sums[1] += shape.norm_part
        assert [*sums, shape.vocabulary_part] == bytes_held


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_full_fine_tuning_counts_what_a_loaded_rank_holds(family: str, tmp_path: Path) -> None:
    """Each rank holds its rows in float32, with a gradient and two moments; a block is gathered in the compute dtype."""
    folder = save_tiny(family, tmp_path / "model", vocab_size=321)
    for shard, packed, frozen, trained, vocabulary in run_ranks(counted, 2, folder, None, "none"):
        shape = model_shape(folder, QuantSettings("none", num_shards=2), None, torch.bfloat16, shard)
        assert (packed, frozen) == (0, 0)
        assert sum(block.lora_part for block in shape.blocks) + shape.norm_part == trained
        assert shape.vocabulary_part == shape.trained_rows[1] == vocabulary
        assert shape.blocks[0].gathered == shape.blocks[0].lora // 2
        wanted = estimate(shape, Run(1, 128)).gpu
        assert wanted["float32 weights"] + wanted["embedding and head"] == trained + vocabulary
        assert wanted["optimizer state"] == 2 * (trained + vocabulary)
        offloaded = estimate(shape, Run(1, 128, MemorySettings(len(shape.blocks), True, True)))
        assert offloaded.host["optimizer state"] == 2 * (trained - shape.norm_part + vocabulary)
        assert offloaded.gpu["float32 weights"] == shape.norm_part


def test_full_fine_tuning_is_refused_where_it_cannot_fit(folders: dict[str, Path]) -> None:
    """8B parameters: 32 GB each of weights, gradients and both moments."""
    shape = model_shape(folders["8b"], QuantSettings("none", num_shards=2), None, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"use a machine with 1.. GiB of host memory"):
        choose(shape, budget(24, 64), Request(Run(1, 2048, local_ranks=2)))
    choice = choose(shape, budget(24, 256), Request(Run(1, 2048, local_ranks=2)))
    assert choice.memory.offload_lora
    assert choice.memory.offload_blocks > 0


def test_fp8_halves_the_dequantised_matrix_and_copies_activations(folders: dict[str, Path]) -> None:
    run = Run(1, 2048, MemorySettings(checkpoint_blocks=32))
    plain, fp8 = (
        estimate(model_shape(folders["8b"], QuantSettings(fp8=fp8), LoraSettings(16, 16.0), torch.bfloat16), run)
        for fp8 in (False, True)
    )
    # in the phase of the peak, the last block's backward
    assert plain.gpu["dequantised matrix"] == 2 * fp8.gpu["dequantised matrix"] == 2 * 14336 * 4096
    assert "activations in fp8" not in plain.gpu
    assert fp8.gpu["activations in fp8"] == 2048 * 14336


def test_fp8_leaves_experts_as_they_are(tmp_path: Path) -> None:
    settings = {**COMMON, **FAMILIES["qwen3_moe"], "moe_intermediate_size": 64}
    AutoConfig.for_model("qwen3_moe", **settings).save_pretrained(tmp_path)
    shape = model_shape(tmp_path, QuantSettings(fp8=True), LoraSettings(4, 16.0), torch.bfloat16)
    assert shape.largest_matrix == 2 * 64 * 64
    assert shape.fp8_width == 4 * 24  # of the attention


NUM_NORMS = {"gemma2": 4, "gemma3_text": 4, "glm4": 4, "cohere": 1, "cohere_qk_norm": 1, "cohere2": 1}
"""Norms of a block over hidden states, where there are not two."""

QUERY_KEY_NORMS = {"qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3", "cohere_qk_norm", "exaone4"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_planned_from_its_config(family: str, tmp_path: Path) -> None:
    settings = {**COMMON, **FAMILIES[family]}
    AutoConfig.for_model(settings.pop("model_type", family), **settings).save_pretrained(tmp_path)
    shape = model_shape(tmp_path, QuantSettings(), LoraSettings(4, 16.0), torch.bfloat16)
    widths = shape.widths
    assert (widths.hidden, widths.intermediate) == (64, {"qwen3_moe": 2 * 40, "mixtral": 2 * 104}.get(family, 104))
    query_key = widths.query + widths.key_value if family in QUERY_KEY_NORMS else 0
    assert widths.norm == NUM_NORMS.get(family, 2) * 64 + query_key
    assert shape.softcapped == ((True, True) if family == "gemma2" else (False, False))
    assert estimate(shape, Run(1, 128)).gpu_bytes > 0


def test_a_quantised_checkpoint_keeps_its_own_statistics(tmp_path: Path) -> None:
    sizes = []
    for double_quant in (True, False):
        folder = tmp_path / str(double_quant)
        LlamaConfig(**COMMON).save_pretrained(folder)
        content = json.loads((folder / "config.json").read_text())
        content["quantization_config"] = {"quant_method": "bitsandbytes", "bnb_4bit_use_double_quant": double_quant}
        (folder / "config.json").write_text(json.dumps(content))
        shape, asked = (
            model_shape(folder, QuantSettings(quant_type), LoraSettings(4, 16.0), torch.bfloat16)
            for quant_type in ("nf4", "none")
        )
        assert asked == shape
        sizes.append(shape.blocks[0].packed)
    assert sizes[0] < sizes[1]


def test_a_base_in_16_bits_is_read_as_it_is_held(folders: dict[str, Path]) -> None:
    """Two bytes a weight, and no second copy of a matrix while it is used."""
    lora, found = LoraSettings(16, 16.0), []
    for quant_type in ("nf4", "none"):
        shape = model_shape(folders["8b"], QuantSettings(quant_type), lora, torch.bfloat16)
        found.append(estimate(shape, Run(1, 2048, MemorySettings(checkpoint_blocks=32))))
        assert (shape.largest_matrix > 0) == (quant_type == "nf4")
    (nf4, dense), weights = found, sum(block.num_weights for block in shape.blocks)
    assert dense.gpu["16-bit weights"] == 2 * weights + sum(b.frozen_part for b in shape.blocks) + 2 * shape.norm_part
    assert dense.gpu["16-bit weights"] > 3.8 * nf4.gpu["4-bit weights"]


def test_70b_has_the_size_that_is_known(shape_of) -> None:
    shape = shape_of("70b", 2)
    weights = sum(block.num_weights for block in shape.blocks)
    assert weights + 2 * shape.vocabulary_rows * 8192 == pytest.approx(70.55e9, rel=1e-3)
    assert sum(block.packed_part for block in shape.blocks) / GIB == pytest.approx(16.44, abs=0.02)


# --- estimates ---


def test_offloading_moves_bytes_from_the_gpu_to_the_host(shape_of) -> None:
    shape = shape_of("70b", 2)
    start = MemorySettings(checkpoint_blocks=80)
    steps = [start, *(replace(start, offload_blocks=number) for number in (20, 60, 80))]
    steps.append(replace(steps[-1], offload_vocabulary=True))
    steps.append(replace(steps[-1], offload_activations=True))
    steps.append(replace(steps[-1], offload_lora=True))
    found = [estimate(shape, Run(2, 4096, memory, local_ranks=2)) for memory in steps]
    gpu, host = [one.gpu_bytes for one in found], [one.host_bytes for one in found]
    assert gpu == sorted(gpu, reverse=True)
    assert host == sorted(host)
    assert len(set(gpu)) == len(set(host)) == len(steps)
    # both ranks' halves of the 4-bit base lie on the host
    assert found[3].host["4-bit weights"] == 2 * sum(block.packed_part for block in shape.blocks)


def test_more_tokens_and_kept_blocks_need_more(shape_of) -> None:
    shape = shape_of("8b")
    runs = [Run(1, context, MemorySettings(checkpoint_blocks=32)) for context in (512, 2048, 8192)]
    runs += [Run(2, 8192, MemorySettings(checkpoint_blocks=count)) for count in (32, 16, 1)]
    sizes = [estimate(shape, run).gpu_bytes for run in runs]
    assert sizes == sorted(set(sizes))


def test_estimate_is_the_largest_phase_and_not_the_sum_of_all(shape_of) -> None:
    found = estimate(shape_of("8b"), Run(4, 2048, MemorySettings(checkpoint_blocks=32)))
    assert found.gpu_bytes == found.phases[found.phase] == max(found.phases.values())
    assert found.phase == "backward of the last block"
    assert "logits" not in found.gpu
    assert found.phases["backward of the first block"] < found.gpu_bytes


def test_a_head_that_is_not_whole_on_the_gpu_is_gathered_for_the_loss(shape_of) -> None:
    memory = MemorySettings(offload_blocks=32, checkpoint_blocks=32)
    found = estimate(shape_of("8b", 2), Run(1, 64, memory))
    assert (found.phase, found.gpu["gathered head"]) == ("loss", 128256 * 4096 * 2)
    # alone and on the GPU it is whole; offloaded, embedding and head leave and the head comes back for a while
    kept, away = (
        estimate(shape_of("8b"), Run(1, 64, replace(memory, offload_vocabulary=offload))) for offload in (False, True)
    )
    assert kept.phases["loss"] - away.phases["loss"] == pytest.approx((1 - SLACK) * 128256 * 4096 * 2)
    assert kept.phases["forward"] - away.phases["forward"] == 2 * 128256 * 4096 * 2


def test_gradients_of_an_earlier_micro_batch_are_counted(shape_of) -> None:
    first, later = (estimate(shape_of("8b"), Run(4, 2048, accumulates=again)) for again in (False, True))
    lora = sum(block.lora for block in shape_of("8b").blocks)
    assert later.gpu_bytes - first.gpu_bytes == pytest.approx((1 + SLACK) * lora, rel=1e-3)


# --- choices ---


def test_70b_fits_two_24_gb_cards_and_64_gb_of_ram(shape_of) -> None:
    shape, limits = shape_of("70b", 2), budget(24, 64)
    request = Request(Run(1, 2048, local_ranks=2))
    choice = choose(shape, limits, request)
    assert choice.fits
    assert choice.memory.checkpoint_blocks == 80  # before any block is offloaded
    assert 0 < choice.memory.offload_blocks < 80
    assert not choice.memory.offload_lora
    fewer = replace(choice.memory, offload_blocks=choice.memory.offload_blocks - 1)
    assert not limits.holds(estimate(shape, replace(request.run, memory=fewer)))
    assert longest_context(shape, limits, request) >= 8192


def test_8b_on_one_80_gb_card_keeps_everything(shape_of) -> None:
    choice = choose(shape_of("8b"), budget(80, 64), Request(Run(1, 2048)))
    assert choice.memory == MemorySettings()


def test_as_few_blocks_are_checkpointed_as_the_card_needs(shape_of) -> None:
    shape, limits, request = shape_of("8b"), budget(24, 64), Request(Run(2, 2048))
    memory = choose(shape, limits, request).memory
    assert 0 < memory.checkpoint_blocks < 32
    assert memory.offload_blocks == 0
    fewer = replace(memory, checkpoint_blocks=memory.checkpoint_blocks - 1)
    assert not limits.holds(estimate(shape, replace(request.run, memory=fewer)))


def test_a_save_copies_the_adapter_once_and_the_moments_of_every_rank(shape_of) -> None:
    shape = shape_of("8b", num_shards=2)
    host = estimate(shape, Run(1, 2048, local_ranks=2)).host
    trained = sum(block.lora for block in shape.blocks)
    assert host["checkpoint being saved"] == trained + 2 * trained


def test_hidden_states_go_to_the_host_for_the_longest_contexts(shape_of) -> None:
    memory = choose(shape_of("8b"), budget(24, 64), Request(Run(1, 75_000, compiled=True))).memory
    assert memory.offload_activations
    assert memory.checkpoint_blocks == 32


def test_offload_needs_shards(shape_of) -> None:
    for memory in candidates(shape_of("8b"), Request(Run(1, 2048), sharded=False)):
        assert memory.offload_blocks == 0


@pytest.mark.parametrize(
    ("cpu_offload", "checkpointing", "memory"),
    [
        ("all", "full", MemorySettings(32, True, True, 32)),
        ("none", "none", MemorySettings()),
        ("7", "5", MemorySettings(offload_blocks=7, checkpoint_blocks=5)),
    ],
)
def test_explicit_settings_are_honoured(shape_of, cpu_offload: str, checkpointing: str, memory: MemorySettings) -> None:
    request = Request(Run(1, 2048), cpu_offload, checkpointing)
    assert choose(shape_of("8b"), budget(80, 64), request).memory == memory
    tight = choose(shape_of("8b"), budget(1, 64), request)
    assert (tight.memory, tight.fits) == (memory, False)


@pytest.mark.parametrize(
    ("model", "shards", "limits", "request_", "parts"),
    [
        # more than the host holds, although everything was asked for explicitly
        (
            "70b",
            2,
            (24, 20),
            Request(Run(1, 2048), "all", "full"),
            ["of 20.0 GiB of host memory", "--cpu_offload auto"],
        ),
        ("8b", 1, (7, 64), Request(Run(1, 2048), "none"), ["of 7.0 GiB on a GPU", "use --cpu_offload auto"]),
        ("8b", 1, (12, 64), Request(Run(1, 4096), "auto", "none"), ["use --activation_checkpointing auto"]),
        ("70b", 2, (24, 64), Request(Run(64, 2048)), ["64 x 2048 tokens", "use --batch_size "]),
        ("70b", 2, (24, 64), Request(Run(1, 131072)), ["80 of 80 blocks", "--context_length "]),
        ("70b", 2, (12, 10), Request(Run(1, 2048)), ["of 10.0 GiB of host memory", "use a machine with "]),
        ("70b", 1, (24, 64), Request(Run(1, 2048), sharded=False), ["use --sharding full"]),
        ("8b", 1, (1, 64), Request(Run(1, 2048)), ["of 1.0 GiB on a GPU", "use more or larger GPUs"]),
    ],
)
def test_a_hopeless_run_is_refused_with_numbers_and_a_remedy(
    shape_of, model: str, shards: int, limits: tuple[float, float], request_: Request, parts: list[str]
) -> None:
    request = replace(request_, run=replace(request_.run, local_ranks=shards))
    with pytest.raises(ConfigError) as caught:
        choose(shape_of(model, shards), budget(*limits), request)
    message = str(caught.value)
    assert message.startswith("does not fit: ")
    for part in parts:
        assert part in message


def test_the_remedy_of_a_refusal_works(shape_of) -> None:
    shape, limits = shape_of("70b", 2), budget(24, 64)
    request = Request(Run(64, 2048, local_ranks=2))
    size = largest_batch(shape, limits, request)
    assert choose(shape, limits, replace(request, run=replace(request.run, batch_size=size))).fits
    with pytest.raises(ConfigError, match=f"use --batch_size {size}$"):
        choose(shape, limits, request)


def test_more_blocks_than_the_model_has(shape_of) -> None:
    with pytest.raises(ConfigError, match="--cpu_offload=33: the model has 32 blocks; use at most 32, or all"):
        choose(shape_of("8b"), budget(80, 64), Request(Run(1, 64), cpu_offload="33"))


@pytest.mark.parametrize(("host", "blocks"), [(200, 0), (8, 32)])
def test_cpu_ranks_checkpoint_only_if_memory_is_short(shape_of, host: float, blocks: int) -> None:
    memory = choose_on_cpu(shape_of("8b"), budget(0, host), Request(Run(1, 2048)))
    assert memory == MemorySettings(checkpoint_blocks=blocks)
    asked = Request(Run(1, 2048), "all", "none")
    assert choose_on_cpu(shape_of("8b"), budget(0, host), asked) == MemorySettings(32, True, True)


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


def test_time_between_machines(shape_of) -> None:
    run = Run(1, 2048, MemorySettings(checkpoint_blocks=80), local_ranks=2)
    full, hybrid = (step_seconds(shape_of("70b", shards), run, Rates(), num_nodes=2) for shards in (4, 2))
    lora = sum(block.lora for block in shape_of("70b", 2).blocks)
    assert hybrid.nodes == pytest.approx(lora / 1e9), "half of the gradients twice, at 1 GB/s"
    assert full.nodes > 20 * hybrid.nodes, "everything is gathered twice"
    assert full.limit == "traffic between machines"
    assert full.seconds == full.nodes
    assert step_seconds(shape_of("70b", 4), run, Rates()).nodes == 0


# --- the command ---


def plan(*arguments: str) -> None:
    cli.main(["plan", *arguments])


def test_plan_prints_table_choice_limits_time_and_verdict(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    settings = ["--gpus=2", "--gpu_memory=48,24", "--cpu_memory=64", "--lora_rank=16", f"--plot={picture}"]
    plan("--model", str(folders["70b"]), *settings)
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


def test_plan_knows_the_methods_of_training(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    plan("--model", str(folders["8b"]), "--gpu_memory=80", "--lora_rank=16", "--use_dora", "--quant_type=none")
    out = capsys.readouterr().out
    for part in ("DoRA rank 16", "16-bit weights                    13.00", "verdict: fits, with "):
        assert part in out


def test_plan_of_a_hopeless_run_ends_with_2_and_the_remedy(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        plan("--model", str(folders["8b"]), "--gpu_memory=10", "--cpu_offload=none", "--activation_checkpointing=none")
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert "verdict: does not fit; short of " in out
    assert "error: does not fit: 1 x 2048 tokens need at least " in err
    assert "of 10.0 GiB on a GPU" in err


def test_plan_says_where_a_copy_for_each_gpu_is_faster(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plan("--model", str(folders["8b"]), "--gpus=2", "--gpu_memory=80")
    assert "faster: --sharding none" in capsys.readouterr().out


def test_plot_without_matplotlib_names_the_remedy(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SystemExit):
        plan("--model", str(folders["8b"]), "--plot=plan.png")
    assert "pip install matplotlib" in capsys.readouterr().err


def test_plan_needs_no_weights_but_a_config(folders: dict[str, Path], tmp_path: Path) -> None:
    assert resolve_config(str(folders["8b"])) == folders["8b"]
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_config(str(tmp_path))


def test_of_a_hub_model_only_the_config_is_fetched(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def download(*arguments: object) -> Path:
        asked.append(arguments)
        return folders["70b"]

    monkeypatch.setattr(hub, "_download", download)
    assert resolve_config("llama-70b", "main") == folders["70b"]
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


# --- train ---


def resolved(folder: Path, gpu_memory: tuple[str, ...], host_gib: tuple[float, ...]) -> MemorySettings | str:
    """Resolve the autos as a training run on CUDA would, with other free memory on each rank."""
    with process_group("full", 60, device="cpu") as ranks:
        lora = LoraSettings(16, 16.0)
        settings = TrainConfig(
            gpu_memory=",".join(gpu_memory), cpu_memory=host_gib[ranks.rank], gradient_accumulation_steps=1
        )
        on_cuda = replace(ranks, device=torch.device("cuda"))
        try:
            return finetune._memory_settings(settings, on_cuda, folder, lora)
        except ConfigError as error:
            return str(error)


def test_autos_are_resolved_alike_on_all_ranks_by_the_smallest(folders: dict[str, Path]) -> None:
    first, second = run_ranks(resolved, 2, folders["8b"], ("80", "5.5"), (64.0, 32.0))
    assert first == second
    assert isinstance(first, MemorySettings)
    assert first.checkpoint_blocks == 32
    assert first.offload_blocks > 0


def test_a_hopeless_training_run_is_refused_on_all_ranks(folders: dict[str, Path]) -> None:
    first, second = run_ranks(resolved, 2, folders["8b"], ("80", "6"), (64.0, 3.1))
    assert first == second
    assert isinstance(first, str)
    assert "of 3.1 GiB of host memory" in first


def test_a_wrong_number_of_sizes_is_refused(folders: dict[str, Path]) -> None:
    (message,) = run_ranks(resolved, 1, folders["8b"], ("80", "6"), (64.0,))
    assert "2 sizes for 1 ranks; give one, or one per rank" in message

"""The memory model: exact counts, and estimates that move the right way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, LlamaConfig

from fsdp_qlora.build import build_model
from fsdp_qlora.chunked_mlp import ChunkedMLP
from fsdp_qlora.distributed import process_group
from fsdp_qlora.models.vocabulary import ShardedVocabulary
from fsdp_qlora.optim import BUCKET_BYTES
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.plan.model_shape import model_shape
from fsdp_qlora.plan.planner import SLACK, Run, estimate
from fsdp_qlora.quant import experts
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from tests.ranks import run_ranks
from tests.tiny import COMMON, FAMILIES, save_tiny

GIB = 2**30


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


def test_trained_vocabulary_is_counted(llama_folders: dict[str, Path]) -> None:
    """In float32: value, gradient and two moments of every row, and the head's whole gradient where it is made."""
    rows = 4 * 128256 * 4096
    run = Run(1, 2048, MemorySettings(checkpoint_blocks=32), accumulates=False)
    found = {}
    for modules in ((), ("embed_tokens",), ("lm_head",)):
        lora = LoraSettings(16, 16.0, modules_to_save=modules)
        shape = model_shape(llama_folders["8b"], QuantSettings(num_shards=2), lora, torch.bfloat16)
        found[modules] = estimate(shape, run)
    frozen, embedding, head = found.values()
    for trained in (embedding, head):
        assert trained.gpu["optimizer state"] - frozen.gpu["optimizer state"] == 2 * rows // 2
        assert trained.gpu["embedding and head"] - frozen.gpu["embedding and head"] == rows // 4  # was bf16
        more = trained.phases["optimizer"] - frozen.phases["optimizer"]
        assert more == pytest.approx((2.5 + 1 + SLACK) * rows / 2, rel=1e-3)
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
        ("qwen3_moe", 2, {"target_parameters": ("experts",)}, "nf4"),
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


def test_fp8_halves_the_dequantised_matrix_and_copies_activations(llama_folders: dict[str, Path]) -> None:
    run = Run(1, 2048, MemorySettings(checkpoint_blocks=32))
    plain, fp8 = (
        estimate(model_shape(llama_folders["8b"], QuantSettings(fp8=fp8), LoraSettings(16, 16.0), torch.bfloat16), run)
        for fp8 in (False, True)
    )
    # in the phase of the peak, the last block's backward
    assert plain.gpu["dequantised matrix"] == 2 * fp8.gpu["dequantised matrix"] == 2 * 14336 * 4096
    assert "activations in fp8" not in plain.gpu
    assert fp8.gpu["activations in fp8"] == 2048 * 14336


def test_fp8_leaves_experts_as_they_are(tmp_path: Path) -> None:
    settings = {**COMMON, **FAMILIES["qwen3_moe"], "moe_intermediate_size": 64, "head_dim": 32}
    AutoConfig.for_model("qwen3_moe", **settings).save_pretrained(tmp_path)
    shape = model_shape(tmp_path, QuantSettings(fp8=True), LoraSettings(4, 16.0), torch.bfloat16)
    assert shape.largest_matrix == FAMILIES["qwen3_moe"]["num_experts"] * 2 * 64 * 64
    assert shape.fp8_width == 4 * 32  # of the attention


@pytest.mark.parametrize(("group_bytes", "together"), [(1, 1), (4 * 2 * 96 * 64 + 1, 4), (2**30, 6)])
def test_experts_that_are_dequantised_together_are_counted(
    group_bytes: int, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "GROUP_BYTES", group_bytes)
    settings = {**COMMON, **FAMILIES["qwen3_moe"], "moe_intermediate_size": 96, "num_experts": 6}
    AutoConfig.for_model("qwen3_moe", **settings).save_pretrained(tmp_path)
    for quant_type in ("nf4", "none"):
        shape = model_shape(tmp_path, QuantSettings(quant_type), LoraSettings(4, 16.0), torch.bfloat16)
        expected = max(together * 2 * 96 * 64, 2 * 96 * 64) if quant_type == "nf4" else 0
        assert shape.largest_matrix == expected


NUM_NORMS = {"gemma2": 4, "gemma3_text": 4, "glm4": 4, "cohere": 1, "cohere_qk_norm": 1, "cohere2": 1}
"""Norms of a block over hidden states, where there are not two."""

QUERY_KEY_NORMS = {"qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3", "cohere_qk_norm", "exaone4"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_planned_from_its_config(family: str, tmp_path: Path) -> None:
    settings = {**COMMON, **FAMILIES[family]}
    AutoConfig.for_model(settings.pop("model_type", family), **settings).save_pretrained(tmp_path)
    shape = model_shape(tmp_path, QuantSettings(), LoraSettings(4, 16.0), torch.bfloat16)
    widths = shape.widths
    assert (widths.hidden, widths.intermediate) == (
        64,
        {"qwen3_moe": 2 * 40, "mixtral": 2 * 104, "qwen2_moe": 2 * 40 + 72}.get(family, 104),
    )
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


def test_a_base_in_16_bits_is_read_as_it_is_held(llama_folders: dict[str, Path]) -> None:
    """Two bytes a weight, and no second copy of a matrix while it is used."""
    lora, found = LoraSettings(16, 16.0), []
    for quant_type in ("nf4", "none"):
        shape = model_shape(llama_folders["8b"], QuantSettings(quant_type), lora, torch.bfloat16)
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
    found = estimate(shape_of("8b", 16), Run(1, 64, memory))
    assert (found.phase, found.gpu["gathered head"]) == ("loss", 128256 * 4096 * 2)
    # alone and on the GPU it is whole; offloaded, embedding and head leave and the head comes back for a while
    kept, away = (
        estimate(shape_of("8b"), Run(1, 64, replace(memory, offload_vocabulary=offload))) for offload in (False, True)
    )
    assert kept.phases["loss"] - away.phases["loss"] == pytest.approx((1 - SLACK) * 128256 * 4096 * 2)
    assert kept.phases["forward"] - away.phases["forward"] == 2 * 128256 * 4096 * 2


def test_few_ranks_do_not_gather_the_head(shape_of) -> None:
    """Each makes the logits of its own rows, for the tokens of all."""
    memory = MemorySettings(offload_blocks=32, checkpoint_blocks=32)
    resting, away = (
        estimate(shape_of("8b", 2), Run(1, 4096, replace(memory, offload_vocabulary=offload)))
        for offload in (False, True)
    )
    part = 128256 // 2 * 4096 * 2
    assert resting.phases["loss"] - away.phases["loss"] == pytest.approx(2 * part - (1 + SLACK) * part)
    eight, nine = (estimate(shape_of("8b", number), Run(1, 4096, memory)).phases["loss"] for number in (8, 9))
    assert nine - eight > 128256 * 4096 * 2 * 0.9


def test_gradients_of_an_earlier_micro_batch_are_counted(shape_of) -> None:
    first, later = (estimate(shape_of("8b"), Run(4, 2048, accumulates=again)) for again in (False, True))
    lora = sum(block.lora for block in shape_of("8b").blocks)
    assert later.gpu_bytes - first.gpu_bytes == pytest.approx((1 + SLACK) * lora, rel=1e-3)


def test_blocks_that_a_rank_holds_whole_are_not_copied(shape_of) -> None:
    """But for LoRA that comes from the host, and for gradients on their way to and from the other ranks."""
    block = shape_of("8b").blocks[0]
    whole = MemorySettings(checkpoint_blocks=32)
    alone, several = (estimate(shape_of("8b"), Run(4, 2048, whole, num_replicas=number)) for number in (1, 2))
    assert alone.phase == several.phase == "backward of the last block"
    assert "running block" not in several.gpu
    assert several.phases["optimizer"] - alone.phases["optimizer"] == pytest.approx((1 + SLACK) * BUCKET_BYTES, abs=1)
    streamed, with_lora = (replace(whole, offload_blocks=32, offload_lora=away) for away in (False, True))
    assert "running block" not in estimate(shape_of("8b"), Run(4, 2048, streamed)).gpu
    assert estimate(shape_of("8b"), Run(4, 2048, with_lora)).gpu["running block"] == block.frozen + block.lora
    sharded = [estimate(shape_of("8b", 2), Run(4, 2048, whole, num_replicas=number)) for number in (1, 2)]
    assert sharded[0] == sharded[1], "FSDP sums gradients as it goes"


@pytest.mark.parametrize(("num_shards", "local_ranks"), [(1, 1), (1, 4), (4, 4), (8, 4)])
def test_replicas_save_nothing(shape_of, num_shards: int, local_ranks: int) -> None:
    """One rank gathers the adapter; the moments are those of the shards that the host's ranks hold, each once."""
    shape = shape_of("8b", num_shards)
    whole, part = (sum(getattr(block, size) for block in shape.blocks) for size in ("lora", "lora_part"))
    found = estimate(shape, Run(1, 2048, local_ranks=local_ranks)).host["checkpoint being saved"]
    assert found == whole + 2 * part * min(num_shards, local_ranks)


def test_a_long_context_counts_a_chunk_of_the_mlp(shape_of) -> None:
    """Where blocks run again, five tensors of its width and two of the block's are alive for a chunk only; whole in a block
    that keeps its own."""
    whole = replace(shape_of("8b"), chunks_mlp=False)
    memory = MemorySettings(checkpoint_blocks=32, offload_activations=True)
    for run, saved_tokens in (
        (Run(1, 32768, memory, compiled=True), 32768 - 8192),
        (Run(4, 8192, memory, compiled=True), 32768 - 8192),
        (Run(1, 20000, memory, compiled=True), 20000 - 10000),
        (Run(1, 16383, memory, compiled=True), 0),
        (Run(1, 32768, memory, compiled=True, has_dropout=True), 0),
        (Run(1, 32768, replace(memory, checkpoint_blocks=0), compiled=True), 0),
    ):
        found, expected = (estimate(shape, run).phases for shape in (shape_of("8b"), whole))
        saved = expected["backward of the last block"] - found["backward of the last block"]
        assert saved == pytest.approx((1 + SLACK) * saved_tokens * (5 * 14336 + 2 * 4096) * 2, abs=1)
        forward = expected["forward"] - found["forward"]
        assert forward == pytest.approx((1 + SLACK) * saved_tokens * 3 * 14336 * 2, abs=1)
    # of longer ones the backward of the attention needs more: ten tensors of the width of its input, three of q, four of k
    shape = shape_of("8b")
    long = estimate(shape, Run(1, 131072, memory, compiled=True)).gpu["activations"]
    assert long == pytest.approx(
        131072 * ((10 * 4096 + 3 * 4096 + 4 * 1024) * 2 + 32 * 4 + 2 * shape.lora_widths[0]), rel=1e-9
    )
    mixed = Run(1, 32768, replace(memory, checkpoint_blocks=31), compiled=True)
    assert estimate(shape_of("8b"), mixed).phases["forward"] == estimate(whole, mixed).phases["forward"]


@pytest.mark.parametrize(
    ("family", "lora", "chunks"),
    [
        ("llama", LoraSettings(4, 8.0), True),
        ("gemma2", LoraSettings(4, 8.0), False),
        ("qwen3_moe", LoraSettings(4, 8.0), False),
        ("llama", None, False),
    ],
    ids=["llama", "norm after the MLP", "experts", "full"],
)
def test_which_models_can_run_their_mlp_in_chunks(
    family: str, lora: LoraSettings | None, chunks: bool, tmp_path: Path
) -> None:
    folder = save_tiny(family, tmp_path)
    quant = QuantSettings("nf4" if lora else "none")
    assert model_shape(folder, quant, lora, torch.float32).chunks_mlp is chunks
    with process_group("full", 60, device="cpu") as ranks:
        built = build_model(folder, ranks, quant, lora, torch.float32, full=lora is None)
    assert any(isinstance(module, ChunkedMLP) for module in built.root.modules()) is chunks

"""What is chosen for a machine, by the command and by all ranks of a run alike; refusals with a remedy."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fsdp_qlora.commands import train as finetune
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import process_group
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.plan.choice import (
    NOT_SHARDED,
    Budget,
    Request,
    candidates,
    choose,
    choose_on_cpu,
    largest_batch,
    longest_context,
)
from fsdp_qlora.plan.model_shape import ModelShape, model_shape
from fsdp_qlora.plan.planner import Run, estimate
from fsdp_qlora.plan.training import memory_settings
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from tests.ranks import run_ranks

GIB = 2**30


def budget(gpu: float, host: float) -> Budget:
    return Budget(int(gpu * GIB), int(host * GIB))


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


def test_full_fine_tuning_is_refused_where_it_cannot_fit(llama_folders: dict[str, Path]) -> None:
    """8B parameters: 32 GB each of weights, gradients and both moments."""
    shape = model_shape(llama_folders["8b"], QuantSettings("none", num_shards=2), None, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"use a machine with 1.. GiB of host memory"):
        choose(shape, budget(24, 64), Request(Run(1, 2048, local_ranks=2)))
    choice = choose(shape, budget(24, 256), Request(Run(1, 2048, local_ranks=2)))
    assert choice.memory.offload_lora
    assert choice.memory.offload_blocks > 0


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


def test_a_refusal_for_a_long_context_names_the_memory_that_would_do(shape_of) -> None:
    shape, request = shape_of("70b", 2), Request(Run(1, 32768, local_ranks=2))
    with pytest.raises(ConfigError) as refused:
        choose(shape, budget(24, 64), request)
    found = re.search(
        r"--context_length (\d+) with .*, or a machine with (\d+) GiB of host memory$", str(refused.value)
    )
    assert found is not None
    shorter = replace(request, run=replace(request.run, context_length=int(found[1])))
    assert choose(shape, budget(24, 64), shorter).fits
    assert choose(shape, budget(24, float(found[2])), request).fits


@pytest.mark.parametrize(("host", "blocks"), [(200, 0), (10, 32)])
def test_cpu_ranks_checkpoint_only_if_memory_is_short(shape_of, host: float, blocks: int) -> None:
    memory = choose_on_cpu(shape_of("8b"), budget(0, host), Request(Run(1, 2048)))
    assert memory == MemorySettings(checkpoint_blocks=blocks)


def test_cpu_ranks_do_what_they_are_told_if_it_fits(shape_of) -> None:
    asked = Request(Run(1, 2048), "all", "none")
    assert choose_on_cpu(shape_of("8b"), budget(0, 200), asked) == MemorySettings(32, True, True)
    for request in (asked, Request(Run(1, 2048))):
        with pytest.raises(
            ConfigError, match=r"tokens take \d+\.\d of 5\.0 GiB of RAM, as the ranks compute on the CPU"
        ):
            choose_on_cpu(shape_of("8b"), budget(0, 5), request)


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


def said(folder: Path, gpu_gib: str, cpu_offload: str) -> list[str]:
    """Return what a training run on CUDA would say of its memory."""
    lines: list[str] = []
    with process_group("full", 60, device="cpu") as ranks:
        settings = TrainConfig(gpu_memory=gpu_gib, cpu_memory=64.0, cpu_offload=cpu_offload)

        def shape_of(num_shards: int) -> ModelShape:
            return model_shape(folder, QuantSettings(num_shards=num_shards), LoraSettings(16, 16.0), torch.bfloat16)

        memory_settings(settings, replace(ranks, device=torch.device("cuda")), shape_of, True, lines.append)
    return lines


@pytest.mark.parametrize(
    ("gpu_gib", "cpu_offload", "is_faster"), [("80", "auto", True), ("6", "auto", False), ("80", "all", False)]
)
def test_a_run_says_where_a_copy_for_each_gpu_is_faster(
    llama_folders: dict[str, Path], gpu_gib: str, cpu_offload: str, is_faster: bool
) -> None:
    for lines in run_ranks(said, 2, llama_folders["8b"], gpu_gib, cpu_offload):
        assert (NOT_SHARDED in lines) == is_faster, lines


def test_autos_are_resolved_alike_on_all_ranks_by_the_smallest(llama_folders: dict[str, Path]) -> None:
    first, second = run_ranks(resolved, 2, llama_folders["8b"], ("80", "5"), (64.0, 32.0))
    assert first == second
    assert isinstance(first, MemorySettings)
    assert first.checkpoint_blocks == 32
    assert first.offload_blocks > 0


def test_a_hopeless_training_run_is_refused_on_all_ranks(llama_folders: dict[str, Path]) -> None:
    first, second = run_ranks(resolved, 2, llama_folders["8b"], ("80", "6"), (64.0, 3.1))
    assert first == second
    assert isinstance(first, str)
    assert "of 3.1 GiB of host memory" in first


def test_a_wrong_number_of_sizes_is_refused(llama_folders: dict[str, Path]) -> None:
    (message,) = run_ranks(resolved, 1, llama_folders["8b"], ("80", "6"), (64.0,))
    assert "2 sizes for 1 ranks; give one, or one per rank" in message

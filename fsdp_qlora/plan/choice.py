"""Memory settings that fit: what the autos choose, the longest context and largest batch, and refusals with a remedy."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from fsdp_qlora.distributed import Ranks
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.host_memory import GIB, available_host_bytes
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.plan.model_shape import ModelShape
from fsdp_qlora.plan.planner import CONTEXT_BYTES, PROCESS_BYTES, Estimate, Run, estimate

NOT_SHARDED = "faster: --sharding none; every GPU can hold the whole base, and nothing needs to be gathered"

RESERVE = 0.02
"""Share of a GPU that a choice leaves free, for estimates that are a little low."""

CONTEXT_STEP = 64
"""Tokens to which a longest context is rounded down."""


@dataclass(frozen=True)
class Budget:
    """Bytes that one rank may take on its GPU, and all ranks of a machine together on the host."""

    gpu: int
    host: int

    def holds(self, wanted: Estimate) -> bool:
        return wanted.gpu_bytes <= (1 - RESERVE) * self.gpu and wanted.host_bytes <= self.host


@dataclass(frozen=True)
class Request:
    """A run whose memory settings are to be found; the texts are those of the settings of the same names.

    Attributes:
        sharded: whether parameters are sharded, without which they cannot be offloaded.
    """

    run: Run
    cpu_offload: str = "auto"
    activation_checkpointing: str = "auto"
    activation_offload: bool = False
    sharded: bool = True


@dataclass(frozen=True)
class Choice:
    """Settings, what they take, and whether that fits (what the user asked for is honoured even if it does not)."""

    memory: MemorySettings
    estimate: Estimate
    fits: bool


def candidates(shape: ModelShape, request: Request) -> Iterator[MemorySettings]:
    """Yield the settings that the request allows, the fastest first.

    Computing blocks again costs less than fetching them from the host, so all are checkpointed before one is offloaded;
    then as few blocks as possible, the vocabulary, the hidden states, and LoRA last.
    """
    offloads, checkpoints = _offloads(request, len(shape.blocks)), _checkpoints(request, len(shape.blocks))
    if shape.full:  # there is nothing else in a block
        offloads = [replace(offload, offload_lora=offload.offload_blocks > 0) for offload in offloads]
    moves_hidden = request.activation_checkpointing == "auto" and not request.activation_offload
    for number in checkpoints:
        yield replace(offloads[0], checkpoint_blocks=number, offload_activations=request.activation_offload)
    most = checkpoints[-1]
    for offload_activations in (False, True) if moves_hidden else (request.activation_offload,):
        for offload in offloads:
            yield replace(offload, checkpoint_blocks=most, offload_activations=offload_activations)
    if len(offloads) > 1:
        yield MemorySettings(len(shape.blocks), True, True, most, moves_hidden or request.activation_offload)


def _offloads(request: Request, count: int) -> list[MemorySettings]:
    if request.cpu_offload == "none" or (request.cpu_offload == "auto" and not request.sharded):
        return [MemorySettings()]
    if request.cpu_offload == "all":
        return [MemorySettings(count, True, True)]
    if request.cpu_offload == "auto":
        return [*(MemorySettings(number) for number in range(count + 1)), MemorySettings(count, True)]
    return [MemorySettings(_blocks("cpu_offload", request.cpu_offload, count, "all"))]


def _checkpoints(request: Request, count: int) -> list[int]:
    if request.activation_checkpointing == "auto":
        return list(range(count + 1))
    return [_blocks("activation_checkpointing", request.activation_checkpointing, count, "full")]


def _blocks(name: str, value: str, count: int, everything: str) -> int:
    if value in ("none", everything):
        return 0 if value == "none" else count
    if int(value) > count:
        raise ConfigError(f"--{name}={value}: the model has {count} blocks; use at most {count}, or {everything}")
    return int(value)


def choose(shape: ModelShape, budget: Budget, request: Request) -> Choice:
    """Return the fastest settings that fit; where nothing is left to choose, what was asked for.

    Raises:
        ConfigError: nothing fits, or what was asked for does not fit the host; says by how much, and what would help.
    """
    found = choose_or_none(shape, budget, request)
    if found is None and "auto" not in (request.cpu_offload, request.activation_checkpointing):
        found = most_frugal(shape, budget, request)
    if found is None or found.estimate.host_bytes > budget.host:
        raise ConfigError(refusal(shape, budget, request))
    return found


def choose_or_none(shape: ModelShape, budget: Budget, request: Request) -> Choice | None:
    """Return the fastest settings that fit, or None."""
    for memory in candidates(shape, request):
        wanted = estimate(shape, replace(request.run, memory=memory))
        if budget.holds(wanted):
            return Choice(memory, wanted, fits=True)
    return None


def copies(alone: ModelShape, budget: Budget, request: Request, choice: Choice, num_copies: int) -> Choice | None:
    """Return the settings with a whole base on every GPU; None if they do not fit, or compute more again than `choice`.

    Args:
        alone: the model with one shard.
    """
    run = replace(request.run, num_replicas=num_copies)
    found = choose_or_none(alone, budget, replace(request, run=run, sharded=False))
    return found if found is not None and found.memory.checkpoint_blocks <= choice.memory.checkpoint_blocks else None


def choose_on_cpu(shape: ModelShape, budget: Budget, request: Request) -> MemorySettings:
    """Return the settings for ranks that compute on the CPU: no offload, checkpointing only if RAM is too small.

    Raises:
        ConfigError: RAM is too small all the same.
    """
    if request.cpu_offload == "auto":
        request = replace(request, cpu_offload="none")

    def taken(memory: MemorySettings) -> int:
        wanted = estimate(shape, replace(request.run, memory=memory))
        return request.run.local_ranks * (wanted.gpu_bytes - CONTEXT_BYTES) + wanted.host_bytes

    if request.activation_checkpointing == "auto":
        enough = taken(MemorySettings()) <= budget.host
        request = replace(request, activation_checkpointing="none" if enough else "full")
    memory = next(candidates(shape, request))
    if taken(memory) > budget.host:
        run = request.run
        raise ConfigError(
            f"does not fit: {run.batch_size} x {run.context_length} tokens take {taken(memory) / GIB:.1f} of"
            f" {budget.host / GIB:.1f} GiB of RAM, as the ranks compute on the CPU (estimated; {in_words(shape, memory)});"
            " use a smaller model, --batch_size or --context_length, or fewer ranks"
        )
    return memory


def longest_context(shape: ModelShape, budget: Budget, request: Request) -> int:
    """Return the longest context that fits (0: none), up to the model's own limit."""
    most = shape.max_positions // CONTEXT_STEP
    return CONTEXT_STEP * _largest(
        lambda steps: _fits_with(shape, budget, request, context_length=steps * CONTEXT_STEP), most
    )


def largest_batch(shape: ModelShape, budget: Budget, request: Request, limit: int = 1024) -> int:
    """Return the largest batch that fits (0: none), up to `limit`."""
    return _largest(lambda size: _fits_with(shape, budget, request, batch_size=size), limit)


def _fits_with(shape: ModelShape, budget: Budget, request: Request, **changes: int) -> bool:
    return choose_or_none(shape, budget, replace(request, run=replace(request.run, **changes))) is not None  # type: ignore[arg-type]


def _largest(holds: Callable[[int], bool], limit: int) -> int:
    """Return the largest number from 0 to `limit` that holds, where all below it do too."""
    low, high = 0, 1
    while high <= limit and holds(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def most_frugal(shape: ModelShape, budget: Budget, request: Request) -> Choice:
    """Return the allowed settings that take least of the GPU, among those that fit the host if any does."""
    tried = [(memory, estimate(shape, replace(request.run, memory=memory))) for memory in candidates(shape, request)]
    memory, least = min(tried, key=lambda pair: (pair[1].host_bytes > budget.host, pair[1].gpu_bytes))
    return Choice(memory, least, budget.holds(least))


def refusal(shape: ModelShape, budget: Budget, request: Request) -> str:
    """Say what the most frugal settings take of those that the host holds, if it holds any, and what makes it fit."""
    choice = most_frugal(shape, budget, request)
    least = choice.estimate
    run = request.run
    return (
        f"does not fit: {run.batch_size} x {run.context_length} tokens take {least.gpu_bytes / GIB:.1f} of"
        f" {budget.gpu / GIB:.1f} GiB on a GPU and {least.host_bytes / GIB:.1f} of {budget.host / GIB:.1f} GiB of host"
        f" memory (estimated; {in_words(shape, choice.memory)}); {_remedy(shape, budget, request)}"
    )


def _remedy(shape: ModelShape, budget: Budget, request: Request) -> str:
    if request.cpu_offload != "auto" and choose_or_none(shape, budget, replace(request, cpu_offload="auto")):
        return "use --cpu_offload auto"
    if choose_or_none(shape, budget, replace(request, activation_checkpointing="auto")):
        return "use --activation_checkpointing auto"
    if batch_size := largest_batch(shape, budget, request, limit=request.run.batch_size):
        return f"use --batch_size {batch_size}"
    roomy = choose_or_none(shape, replace(budget, host=2**62), request)
    larger = f"a machine with {math.ceil(roomy.estimate.host_bytes / GIB)} GiB of host memory" if roomy else ""
    free = replace(request, cpu_offload="auto", activation_checkpointing="auto", run=replace(request.run, batch_size=1))
    if context := longest_context(shape, budget, free):
        settings = f"--batch_size 1 --context_length {context} with --cpu_offload and --activation_checkpointing auto"
        return f"use {settings}" + (f", or {larger}" if larger else "")
    if not request.sharded:
        return "use --sharding full, which shards the base and lets it rest on the host"
    if larger:
        return f"use {larger}"
    less = "--train_type lora" if shape.full else "a lower --lora_rank"
    return f"no context fits: use more or larger GPUs, {less} or a smaller model"


def in_words(shape: ModelShape, memory: MemorySettings) -> str:
    """Return memory settings in words."""
    count = len(shape.blocks)
    moved = {"embedding and head": memory.offload_vocabulary, "LoRA": memory.offload_lora and not shape.full}
    extras = [name for name, away in moved.items() if away]
    offloaded = f"{memory.offload_blocks} of {count} blocks" + "".join(f" + {name}" for name in extras)
    hidden = ", hidden states on the host" if memory.offload_activations else ""
    return f"checkpointed: {memory.checkpoint_blocks} of {count} blocks{hidden}; offloaded: {offloaded}"


def smallest_gpu(gpu_memory: str) -> float:
    """Return the smallest of the comma-separated sizes, GiB, in bytes."""
    return min(float(size) for size in gpu_memory.split(",")) * GIB


def budget_of(ranks: Ranks, gpu_memory: str | None, cpu_memory: float | None) -> tuple[Budget, int]:
    """Return what the ranks may take, the same on every rank: the smallest GPU and host decide; and the ranks of a host.

    Args:
        gpu_memory: GiB, one number or one per rank; default: what is free on the device, shared by its ranks.
        cpu_memory: GiB; default: what is available, and what the ranks' processes have taken already.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks.world_size)))
    gpu = float("inf")
    if gpu_memory is not None:
        num_sizes = len(gpu_memory.split(","))
        if num_sizes not in (1, ranks.world_size):
            wanted = f"{num_sizes} sizes for {ranks.world_size} ranks; give one, or one per rank"
            raise ConfigError(f"--gpu_memory={gpu_memory}: {wanted}")
        gpu = smallest_gpu(gpu_memory)
    elif ranks.device.type == "cuda":
        gpu = torch.cuda.mem_get_info(ranks.device)[0] / ranks.ranks_on_gpu + CONTEXT_BYTES
    host = available_host_bytes() + local_ranks * PROCESS_BYTES if cpu_memory is None else cpu_memory * GIB
    everyone: list[tuple[float, float, int]] = [(0.0, 0.0, 0)] * ranks.world_size
    dist.all_gather_object(everyone, (gpu, host, local_ranks))
    gpus, hosts, counts = zip(*everyone, strict=True)
    return Budget(int(min(*gpus, 2**62)), int(min(hosts))), max(counts)

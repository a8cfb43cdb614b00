"""What the planner's estimates mean: settings that fit, refusals, the time of a step, and the command `plan`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from fsdp_qlora.config import PlanConfig
from fsdp_qlora.distributed import Ranks, compute_dtype
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.memory import GIB, available_host_bytes
from fsdp_qlora.models.hub import resolve_config
from fsdp_qlora.parallel import MemorySettings, spread
from fsdp_qlora.planner import CONTEXT_BYTES, PROCESS_BYTES, Estimate, ModelShape, Run, estimate, model_shape
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings

CONTEXT_STEP = 64
"""Tokens to which a longest context is rounded down."""


@dataclass(frozen=True)
class Budget:
    """Bytes that one rank may take on its GPU, and all ranks of a machine together on the host."""

    gpu: int
    host: int

    def holds(self, wanted: Estimate) -> bool:
        return wanted.gpu_bytes <= self.gpu and wanted.host_bytes <= self.host


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
        raise ConfigError(
            f"--{name}={value}: the model has {count} decoder blocks; use at most {count}, or {everything}"
        )
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


def choose_on_cpu(shape: ModelShape, budget: Budget, request: Request) -> MemorySettings:
    """Return the settings for ranks that compute on the CPU: no offload, checkpointing only if RAM is too small."""
    if request.cpu_offload == "auto":
        request = replace(request, cpu_offload="none")
    if request.activation_checkpointing == "auto":
        wanted = estimate(shape, replace(request.run, memory=MemorySettings()))
        enough = request.run.local_ranks * wanted.gpu_bytes + wanted.host_bytes <= budget.host
        request = replace(request, activation_checkpointing="none" if enough else "full")
    return next(candidates(shape, request))


def longest_context(shape: ModelShape, budget: Budget, request: Request) -> int:
    """Return the longest context that fits (0: none), up to the model's own limit."""

    def holds(steps: int) -> bool:
        run = replace(request.run, context_length=steps * CONTEXT_STEP)
        return choose_or_none(shape, budget, replace(request, run=run)) is not None

    return CONTEXT_STEP * _largest(holds, shape.max_positions // CONTEXT_STEP)


def largest_batch(shape: ModelShape, budget: Budget, request: Request, limit: int = 1024) -> int:
    """Return the largest batch that fits (0: none), up to `limit`."""

    def holds(size: int) -> bool:
        run = replace(request.run, batch_size=size)
        return choose_or_none(shape, budget, replace(request, run=run)) is not None

    return _largest(holds, limit)


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
    """Say what the most frugal allowed settings take, and which flag makes it fit."""
    choice = most_frugal(shape, budget, request)
    least = choice.estimate
    run = request.run
    return (
        f"does not fit: {run.batch_size} x {run.context_length} tokens need at least {least.gpu_bytes / GIB:.1f} of"
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
    free = replace(request, cpu_offload="auto", activation_checkpointing="auto", run=replace(request.run, batch_size=1))
    if context := longest_context(shape, budget, free):
        return f"use --batch_size 1 --context_length {context} with --cpu_offload and --activation_checkpointing auto"
    if not request.sharded:
        return "use --sharding full, which shards the base and lets it rest on the host"
    if roomy := choose_or_none(shape, replace(budget, host=2**62), request):
        return f"use a machine with {roomy.estimate.host_bytes / GIB:.0f} GiB of host memory"
    return "no context fits: use more or larger GPUs, a lower --lora_rank or a smaller model"


def in_words(shape: ModelShape, memory: MemorySettings) -> str:
    """Return memory settings in words."""
    count = len(shape.blocks)
    moved = {"embedding and head": memory.offload_vocabulary, "LoRA": memory.offload_lora}
    extras = [name for name, away in moved.items() if away]
    offloaded = f"{memory.offload_blocks} of {count} blocks" + "".join(f" + {name}" for name in extras)
    hidden = ", hidden states on the host" if memory.offload_activations else ""
    return f"checkpointed: {memory.checkpoint_blocks} of {count} blocks{hidden}; offloaded: {offloaded}"


def _smallest(gpu_memory: str) -> float:
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
            raise ConfigError(
                f"--gpu_memory={gpu_memory}: {num_sizes} sizes for {ranks.world_size} ranks; give one, or one per rank"
            )
        gpu = _smallest(gpu_memory)
    elif ranks.device.type == "cuda":
        sharing = -(-local_ranks // torch.cuda.device_count())
        gpu = torch.cuda.mem_get_info(ranks.device)[0] / sharing + CONTEXT_BYTES
    host = available_host_bytes() + local_ranks * PROCESS_BYTES if cpu_memory is None else cpu_memory * GIB
    everyone: list[tuple[float, float, int]] = [(0.0, 0.0, 0)] * ranks.world_size
    dist.all_gather_object(everyone, (gpu, host, local_ranks))
    gpus, hosts, counts = zip(*everyone, strict=True)
    return Budget(int(min(*gpus, 2**62)), int(min(hosts))), max(counts)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one micro-batch by what limits them; copies hide behind computation where they have their own stream.

    Attributes:
        overlapped: whether they do: FSDP in a world of one copies on the stream that computes.
    """

    compute: float
    host: float
    links: float
    overlapped: bool

    @property
    def seconds(self) -> float:
        return max(self.compute, self.host, self.links) if self.overlapped else self.compute + self.host

    @property
    def limit(self) -> str:
        slowest = max(self.compute, self.host, self.links)
        return {self.compute: "computation", self.links: "gathers", self.host: "copies from the host"}[slowest]


def step_seconds(
    shape: ModelShape, run: Run, tflops: float = 100.0, host_bandwidth: float = 20.0, link_bandwidth: float = 10.0
) -> StepTime:
    """Estimate one micro-batch, forward and backward; each part scales inversely with its rate.

    Per token: 4 FLOP a weight (forward, gradient of the input) and 2 more where blocks are checkpointed; 6 and 2 a LoRA
    weight; 4 a weight of the head; causal attention once forward, 2.5 times backward, and once more where checkpointed.

    Args:
        tflops: sustained rate of a GPU, 1e12 FLOP/s.
        host_bandwidth, link_bandwidth: 1e9 bytes/s a GPU gets from the host, and from the other GPUs.
    """
    memory, count, tokens = run.memory, len(shape.blocks), run.tokens
    again = memory.checkpoint_blocks / count
    per_token = sum(block.num_weights for block in shape.blocks) * (4 + 2 * again)
    per_token += sum(block.lora for block in shape.blocks) / 4 * (6 + 2 * again)
    per_token += 4 * shape.vocabulary_rows * shape.widths.hidden
    per_token += 2 * count * run.context_length * shape.widths.query * (3.5 + again)
    offloaded = itertools.compress(shape.blocks, spread(memory.offload_blocks, count))
    fetched = 2.0 * sum(block.packed_part + memory.offload_lora * block.lora_part for block in offloaded)
    if memory.offload_vocabulary:
        fetched += shape.head_bytes / shape.num_shards
    if memory.offload_activations:
        fetched += 2 * memory.checkpoint_blocks * tokens * shape.widths.hidden * shape.itemsize
    gathered = 2 * sum(block.gathered for block in shape.blocks) + sum(block.lora for block in shape.blocks)
    others = (shape.num_shards - 1) / shape.num_shards
    return StepTime(
        compute=tokens * per_token / (tflops * 1e12),
        host=fetched / (host_bandwidth * 1e9),
        links=others * (gathered + shape.head_bytes) / (link_bandwidth * 1e9),
        overlapped=shape.num_shards > 1,
    )


def run(config: PlanConfig) -> None:
    """Print whether a run fits, and how; the command line's `plan`.

    Raises:
        ConfigError: it does not fit, or a picture is asked for without matplotlib.
    """
    folder = resolve_config(config.model, config.revision)
    shape = _shape(config, folder, config.sharding)
    batch = Run(config.batch_size, config.context_length, local_ranks=config.gpus)
    wishes = config.cpu_offload, config.activation_checkpointing, config.activation_offload
    request = Request(batch, *wishes, sharded=config.sharding == "full")
    budget = Budget(int(_smallest(config.gpu_memory)), int(config.cpu_memory * GIB))
    try:
        choice, problem = choose(shape, budget, request), ""
    except ConfigError as error:
        choice, problem = most_frugal(shape, budget, request), str(error)
    console = Console(width=100, highlight=False, markup=False)
    console.print(_table(config, choice, budget))
    console.print("\n".join(_lines(config, shape, budget, request, choice)))
    if choice.fits and shape.num_shards > 1 and not choice.memory.offload_blocks:
        alone = choose_or_none(_shape(config, folder, "none"), budget, replace(request, sharded=False))
        if alone is not None and alone.memory.checkpoint_blocks <= choice.memory.checkpoint_blocks:
            console.print(
                "faster: --sharding none; every GPU can hold the whole base, and nothing needs to be gathered"
            )
    if config.plot is not None:
        plot(config.plot, choice.estimate, budget)
        console.print(f"picture: {config.plot}")
    if not choice.fits:
        raise ConfigError(problem or refusal(shape, budget, request))


def _shape(config: PlanConfig, folder: Path, sharding: str) -> ModelShape:
    quant = QuantSettings(double_quant=config.double_quant, num_shards=config.gpus if sharding == "full" else 1)
    lora = LoraSettings(config.lora_rank, float(config.lora_rank), 0.0, config.lora_target_modules)
    return model_shape(folder, quant, lora, compute_dtype(config.precision, torch.device("cuda")))


def _table(config: PlanConfig, choice: Choice, budget: Budget) -> Table:
    wanted = choice.estimate
    title = f"{config.model} on {config.gpus} GPU{'s' * (config.gpus > 1)}"
    title += f": {config.batch_size} x {config.context_length} tokens, LoRA rank {config.lora_rank} (GiB)"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("component", min_width=28)
    table.add_column("each GPU", justify="right")
    table.add_column("host, all ranks", justify="right")

    rows = [(name, wanted.gpu.get(name, 0), wanted.host.get(name, 0)) for name in _names(wanted)]
    for name, *sizes in [*rows, ("total", wanted.gpu_bytes, wanted.host_bytes), ("available", budget.gpu, budget.host)]:
        if name == "total":
            table.add_section()
        table.add_row(name, *(f"{size / GIB:.2f}" if size else "-" for size in sizes))
    return table


def _names(wanted: Estimate) -> list[str]:
    """Return the components of GPU and host in the order of the table."""
    return list(dict.fromkeys([*wanted.gpu, *wanted.host]))


def _lines(config: PlanConfig, shape: ModelShape, budget: Budget, request: Request, choice: Choice) -> list[str]:
    batch = replace(request.run, memory=choice.memory)
    time = step_seconds(shape, batch, config.gpu_tflops, config.host_bandwidth, config.link_bandwidth)
    context, size = longest_context(shape, budget, request), largest_batch(shape, budget, request)
    limit = " (the model's limit)" if context + CONTEXT_STEP > shape.max_positions else ""
    rate = config.gpus * batch.tokens / time.seconds
    overlap = "copies overlap with computation" if time.overlapped else "copies do not overlap without shards"
    lines = [
        f"peak: {choice.estimate.phase}",
        f"settings: {in_words(shape, choice.memory)}",
        f"longest context that fits at batch size {config.batch_size}: {context}{limit}",
        f"largest batch that fits at {config.context_length} tokens: {size}",
        f"time of one micro-batch: {time.seconds:.2f} s, {rate:.0f} tokens/s on all GPUs, limited by {time.limit}",
        f"  computation {time.compute:.2f} s at {config.gpu_tflops:g} TFLOP/s sustained a GPU, host copies"
        f" {time.host:.2f} s at {config.host_bandwidth:g} GB/s,",
        f"  gathers {time.links:.2f} s at {config.link_bandwidth:g} GB/s; {overlap}",
    ]
    gpu, host = (budget.gpu - choice.estimate.gpu_bytes) / GIB, (budget.host - choice.estimate.host_bytes) / GIB
    if choice.fits:
        return [*lines, f"verdict: fits, with {gpu:.1f} GiB to spare on the GPU and {host:.1f} GiB on the host"]
    return [
        *lines,
        f"verdict: does not fit; short of {max(0, -gpu):.1f} GiB on the GPU, {max(0, -host):.1f} on the host",
    ]


def plot(path: str, wanted: Estimate, budget: Budget) -> None:
    """Save a picture of the components of GPU and host memory as stacked bars, with what is available.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"--plot={path} needs matplotlib; pip install matplotlib") from error
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    bars = ((wanted.gpu, budget.gpu), (wanted.host, budget.host))
    bottoms = [0.0, 0.0]
    for position, name in enumerate(_names(wanted)):
        heights = [components.get(name, 0) / GIB for components, _ in bars]
        axes.bar([0, 1], heights, bottom=bottoms, width=0.6, label=name, color=colormaps["tab20"](position))
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, (_, available) in enumerate(bars):
        axes.hlines(available / GIB, place - 0.4, place + 0.4, colors="black", linestyles="dashed")
    axes.set_xticks([0, 1], ["each GPU", "host, all ranks"])
    axes.set_ylabel("GiB (dashed: available)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot={path} cannot be written ({error}); give a path ending in .png") from error

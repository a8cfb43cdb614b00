"""The command `plan`: a table of the memory a run takes, the settings chosen, and the time of a step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fsdp_qlora.config import PlanConfig
from fsdp_qlora.config.lora import lora_settings
from fsdp_qlora.distributed import compute_dtype
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.host_memory import GIB
from fsdp_qlora.models.hub import resolve_config
from fsdp_qlora.models.skeleton import check_context
from fsdp_qlora.parallel import spread
from fsdp_qlora.plan.choice import (
    CONTEXT_STEP,
    NOT_SHARDED,
    Budget,
    Choice,
    Request,
    choose,
    choose_or_none,
    copies,
    in_words,
    largest_batch,
    longest_context,
    most_frugal,
    refusal,
    smallest_gpu,
)
from fsdp_qlora.plan.model_shape import ModelShape, model_shape
from fsdp_qlora.plan.planner import Estimate, Run
from fsdp_qlora.quant.adapt import QuantSettings


@dataclass(frozen=True)
class StepTime:
    """Seconds of one micro-batch, by what they are for.

    Attributes:
        links, nodes: traffic within a machine, and between machines.
        exchange: sums of gradients over copies of the base that nothing is computed beside; LoRA's are once a step.
        overlapped: whether copies have a stream of their own; where nothing is sharded only those of recomputed blocks have.
    """

    compute: float
    host: float
    links: float
    nodes: float
    exchange: float
    overlapped: bool

    @property
    def seconds(self) -> float:
        computing = max(self.compute, self.host) if self.overlapped else self.compute + self.host
        return max(computing, self.links, self.nodes) + self.exchange

    @property
    def limit(self) -> str:
        causes = {
            "computation": self.compute,
            "gathers": self.links,
            "copies from the host": self.host,
            "traffic between machines": self.nodes,
            "the sums of gradients": self.exchange,
        }
        return max(causes, key=lambda cause: causes[cause])


@dataclass(frozen=True)
class Rates:
    """What a machine sustains.

    Attributes:
        tflops: of a GPU, 1e12 FLOP/s.
        host_bandwidth, link_bandwidth: 1e9 bytes/s to a GPU from the host, and from the other GPUs of its machine.
        node_bandwidth: 1e9 bytes/s to a machine from the others.
    """

    tflops: float = 100.0
    host_bandwidth: float = 20.0
    link_bandwidth: float = 10.0
    node_bandwidth: float = 1.0


def rates_of(config: PlanConfig) -> Rates:
    return Rates(config.gpu_tflops, config.host_bandwidth, config.link_bandwidth, config.node_bandwidth)


def step_seconds(shape: ModelShape, run: Run, rates: Rates, num_nodes: int = 1) -> StepTime:
    """Estimate one micro-batch, forward and backward; each part scales inversely with its rate.

    Per token: 4 FLOP a weight (forward, gradient of the input) and 2 more where blocks are checkpointed; 6 and 2 a LoRA
    weight; 4 a weight of the head; causal attention once forward, 2.5 times backward, and once more where checkpointed.

    Between machines: where the shards are on several, every gathered byte enters each machine once (the ring of a gather
    passes each once); otherwise gradients pass twice to be summed over the replicas. So they do within a machine where each
    rank holds the whole base. FSDP sums gradients while it computes others; those of what it does not hold wait.
    """
    memory, count, tokens = run.memory, len(shape.blocks), run.tokens
    again = memory.checkpoint_blocks / count
    per_token = sum(block.num_weights for block in shape.blocks) * (4 + 2 * again)
    per_token += sum(block.lora for block in shape.blocks) / 4 * (6 + 2 * again)
    per_token += (6 if shape.trained[1] else 4) * shape.vocabulary_rows * shape.widths.hidden
    per_token += 2 * count * run.context_length * shape.widths.query * (3.5 + again)
    offloaded = itertools.compress(shape.blocks, spread(memory.offload_blocks, count))
    fetched = 2.0 * sum(block.packed_part + memory.offload_lora * block.lora_part for block in offloaded)
    if memory.offload_vocabulary:
        fetched += shape.head_bytes / shape.num_shards
    if memory.offload_activations:
        fetched += 2 * memory.checkpoint_blocks * tokens * shape.widths.hidden * shape.itemsize
    lora = sum(block.lora for block in shape.blocks)
    if shape.shares_logits:  # hidden states there, and their gradients back
        head = 2 * shape.num_shards * tokens * shape.widths.hidden * shape.itemsize
    else:
        head = shape.head_bytes + (4 * shape.vocabulary_rows * shape.widths.hidden if shape.trained[1] else 0)
    gathered = 2 * sum(block.gathered for block in shape.blocks) + lora + head
    others = (shape.num_shards - 1) / shape.num_shards
    spans_nodes = shape.num_shards > run.local_ranks
    summed = 0 if spans_nodes else 2 * (lora + shape.trained_rows[0])
    local_replicas = max(1, run.local_ranks // shape.num_shards)
    within = (local_replicas - 1) / local_replicas * summed / (rates.link_bandwidth * 1e9)
    between = (num_nodes - 1) / num_nodes * (summed or gathered) / (rates.node_bandwidth * 1e9)
    waits = shape.num_shards == 1 and not shape.full
    return StepTime(
        compute=tokens * per_token / (rates.tflops * 1e12),
        host=fetched / (rates.host_bandwidth * 1e9),
        links=others * gathered / (rates.link_bandwidth * 1e9) + (0 if waits else within),
        nodes=0 if waits else between,
        exchange=max(within, between) if waits else 0,
        overlapped=shape.num_shards > 1 or (again == 1 and not shape.full),
    )


def run(config: PlanConfig) -> None:
    """Print whether a run fits, and how; the command line's `plan`.

    Raises:
        ConfigError: it does not fit, the context is longer than the model's, or a picture is asked for without matplotlib.
    """
    folder = resolve_config(config.model, config.revision)
    shape = _shape(config, folder, config.sharding)
    check_context(config.context_length, shape.max_positions)
    batch = Run(
        config.batch_size,
        config.context_length,
        local_ranks=config.gpus,
        num_replicas=_num_replicas(config, config.sharding),
        has_dropout=config.lora_dropout > 0,
        compiled=True,
    )
    wishes = config.cpu_offload, config.activation_checkpointing, config.activation_offload
    request = Request(batch, *wishes, sharded=config.sharding != "none")
    budget = Budget(int(smallest_gpu(config.gpu_memory)), int(config.cpu_memory * GIB))
    try:
        choice, problem = choose(shape, budget, request), ""
    except ConfigError as error:
        choice, problem = most_frugal(shape, budget, request), str(error)
    console = Console(width=100, highlight=False, markup=False)
    console.print(_table(config, choice, budget))
    console.print("\n".join(_lines(config, shape, budget, request, choice)))
    if choice.fits and (hint := _faster(config, folder, budget, request, choice)):
        console.print(hint)
    if config.plot is not None:
        plot(config.plot, choice.estimate, budget)
        console.print(f"picture: {config.plot}")
    if not choice.fits:
        raise ConfigError(problem or refusal(shape, budget, request))


def _faster(config: PlanConfig, folder: Path, budget: Budget, request: Request, choice: Choice) -> str:
    """Return a hint at a sharding that fits too and moves less; empty if there is none."""
    num_ranks = config.nodes * config.gpus
    if config.sharding != "none" and not choice.memory.offload_blocks and num_ranks > 1:
        alone = copies(_shape(config, folder, "none"), budget, request, choice, num_ranks)
        if alone is not None:
            # what is gathered within a machine costs more than it should, so that the estimate does not decide there
            times = [_seconds(config, folder, way, of) for way, of in (("none", alone), (config.sharding, choice))]
            if config.nodes == 1 or times[0] < times[1]:
                return NOT_SHARDED
    if config.sharding == "full" and config.nodes > 1:
        found = choose_or_none(_shape(config, folder, "hybrid"), budget, request)
        if found is None:
            return ""
        times = [_seconds(config, folder, way, of) for way, of in (("hybrid", found), ("full", choice))]
        if times[0] < times[1]:
            return (
                f"faster: --sharding hybrid ({times[0]:.2f} s a micro-batch); every machine can hold the base, and only"
                " gradients cross"
            )
    return ""


def _seconds(config: PlanConfig, folder: Path, sharding: str, choice: Choice) -> float:
    """Return the time of a micro-batch with another sharding."""
    run = Run(config.batch_size, config.context_length, choice.memory, local_ranks=config.gpus)
    return step_seconds(_shape(config, folder, sharding), run, rates_of(config), config.nodes).seconds


def _num_shards(config: PlanConfig, sharding: str) -> int:
    return {"full": config.nodes * config.gpus, "hybrid": config.gpus, "none": 1}[sharding]


def _num_replicas(config: PlanConfig, sharding: str) -> int:
    return config.nodes * config.gpus // _num_shards(config, sharding)


def _shape(config: PlanConfig, folder: Path, sharding: str) -> ModelShape:
    fp8 = config.compute_dtype == "fp8"
    quant = QuantSettings(config.base_form, config.double_quant, num_shards=_num_shards(config, sharding), fp8=fp8)
    lora = None if config.train_type == "full" else lora_settings(config)
    return model_shape(folder, quant, lora, compute_dtype(config.precision, torch.device("cuda")))


def _table(config: PlanConfig, choice: Choice, budget: Budget) -> Table:
    wanted = choice.estimate
    machines = f"{config.nodes} x " if config.nodes > 1 else ""
    method = f"{'DoRA' if config.use_dora else 'LoRA'} rank {config.lora_rank}"
    method = "full fine-tuning" if config.train_type == "full" else method
    title = f"{config.model} on {machines}{config.gpus} GPU{'s' * (config.gpus > 1)}"
    title += f": {config.batch_size} x {config.context_length} tokens, {method} (GiB)"
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
    time = step_seconds(shape, batch, rates_of(config), config.nodes)
    context, size = longest_context(shape, budget, request), largest_batch(shape, budget, request)
    limit = " (the model's limit)" if context + CONTEXT_STEP > shape.max_positions else ""
    rate = config.nodes * config.gpus * batch.tokens / time.seconds
    overlap = ""
    if time.host or time.links:
        overlap = "; copies overlap with computation"
        if not time.overlapped:
            overlap = "; copies do not overlap where a rank holds whole blocks and keeps activations"
    lines = [
        f"peak: {choice.estimate.phase}",
        f"settings: {in_words(shape, choice.memory)}",
        f"longest context that fits at batch size {config.batch_size}: {context}{limit}",
        f"largest batch that fits at {config.context_length} tokens: {size}",
        f"time of one micro-batch: {time.seconds:.2f} s, {rate:.0f} tokens/s on all GPUs, limited by {time.limit}",
        f"  computation {time.compute:.2f} s at {config.gpu_tflops:g} TFLOP/s sustained a GPU, host copies"
        f" {time.host:.2f} s at {config.host_bandwidth:g} GB/s,",
        f"  gathers {time.links:.2f} s at {config.link_bandwidth:g} GB/s{overlap}",
    ]
    if time.exchange:
        lines.append(f"  sums of gradients {time.exchange:.2f} s, once a step, beside which nothing is computed")
    elif config.nodes > 1:
        lines.append(
            f"  between machines {time.nodes:.2f} s: {time.nodes * config.node_bandwidth:.1f} GB into each at"
            f" {config.node_bandwidth:g} GB/s"
        )
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
    except OSError as error:
        raise ConfigError(f"--plot={path} cannot be written ({error.strerror}); choose another folder") from error
    except ValueError as error:
        raise ConfigError(f"--plot={path} cannot be written ({error}); give a path ending in .png") from error

"""Tokens per second of a training step on one GPU, against the floor of its arithmetic, with random weights of a real shape.

    python scripts/bench.py --shape llama-8b [--rank 64 --batch_size 4 --context_length 2048 --steps 8 --profile trace.json]

Prints one table, with PEFT + bitsandbytes beside this trainer: tokens/s, share of the floor, peak GiB, and the card's
measured matmul and copy rates.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fire
import random_checkpoint
import torch
from torch.profiler import ProfilerActivity, profile
from trace_report import KINDS, OTHER, covered, hull, kind_of
from transformers import LlamaConfig

from fsdp_qlora.build import BuiltModel, build_model
from fsdp_qlora.compile_workers import end_compile_workers
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks, process_group
from fsdp_qlora.optim import build_optimizer, gradient_norm
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from fsdp_qlora.quant.fp8 import CAPABILITY, quantize_rows


def measured_rates() -> dict[str, float]:
    """Return the card's bf16 and fp8 matmul rates in TFLOP/s and its host link's rate in GB/s, on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = _median_seconds(lambda: a @ b, 10)
    host, device = (
        torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True),
        torch.empty(1 << 28, dtype=torch.uint8, device="cuda"),
    )
    copy = _median_seconds(lambda: device.copy_(host, non_blocking=True), 10)
    rates = {"tflops": 2 * 8192**3 / matmul / 1e12, "host_gbs": (1 << 28) / copy / 1e9}
    if torch.cuda.get_device_capability() < CAPABILITY:
        return rates
    (a8, a_scale), (b8, b_scale) = quantize_rows(a), quantize_rows(b)
    for name, fast in (("fp8", True), ("fp8 with exact accumulation", False)):
        scales = {"scale_a": a_scale, "scale_b": b_scale.t(), "out_dtype": a.dtype, "use_fast_accum": fast}
        seconds = _median_seconds(functools.partial(torch._scaled_mm, a8, b8.t(), **scales), 10)
        rates[name] = 2 * 8192**3 / seconds / 1e12
    return rates


def _median_seconds(action: Callable[[], object], repeats: int) -> float:
    times = []
    for index in range(repeats + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        action()
        torch.cuda.synchronize()
        if index >= 2:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def flops_per_token(config: LlamaConfig, lora_rank: int, context_length: int, recomputed: float) -> float:
    """Return the floating-point operations that a token needs.

    Frozen matrices take 2 a weight forward, 2 for the input gradient and 2 more where they are recomputed (which the
    block's last, down_proj, need not be); LoRA 6 (8); the head 4; causal attention 2 x context x width forward and 2.5 times
    that backward.
    """
    hidden, inner, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    shapes = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, inner)] * 3
    base = blocks * sum(a * b for a, b in shapes)
    lora = blocks * lora_rank * sum(a + b for a, b in shapes)
    attention = 2 * context_length * hidden * blocks
    head = config.vocab_size * hidden
    return (
        base * 4
        + (base - blocks * hidden * inner) * 2 * recomputed
        + lora * (6 + 2 * recomputed)
        + 4 * head
        + attention * (3.5 + recomputed)
    )


class Batch:
    """Random tokens, one document a row, every token a target."""

    def __init__(self, vocab_size: int, batch_size: int, context_length: int) -> None:
        torch.manual_seed(0)
        self.context_length = context_length
        self.ids = torch.randint(3, vocab_size, (batch_size, context_length + 1), device="cuda")
        self.inputs, self.labels = self.ids[:, :-1].contiguous(), self.ids[:, 1:].reshape(-1)
        self.positions = torch.arange(context_length, device="cuda").expand(batch_size, -1).contiguous()
        self.targets = torch.arange(self.labels.numel(), device="cuda")


def our_step(built: BuiltModel, batch: Batch) -> Callable[[], float]:
    """Return an optimizer step of this trainer's model."""
    optimizer = build_optimizer(built.root, TrainConfig(lr=1e-4), built.offloaded)

    def step() -> float:
        out = built.root(batch.inputs, batch.positions, None, batch.context_length, batch.targets, batch.labels)
        loss = out["loss"] / batch.labels.numel()
        loss.backward()
        optimizer.step_if_finite(loss.detach(), gradient_norm(built.root))
        optimizer.zero_grad()
        return float(loss.item())

    return step


def peft_step(folder: Path, rank: int, batch: Batch) -> Callable[[], float]:
    """Return an optimizer step of PEFT + bitsandbytes: bf16 autocast, gradient checkpointing, transformers' own loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0})
    model.config.use_cache = False
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)

    def step() -> float:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=batch.ids[:, :-1], labels=batch.ids[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def _profile(step: Callable[[], float], path: str) -> dict[str, float]:
    """Write a trace of one step and return milliseconds by kind of kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as result:  # the CPU's events would slow it down and add gaps
        step()
        torch.cuda.synchronize()
    if path:
        result.export_chrome_trace(path)
    totals: dict[str, float] = dict.fromkeys([*KINDS, OTHER], 0.0)
    kernels = [e for e in result.key_averages() if _on_gpu(e)]
    for event in kernels:
        totals[kind_of(event.key)] += event.self_device_time_total / 1e3
    spans = [(e.time_range.start, e.time_range.end) for e in result.events() if _on_gpu(e)]
    first, last = hull(spans)
    totals["idle"] = (last - first - covered(spans)) / 1e3
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:18]:
        print(f"  {event.self_device_time_total / 1e3:8.1f} ms {event.count:5d} x {event.key[:100]}")
    return totals


def _on_gpu(event: Any) -> bool:
    return bool(event.device_type == torch.autograd.DeviceType.CUDA)


@dataclass
class Timing:
    """What a variant took: seconds a step (median) and of the first one, peak GiB reserved, the last loss."""

    seconds: float
    first: float
    gib: float
    loss: float


def _measure(step: Callable[[], float], steps: int) -> Timing:
    started = time.perf_counter()
    step()
    first = time.perf_counter() - started
    times, loss = [], 0.0
    for _ in range(steps + 2):
        started = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - started)
    return Timing(statistics.median(times[2:]), first, torch.cuda.max_memory_reserved() / 2**30, loss)


def _build(folder: Path, ranks: Ranks, rank: int, variant: str, blocks: int) -> BuiltModel:
    keep, offload = "-keep" in variant, "-offload" in variant
    memory = MemorySettings(
        offload_blocks=blocks if offload else 0,
        offload_vocabulary=offload,
        checkpoint_blocks=0 if keep else blocks,
        offload_activations="-hidden" in variant,
    )
    lora = LoraSettings(rank, 16.0)
    compiled = variant.startswith("compile")
    quant = QuantSettings(fp8="-fp8" in variant)
    return build_model(folder, ranks, quant, lora, torch.bfloat16, memory=memory, compiled=compiled)


@dataclass(frozen=True)
class Shape:
    """The model and batch that all variants share."""

    folder: Path
    config: LlamaConfig
    rank: int
    batch_size: int
    context_length: int


def run_variant(variant: str, shape: Shape, steps: int, profile: str | None) -> Timing:
    """Measure one variant, in a process of its own, whose end frees all its memory."""
    batch = Batch(shape.config.vocab_size, shape.batch_size, shape.context_length)
    with process_group("full", 600) as ranks:
        if variant == "peft":
            step = peft_step(shape.folder, shape.rank, batch)
        else:
            step = our_step(_build(shape.folder, ranks, shape.rank, variant, shape.config.num_hidden_layers), batch)
        timing = _measure(step, steps)
        if profile is not None:
            print(variant, {kind: round(value, 1) for kind, value in _profile(step, profile).items()}, flush=True)
    end_compile_workers()
    return timing


def _end(*_: object) -> None:
    """End with the variant that runs in a process of its own, which would go on and be in the way of what comes next."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.exit(1)


def bench(
    shape: str = "llama-8b",
    num_blocks: int | None = None,
    rank: int = 64,
    batch_size: int = 4,
    context_length: int = 2048,
    steps: int = 6,
    variants: str = "peft,eager,compile,compile-keep",
    profile: str | None = None,
    folder: str | None = None,
) -> None:
    """Measure variants: peft, or this trainer eager or compile, with full recomputation.

    '-keep': without recomputation; '-offload': all blocks rest on the CPU; '-hidden': hidden states wait there;
    '-fp8': the base's products are in fp8 ('of floor' is that of bf16).
    """
    signal.signal(signal.SIGTERM, _end)
    target = Path(folder or tempfile.mkdtemp())
    if not (target / "config.json").exists():
        random_checkpoint.make(shape, str(target), num_blocks)
    config = random_checkpoint.llama_config(shape, num_blocks)
    print(f"{shape}, r {rank}, {batch_size} x {context_length}, {torch.cuda.get_device_name()}\n")
    print(
        "| variant | s/step | tok/s | of floor | GiB | first step s | loss |\n|---|---|---|---|---|---|---|", flush=True
    )
    tokens = batch_size * context_length
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        rates = pool.submit(measured_rates).result()
        for variant in variants.split(","):
            job = Shape(target, config, rank, batch_size, context_length)
            timing = pool.submit(run_variant, variant, job, steps, profile).result()
            flops = flops_per_token(config, rank, context_length, 0.0 if "-keep" in variant else 1.0)
            floor = flops * tokens / rates["tflops"] / 1e12
            cells = f"{timing.seconds:.3f}", f"{tokens / timing.seconds:,.0f}", f"{floor / timing.seconds:.0%}"
            rest = f"{timing.gib:.1f}", f"{timing.first:.0f}", f"{timing.loss:.4f}"
            print(f"| {' | '.join((variant, *cells, *rest))} |", flush=True)  # a later one may be cut off
    print(f"\nmeasured: bf16 matmul {rates['tflops']:.0f} TFLOP/s, host to device {rates['host_gbs']:.1f} GB/s")
    print("".join(f"{name} {rate:.0f} TFLOP/s; " for name, rate in rates.items() if name.startswith("fp8")))


if __name__ == "__main__":
    fire.Fire(bench)

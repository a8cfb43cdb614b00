"""Tokens per second of a training step on one GPU, against the floor of its arithmetic, with random weights of a real shape.

    python scripts/bench.py --shape llama-8b [--rank 64 --batch_size 4 --context_length 2048 --steps 8 --profile trace.json]

Prints one table: each variant's tokens/s, share of the floor, peak GiB, and the measured matmul and copy rates of the card.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fire
import random_checkpoint
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from fsdp_qlora.build import BuiltModel, build_model
from fsdp_qlora.distributed import Ranks, process_group
from fsdp_qlora.optim import clip_gradients
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings

KINDS = {
    "attention": ("flash", "fmha"),
    "matmul": ("gemm", "nvjet", "cutlass", "sm90_xmma", "cublas"),
    "dequantise": ("dequantize",),
    "copies": ("memcpy", "copy_kernel", "direct_copy"),
    "optimizer": ("adam", "multi_tensor"),
}
"""How kernels are told apart in a profile, by parts of their names; what matches nothing is pointwise."""


def measured_rates() -> dict[str, float]:
    """Return the card's bf16 matmul rate in TFLOP/s and its host link's rate in GB/s, on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = _median_seconds(lambda: a @ b, 10)
    host, device = (
        torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True),
        torch.empty(1 << 28, dtype=torch.uint8, device="cuda"),
    )
    copy = _median_seconds(lambda: device.copy_(host, non_blocking=True), 10)
    return {"tflops": 2 * 8192**3 / matmul / 1e12, "host_gbs": (1 << 28) / copy / 1e9}


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


def flops_per_token(built: BuiltModel, context_length: int, recomputed: float) -> float:
    """Return the floating-point operations a token needs.

    Frozen matrices take 2 a weight forward, 2 for the input gradient and 2 more where they are recomputed; LoRA 6 (8); the
    head 4; causal attention 2 x context x width forward and 2.5 times that backward.
    """
    config = built.skeleton.config
    base = sum(linear.layout.num_weights for linear in _linears(built))
    attention = 2 * context_length * config.hidden_size * config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    return (
        base * (4 + 2 * recomputed)
        + built.num_trainable * (6 + 2 * recomputed)
        + 4 * head
        + attention * (3.5 + recomputed)
    )


def _linears(built: BuiltModel) -> list:  # type: ignore[type-arg]
    from fsdp_qlora.quant.adapt import lora_linears

    return list(lora_linears(built.root))


class Step:
    """One optimizer step on random tokens."""

    def __init__(self, built: BuiltModel, batch_size: int, context_length: int) -> None:
        self.built = built
        torch.manual_seed(0)
        vocab = built.skeleton.config.vocab_size
        ids = torch.randint(0, vocab, (batch_size, context_length + 1), device="cuda")
        self.ids, self.labels = ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1)
        self.positions = torch.arange(context_length, device="cuda").expand(batch_size, -1).contiguous()
        self.documents = torch.arange(batch_size + 1, dtype=torch.int32, device="cuda") * context_length
        self.targets = torch.arange(self.labels.numel(), device="cuda")
        trainable = [parameter for parameter in built.root.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4)

    def __call__(self) -> float:
        """Do a step; return the loss."""
        context_length = self.ids.shape[1]
        out = self.built.root(self.ids, self.positions, self.documents, context_length, self.targets, self.labels)
        loss = out["loss"] / self.labels.numel()
        loss.backward()
        clip_gradients(self.built.root, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item())


def _profile(step: Step, path: str) -> dict[str, float]:
    """Write a trace of one step and return milliseconds by kind of kernel."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as result:
        step()
        torch.cuda.synchronize()
    if path:
        result.export_chrome_trace(path)
    totals: dict[str, float] = dict.fromkeys([*KINDS, "pointwise and other"], 0.0)
    kernels = [e for e in result.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    for event in kernels:
        name = event.key.lower()
        kind = next(
            (kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "pointwise and other"
        )
        totals[kind] += event.self_device_time_total / 1e3
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:18]:
        print(f"  {event.self_device_time_total / 1e3:8.1f} ms {event.count:5d} x {event.key[:100]}")
    return totals


def _measure(
    folder: Path,
    ranks: Ranks,
    rank: int,
    memory: MemorySettings,
    compiled: bool,
    shape: tuple[int, int, int],
    trace: str | None,
) -> tuple[BuiltModel, float, float, float, float, dict[str, float]]:
    batch_size, context_length, steps = shape
    torch.cuda.reset_peak_memory_stats()
    lora = LoraSettings(rank, 16.0)
    built = build_model(folder, ranks, QuantSettings(), lora, torch.bfloat16, memory=memory, compiled=compiled)
    step = Step(built, batch_size, context_length)
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    times, loss = [], 0.0
    for index in range(steps + 2):
        started = time.perf_counter()
        loss = step()
        if index >= 2:
            times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_reserved() / 2**30
    totals = _profile(step, trace) if trace is not None else {}
    return built, statistics.median(times), first, peak, loss, totals


def bench(
    shape: str = "llama-8b",
    num_blocks: int | None = None,
    rank: int = 64,
    batch_size: int = 4,
    context_length: int = 2048,
    steps: int = 6,
    variants: str = "eager,compile,compile-keep",
    profile: str | None = None,
    folder: str | None = None,
) -> None:
    """Measure variants: eager or compile, with full recomputation ('-keep': without; '-offload': all blocks on the CPU)."""
    target = Path(folder or tempfile.mkdtemp())
    if not (target / "config.json").exists():
        random_checkpoint.make(shape, str(target), num_blocks)
    rates = measured_rates()
    table = Table(title=f"{shape}, r {rank}, {batch_size} x {context_length}, {torch.cuda.get_device_name()}")
    for column in ("variant", "s/step", "tok/s", "of floor", "GiB", "first step s", "loss"):
        table.add_column(column)
    blocks = random_checkpoint.llama_config(shape, num_blocks).num_hidden_layers
    with process_group("full", 600) as ranks:
        for variant in variants.split(","):
            keep, offload = "-keep" in variant, "-offload" in variant
            memory = MemorySettings(
                offload_blocks=blocks if offload else 0,
                offload_vocabulary=offload,
                checkpoint_blocks=0 if keep else blocks,
            )
            built, seconds, first, peak, loss, totals = _measure(
                target, ranks, rank, memory, variant.startswith("compile"), (batch_size, context_length, steps), profile
            )
            tokens = batch_size * context_length
            floor = flops_per_token(built, context_length, 0.0 if keep else 1.0) * tokens / rates["tflops"] / 1e12
            table.add_row(
                variant,
                f"{seconds:.3f}",
                f"{tokens / seconds:,.0f}",
                f"{floor / seconds:.0%}",
                f"{peak:.1f}",
                f"{first:.0f}",
                f"{loss:.4f}",
            )
            if totals:
                print(variant, {kind: round(value, 1) for kind, value in totals.items()})
            del built
            gc.collect()
            torch.cuda.empty_cache()
            torch._dynamo.reset()
    Console(width=110).print(table)
    print(f"measured: bf16 matmul {rates['tflops']:.0f} TFLOP/s, host to device {rates['host_gbs']:.1f} GB/s")


if __name__ == "__main__":
    fire.Fire(bench)

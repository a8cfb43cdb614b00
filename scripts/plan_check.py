"""Compare the planner's estimates with what a rank takes: real shapes, random weights, one GPU.

    python scripts/plan_check.py --folder_8b /tmp/llama-8b --folder_70b /tmp/llama-70b [--only 70b --parallel 3]

A world of two is rank 0 of PyTorch's fake process group: its shards, buffers and gathers are real in size, what it gathers
is not real in content. Each run is a process of its own. Prints one row a run: estimated and measured GiB on the GPU
(torch's reserved memory and the CUDA context) and on the host (the process's own memory).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import fire
import random_checkpoint
import torch
import torch.distributed as dist
from demo_70b_two_24gb import own_bytes
from torch.testing._internal.distributed.fake_pg import FakeStore

from fsdp_qlora.build import build_model
from fsdp_qlora.compile_workers import end_compile_workers
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks, make_mesh
from fsdp_qlora.host_memory import GIB
from fsdp_qlora.optim import build_optimizer, gradient_norm
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.plan.model_shape import model_shape
from fsdp_qlora.plan.planner import CONTEXT_BYTES, Run, estimate
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings


@dataclass(frozen=True)
class Case:
    """A run; offload and checkpoint are numbers of blocks, 'all' of offload moves everything else too."""

    shape: str
    world_size: int
    lora_rank: int
    batch_size: int
    context_length: int
    offload: int | str
    checkpoint: int | str
    offload_activations: bool = False
    compiled: bool = True

    def memory(self, count: int) -> MemorySettings:
        """Return the settings for a model of `count` blocks."""
        everything = self.offload == "all"
        return MemorySettings(
            count if everything else int(self.offload),
            everything,
            everything,
            count if self.checkpoint == "all" else int(self.checkpoint),
            self.offload_activations,
        )

    def __str__(self) -> str:
        name = f"{self.shape}, {self.world_size} rank{'s' * (self.world_size > 1)}, r {self.lora_rank}, "
        name += f"{self.batch_size} x {self.context_length}, offloaded {self.offload}, checkpointed {self.checkpoint}"
        return name + ", hidden states offloaded" * self.offload_activations + ", eager" * (not self.compiled)


CASES = (
    Case("8b", 1, 64, 4, 2048, 0, "all"),
    Case("8b", 1, 64, 4, 2048, 0, "all", compiled=False),
    Case("8b", 1, 64, 4, 2048, 0, 0),
    Case("8b", 1, 16, 1, 2048, 0, 0),
    Case("8b", 1, 16, 1, 2048, 0, 0, compiled=False),
    Case("8b", 1, 64, 2, 4096, 0, 16),
    Case("8b", 1, 16, 4, 2048, 16, "all"),
    Case("8b", 1, 16, 1, 32768, 0, "all", True),
    Case("8b", 1, 16, 1, 81920, "all", "all", True),
    Case("8b", 1, 16, 1, 131072, "all", "all", True),
    Case("70b", 2, 16, 1, 2048, "all", "all"),
    Case("70b", 2, 64, 2, 2048, "all", "all", True),
    Case("70b", 2, 64, 2, 2048, "all", 72),
    Case("70b", 2, 16, 1, 2048, 0, "all", True),
    Case("70b", 2, 16, 1, 32768, "all", "all", True),
    Case("70b", 2, 16, 1, 65536, "all", "all", True),
)


def _ranks(world_size: int) -> Ranks:
    """Return rank 0; the fake group answers every collective at once and moves nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    device = torch.device("cuda", 0)
    return Ranks(0, world_size, 0, device, make_mesh(device, world_size, "full"))


def _objects_of_rank_0(found: list[object], own: object, group: object = None) -> None:
    found[:] = [own] * len(found)


def shared_gib() -> dict[str, float]:
    """Return the GiB of this process's shared memory by what it is a mapping of; what the planner does not know is there."""
    found: dict[str, float] = {}
    name = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *others = line.split()
        if not first.endswith(":"):
            name = f"{' '.join(others[4:]) or 'anonymous'} {others[0]}"
        elif first == "Pss:" and name.endswith("s"):  # rw-s: shared
            found[name] = found.get(name, 0) + int(others[0]) / 2**20
    return {name: round(size, 2) for name, size in found.items() if size > 0.1}


def measure(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Return the bytes on the GPU and on the host at their peaks, those torch pinned, and GiB of shared memory by name."""
    ranks = _ranks(case.world_size)
    count = random_checkpoint.llama_config(f"llama-{case.shape}").num_hidden_layers
    with mock.patch.object(dist, "all_gather_object", _objects_of_rank_0):
        built = build_model(
            folder,
            ranks,
            QuantSettings(num_shards=case.world_size),
            LoraSettings(case.lora_rank, 16.0),
            torch.bfloat16,
            memory=case.memory(count),
            compiled=case.compiled,
        )
    optimizer = build_optimizer(built.root, TrainConfig(), built.offloaded)
    shape = (case.batch_size, case.context_length)
    ids = torch.randint(3, 1000, shape, device="cuda")
    positions = torch.arange(case.context_length, device="cuda").expand(shape).contiguous()
    documents = torch.arange(case.batch_size + 1, dtype=torch.int32, device="cuda") * case.context_length
    targets = torch.arange(ids.numel(), device="cuda")
    host = 0
    for _ in range(steps):
        out = built.root(ids, positions, documents, case.context_length, targets, ids.flatten())["loss"]
        out.backward()
        optimizer.step_if_finite(out.detach(), gradient_norm(built.root))
        host = max(host, own_bytes())
        optimizer.zero_grad()
    torch.cuda.synchronize()
    end_compile_workers()
    free, total = torch.cuda.mem_get_info()
    return {
        "gpu": torch.cuda.max_memory_reserved() + CONTEXT_BYTES,
        "allocated": torch.cuda.max_memory_allocated(),
        "context": total - free - torch.cuda.memory_reserved(),
        "host": host,
        "shared": shared_gib(),
        "pinned": torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0),  # by torch: not our arenas
    }


def estimated(case: Case, folder: Path) -> tuple[float, float]:
    """Return what the planner expects of the rank: bytes on the GPU, and on the host while nothing is saved."""
    quant = QuantSettings(num_shards=case.world_size)
    shape = model_shape(folder, quant, LoraSettings(case.lora_rank, 16.0), torch.bfloat16)
    memory = case.memory(len(shape.blocks))
    run = Run(case.batch_size, case.context_length, memory, accumulates=False, compiled=case.compiled)
    wanted = estimate(shape, run)
    return wanted.gpu_bytes, wanted.host_bytes - wanted.host.get("checkpoint being saved", 0)


def _apart(number: int, folder: Path, steps: int) -> dict[str, Any] | str:
    """Measure in a process of its own; return what it said where it failed."""
    command = [sys.executable, __file__, f"--case={number}", f"--folder_{CASES[number].shape}={folder}"]
    result = subprocess.run([*command, f"--steps={steps}"], capture_output=True, text=True)
    if result.returncode:
        return (result.stderr.strip().splitlines() or ["no message"])[-1][:300]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _columns(wanted: float, found: float) -> Iterator[str]:
    yield f"{wanted / GIB:.1f}"
    yield f"{found / GIB:.1f}"
    yield f"{wanted / found - 1:+.0%}"


def main(
    folder_8b: str = "/tmp/llama-8b",
    folder_70b: str = "/tmp/llama-70b",
    only: str = "",
    steps: int = 2,
    parallel: int = 1,
    case: int | None = None,
) -> None:
    """Measure every case, `parallel` at a time; with --case only that one, as JSON.

    Args:
        only: parts of the names of the cases to measure, with | between them (fire makes a number of 81920).
    """
    folders = {"8b": Path(folder_8b), "70b": Path(folder_70b)}
    if case is not None:
        print(json.dumps(measure(CASES[case], folders[CASES[case].shape], steps)))
        return
    numbers = [number for number, one in enumerate(CASES) if any(part in str(one) for part in str(only).split("|"))]
    for shape in {CASES[number].shape for number in numbers}:
        if not (folders[shape] / "config.json").exists():
            random_checkpoint.make(f"llama-{shape}", str(folders[shape]))
    print("| run | GPU estimated | measured | | host estimated | measured | |\n|---|---|---|---|---|---|---|")
    with ThreadPoolExecutor(parallel) as pool:
        runs = {pool.submit(_apart, number, folders[CASES[number].shape], steps): number for number in numbers}
        for run in as_completed(runs):
            number, found = runs[run], run.result()
            if isinstance(found, str):
                print(f"| {CASES[number]} | {found} |", flush=True)
                continue
            gpu, host = estimated(CASES[number], folders[CASES[number].shape])
            cells = [str(CASES[number]), *_columns(gpu, found["gpu"]), *_columns(host, found["host"])]
            rest = f"allocated {found['allocated'] / GIB:.2f}, context {found['context'] / GIB:.2f}"
            rest += f", shared {found['shared']}, pinned by torch {found['pinned'] / GIB:.2f}"
            print(f"| {' | '.join(cells)} | {rest}", flush=True)


if __name__ == "__main__":
    fire.Fire(main)

"""How fast a checkpoint is loaded, against how fast the disk gives the same bytes, in one run.

    python scripts/load_speed.py --folder /tmp/llama-8b [--offload --profile]

The files are dropped from the page cache before each pass, so that all of them come from the disk. A pass that only reads
is made with one reader and with eight; the faster of the two is what the disk gives.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fire
import torch

from fsdp_qlora.build import build_model
from fsdp_qlora.distributed import process_group
from fsdp_qlora.host_memory import GIB
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings

PIECE = 16 << 20


def evict(files: list[Path]) -> None:
    """Write the files to the disk and drop them from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(file: Path) -> int:
    """Read a file piece by piece into the same memory; return its size in bytes."""
    piece, size = bytearray(PIECE), 0
    with file.open("rb", buffering=0) as opened:
        while count := opened.readinto(piece):
            size += count
    return size


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that it takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main(folder: str, offload: bool = False, rank: int = 16, profile: bool = False) -> None:
    """Print the rates in GiB/s."""
    files = sorted(Path(folder).glob("*.safetensors"), key=lambda file: -file.stat().st_size)
    size = sum(file.stat().st_size for file in files)
    rates = {}
    for readers in (1, 8):
        evict(files)
        with ThreadPoolExecutor(readers) as pool:
            rates[f"{readers} readers"] = size / timed(lambda pool=pool: list(pool.map(read, files))) / GIB  # type: ignore[misc]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks = json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"]
    memory = MemorySettings(blocks, offload_vocabulary=True) if offload else MemorySettings()
    with process_group("full", 600, device=device) as ranks:
        for state in ("from the disk", "from the page cache"):
            if state == "from the disk":
                evict(files)
            profiler = cProfile.Profile()
            with profiler if profile else torch.no_grad():
                built = build_model(
                    Path(folder), ranks, QuantSettings(), LoraSettings(rank, 16.0), torch.bfloat16, memory=memory
                )
            rates[f"loaded {state}"] = built.report.bytes_read / built.report.seconds / GIB
            if profile:
                pstats.Stats(profiler).sort_stats("tottime").print_stats(12)
            del built
    print(f"{folder}: {size / GIB:.2f} GiB; " + ", ".join(f"{name} {rate:.2f} GiB/s" for name, rate in rates.items()))
    disk = max(rates["1 readers"], rates["8 readers"])
    print(f"loading is at {rates['loaded from the disk'] / disk:.0%} of what the disk gives")


if __name__ == "__main__":
    fire.Fire(main)

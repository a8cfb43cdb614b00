"""Fine-tune a 70B-shaped model as two 24 GB cards would, on one large GPU (or two), and print what it took.

    python scripts/demo_70b_two_24gb.py --folder /tmp/llama-70b [--lora_rank 64 --batch_size 2 --gpu_memory 24 ...]

Makes a random-weight checkpoint in bitsandbytes' pre-quantised format (once, 37 GB), then runs the real
`torchrun --nproc_per_node 2 train.py`. Each process may use only --gpu_memory GiB. On one GPU the two ranks talk through
gloo, which is slow; on two, through NCCL. Further --name value pairs go to train.py. With --results FILE a table row is
appended to a Markdown file.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fire
import random_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def _children(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += _children(int(child))
    return found


def own_bytes(pid: int | str = "self") -> int:
    """Return the RAM of a process that is its own: pinned memory, no page cache, a share of shared pages."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if ":" in line
    )
    return sum(int(fields[name].split()[0]) * 1024 for name in ("Pss_Anon", "Pss_Shmem"))


class HostMeter(threading.Thread):
    """Samples the RAM of a process and all its children; `peak` holds the bytes of each when their sum was largest."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak = pid, [0]

    def run(self) -> None:
        """Sample until the process is gone."""
        while Path(f"/proc/{self.pid}").exists():
            try:
                sizes = [own_bytes(pid) for pid in _children(self.pid)]
            except (OSError, ValueError, KeyError):
                sizes = []  # a process ended while being read
            self.peak = max(self.peak, sizes, key=sum)
            time.sleep(0.5)


def figures(record: dict[str, Any], metrics: list[dict[str, Any]], host_bytes: list[int]) -> dict[str, object]:
    """Return the columns of the table: of a run's record, its metrics and the RAM of its processes at their peak."""
    by_rank = record["result"]["ranks"]
    steps = [line for line in metrics if "loss" in line]
    usual = steps[1:] or steps
    sizes = sorted((f"{size / 2**30:.1f}" for size in host_bytes), key=float, reverse=True)
    return {
        "load s": max(round(rank["load_seconds"], 1) for rank in by_rank),
        "GiB read per rank": max(round(rank["bytes_read"] / 2**30, 2) for rank in by_rank),
        "GPU GiB reserved": max(rank["peak_gpu_gib"] for rank in by_rank),
        "host GiB, all": f"{sum(host_bytes) / 2**30:.1f} (processes: {' '.join(sizes[:4])} ...)",
        "first step s": steps[0]["step_seconds"],
        "s per step": statistics.median(line["step_seconds"] for line in usual),
        "tok/s": statistics.median(line["tokens_per_second"] for line in usual),
        "losses": " ".join(f"{line['loss']:.4f}" for line in steps),
    }


def main(
    folder: str,
    shape: str = "llama-70b",
    num_blocks: int | None = None,
    ranks: int = 2,
    steps: int = 2,
    output_dir: str = "/tmp/demo-70b",
    timeout_s: int = 540,
    results: str = "",
    **flags: str,
) -> None:
    """Run the demonstration and print a table."""
    model = Path(folder)
    if not (model / "data.jsonl").exists():
        random_checkpoint.make(shape, folder, num_blocks)
    settings = {
        "model": folder,
        "dataset": model / "data.jsonl",
        "dataset_format": "text",
        "eval_split": 0,
        "max_steps": steps,
        "gradient_accumulation_steps": 1,
        "output_dir": output_dir,
        "overwrite": "true",
        **flags,
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", str(ROOT / "train.py")]
    command = [sys.executable, *torchrun, *(f"--{name}={value}" for name, value in settings.items())]
    log = Path(output_dir) / "metrics.jsonl"
    log.unlink(missing_ok=True)
    started = time.monotonic()
    process = subprocess.Popen(command)
    meter = HostMeter(process.pid)
    meter.start()
    try:
        code = process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        code = process.wait()
    metrics = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if code != 0:
        done = [f"{line['step_seconds']} s, loss {line['loss']:.4f}" for line in metrics if "loss" in line]
        sys.exit(
            f"train.py ended with {code} after {time.monotonic() - started:.0f} s; steps: {'; '.join(done) or 'none'}"
        )
    record = json.loads((Path(output_dir) / "run.json").read_text())
    title = f"{shape}, " + ", ".join(f"{name} {value}" for name, value in flags.items())
    row = {"run": title, "ranks": ranks, **figures(record, metrics, meter.peak)}
    verified = record["config"]["verify_weights"]
    print(
        f"\nwall {time.monotonic() - started:.0f} s, base {record['base']['fingerprint']}, bytes verified: {verified}"
    )
    print("\n".join(f"  {name:<18} {value}" for name, value in row.items()))
    if results:
        table = Path(results)
        lines = [] if table.exists() else [" | ".join(row), " | ".join("---" for _ in row)]
        lines.append(" | ".join(str(value) for value in row.values()))
        with table.open("a") as file:
            file.writelines(f"| {line} |\n" for line in lines)


if __name__ == "__main__":
    fire.Fire(main)

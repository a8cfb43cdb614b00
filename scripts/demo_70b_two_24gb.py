"""Fine-tune a 70B-shaped model as two 24 GB cards would, on one large GPU (or two), and print what it took.

    python scripts/demo_70b_two_24gb.py --folder /tmp/llama-70b [--lora_rank 64 --batch_size 2 --gpu_memory 24 ...]

Makes a random-weight checkpoint in bitsandbytes' pre-quantised format (once, 37 GB), then runs the real
`torchrun --nproc_per_node 2 train.py`. Each process may use only --gpu_memory GiB. On one GPU the two ranks talk through
gloo, which is slow; on two, through NCCL. Further --name value pairs go to train.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

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


def main(
    folder: str,
    shape: str = "llama-70b",
    num_blocks: int | None = None,
    ranks: int = 2,
    steps: int = 2,
    output_dir: str = "/tmp/demo-70b",
    timeout_s: int = 540,
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
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), str(ROOT / "train.py")]
    command += [f"--{name}={value}" for name, value in settings.items()]
    started = time.monotonic()
    process = subprocess.Popen(command)
    meter = HostMeter(process.pid)
    meter.start()
    code = process.wait(timeout=timeout_s)
    if code != 0:
        sys.exit(f"train.py ended with {code} after {time.monotonic() - started:.0f} s")
    record = json.loads((Path(output_dir) / "run.json").read_text())
    metrics = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    result = record["result"]
    print(f"\n{shape}, {ranks} ranks, settings {flags}")
    print(f"  wall seconds             {time.monotonic() - started:.0f}")
    print(f"  load seconds             {[round(rank['load_seconds'], 1) for rank in result['ranks']]}")
    print(f"  GiB read per rank        {[round(rank['bytes_read'] / 2**30, 2) for rank in result['ranks']]}")
    print(f"  peak GPU GiB reserved    {[rank['peak_gpu_gib'] for rank in result['ranks']]}")
    sizes = sorted((f"{size / 2**30:.1f}" for size in meter.peak), key=float, reverse=True)
    print(f"  peak host GiB            {sum(meter.peak) / 2**30:.1f} (processes: {' '.join(sizes)})")
    print(f"  seconds per step         {[line['step_seconds'] for line in metrics if 'loss' in line]}")
    print(f"  losses                   {[round(line['loss'], 4) for line in metrics if 'loss' in line]}")
    print(
        f"  base fingerprint         {record['base']['fingerprint']}"
        f" (gathered bytes verified: {record['config']['verify_weights']})"
    )


if __name__ == "__main__":
    fire.Fire(main)

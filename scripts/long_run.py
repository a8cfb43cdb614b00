"""Whether a long run slows down, grows or waits for its data: runs the real train.py and looks at it from outside.

    python scripts/long_run.py --model llama-8b --dataset demo --max_steps 500 [--batch_size 4 ...]

All --name value pairs go to train.py. Prints a row for each tenth of the run: median seconds of a step, the longest wait
for data, and GPU and host memory.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import fire
from demo_70b_two_24gb import ROOT, own_bytes

PARTS = 10


def main(output_dir: str = "/tmp/long-run", **flags: str) -> None:
    """Run, sample the process's own memory while it runs, and print the table."""
    settings = {**flags, "output_dir": output_dir, "overwrite": "true"}
    started = time.time()
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *(f"--{k}={v}" for k, v in settings.items())])
    host: list[tuple[float, int]] = []
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError, KeyError):  # it may just have ended
            host.append((time.time(), own_bytes(process.pid)))
        time.sleep(0.5)
    if process.returncode:
        sys.exit(f"train.py ended with {process.returncode} after {time.time() - started:.0f} s")
    lines = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if "step_seconds" in line]
    print("| steps | s per step | longest wait for data, s | GPU GiB | host GiB |\n|---|---|---|---|---|")
    for part in range(PARTS):
        ours = records[part * len(records) // PARTS : (part + 1) * len(records) // PARTS]
        begin, end = ours[0]["time"], ours[-1]["time"]
        sizes = [size for at, size in host if begin <= at <= end] or [0]
        cells = [
            f"{ours[0]['step']} to {ours[-1]['step']}",
            round(statistics.median(one["step_seconds"] for one in ours), 3),
        ]
        cells += [max(one["data_seconds"] for one in ours), max(one["peak_gpu_gib"] for one in ours)]
        print(f"| {' | '.join(map(str, cells))} | {statistics.median(sizes) / 2**30:.2f} |")


if __name__ == "__main__":
    fire.Fire(main)

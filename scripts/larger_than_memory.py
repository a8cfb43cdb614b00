"""Prepare and train on a file larger than the memory that the program may have; prints what it took.

    python scripts/larger_than_memory.py --folder /tmp/large --file_mib 1536 --limit_mib 1280

The limit is the system's own (RLIMIT_DATA: everything a process allocates; pages of mapped files, which the system takes
back when it needs them, are not counted). A process that asks for more gets an error. The train command runs twice, the
second time from the middle, and both must end with the same adapter.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

WORDS_PER_ROW = 300
NUM_WORDS = 20_000
MIB = 2**20


def write_rows(path: Path, size: int) -> int:
    """Write rows of made-up words until the file has the size; return how many."""
    choose = random.Random(0)
    letters = "etaoinshrdlu"
    words = ["".join(choose.choices(letters, k=choose.randint(2, 9))) for _ in range(NUM_WORDS)]
    num_rows = 0
    with path.open("w") as file:
        while file.tell() < size:
            text = " ".join(choose.choices(words, k=WORDS_PER_ROW))
            file.write(json.dumps({"text": text}) + "\n")
            num_rows += 1
    return num_rows


def memory_of(pid: int) -> dict[str, int]:
    """Return the bytes that a process has, by the names of /proc; nothing once it has ended."""
    try:
        lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    except OSError:
        return {}
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[2:] == ["kB"]}


def run_limited(arguments: list[str], limit: int) -> None:
    """Run a command of this program under the limit; print what it says and the most memory it had."""

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    print("$ fsdp-qlora " + " ".join(arguments), flush=True)
    started, most = time.monotonic(), {"RssAnon": 0, "VmHWM": 0}
    program = "import sys; from fsdp_qlora.cli import main; main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], preexec_fn=restrict)
    while process.poll() is None:
        now = memory_of(process.pid)
        most = {name: max(value, now.get(name, 0)) for name, value in most.items()}
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"failed with exit code {process.returncode}")
    print(
        f"-> {time.monotonic() - started:.0f} s, at most {most['RssAnon'] / MIB:.0f} MiB of its own memory, and"
        f" {most['VmHWM'] / MIB:.0f} MiB with the pages of mapped files (VmHWM)\n",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--file_mib", type=int, default=1536)
    parser.add_argument("--limit_mib", type=int, default=1280)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    rows, limit = options.folder / "rows.jsonl", options.limit_mib * MIB
    num_rows = write_rows(rows, options.file_mib * MIB)
    print(
        f"{rows.name}: {num_rows:,} rows, {rows.stat().st_size / MIB:.0f} MiB; limit {options.limit_mib} MiB\n",
        flush=True,
    )
    cache = options.folder / "tokens"
    common = [f"--dataset={rows}", f"--token_cache={cache}", "--context_length=512", "--batch_size=1"]
    run_limited(["data", *common, "--num_samples=0"], limit)
    size = sum(path.stat().st_size for path in cache.rglob("*"))
    print(f"tokens on disk: {size / MIB:.0f} MiB\n", flush=True)
    common += ["--max_steps=4", "--save_steps=2", "--gradient_accumulation_steps=1", "--eval_split=0"]
    common += ["--lora_rank=8", "--activation_checkpointing=full"]
    first, second = options.folder / "first", options.folder / "second"
    run_limited(["train", *common, f"--output_dir={first}"], limit)
    middle = first / "checkpoints" / "step-000002"
    run_limited(["train", *common, f"--output_dir={second}", f"--resume={middle}"], limit)
    adapters = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (first, second)]
    print("the adapter of the resumed run is", "the same" if adapters[0] == adapters[1] else "ANOTHER ONE")


if __name__ == "__main__":
    main()

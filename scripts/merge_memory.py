"""Quantise and merge a model that is larger than the memory the process may have.

    python scripts/merge_memory.py --folder /tmp/merge-memory [--num_blocks 3] [--limit_gib 2.5]

Makes a checkpoint of random bf16 weights of the Llama-8B shape and a LoRA adapter for it, then runs `quantize` and `merge`,
each in a process that may hold `limit_gib` of data (RLIMIT_DATA: all of its memory but program files; page cache is the
system's), and prints the model's size, the limit, and each process's peak of resident memory. The limit must also have room
for an embedding in float32 that is reserved for a moment and never used: the model is first made without weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fire
import torch
from random_checkpoint import block_shapes, llama_config, save_tokenizer
from safetensors.torch import save_file
from torch import Tensor

from fsdp_qlora.output_files import CONFIG_FILE, WEIGHTS_FILE

RANK = 16

PROGRAM = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from fsdp_qlora.cli import main
main(sys.argv[2:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def random_matrix(shape: tuple[int, int]) -> Tensor:
    """Return small random values; the same few million over and over, because making them takes longest."""
    count = shape[0] * shape[1]
    values = (torch.randn(min(count, 1 << 22)) * 0.02).bfloat16()
    return values.repeat(-(-count // values.numel()))[:count].view(shape)


def make(folder: Path, num_blocks: int) -> tuple[Path, Path]:
    """Write base and adapter; return their folders."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    config = llama_config("llama-8b", num_blocks)
    weight_map: dict[str, str] = {}
    updates: dict[str, Tensor] = {}

    def save(tensors: dict[str, Tensor], file: str) -> None:
        save_file(tensors, base / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for index in range(num_blocks):
        tensors: dict[str, Tensor] = {}
        for name, shape in block_shapes(config).items():
            layer = f"model.layers.{index}.{name}"
            tensors[f"{layer}.weight"] = random_matrix(shape)
            updates[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(RANK, shape[1]) * 0.02
            updates[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(shape[0], RANK) * 0.02
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{name}.weight"] = torch.ones(config.hidden_size, dtype=torch.bfloat16)
        save(tensors, f"block-{index:03d}.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        save({name: random_matrix((config.vocab_size, config.hidden_size))}, f"{name.split('.')[-2]}.safetensors")
    save({"model.norm.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16)}, "norm.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.dtype = torch.bfloat16
    config.save_pretrained(base)
    save_tokenizer(base)
    save_file(updates, adapter / WEIGHTS_FILE)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": str(base)}
    (adapter / CONFIG_FILE).write_text(json.dumps(settings))
    return base, adapter


def run_limited(arguments: list[str], limit_bytes: int) -> None:
    """Run a command of the program with limited memory; print its lines, its time and its peak."""
    started = time.monotonic()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", PROGRAM, str(limit_bytes), *arguments]
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    *_, peak = process.stdout.split()
    lines = [line for line in process.stdout.splitlines() if "GB," not in line and "computing" not in line]
    print("\n".join(lines[:-1]))
    print(
        f"{arguments[0]}: {time.monotonic() - started:.0f} s, peak of resident memory {int(peak) / 2**20:.2f} GiB",
        flush=True,
    )


def run(folder: str, num_blocks: int = 3, limit_gib: float = 2.5) -> None:
    """Make the model, then quantise and merge it under the limit."""
    base, adapter = make(Path(folder), num_blocks)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    print(f"model: {size / 2**30:.2f} GiB; limit: {limit_gib:.2f} GiB of data for each command", flush=True)
    limit = int(limit_gib * 2**30)
    run_limited(["quantize", "--model", str(base), "--output_dir", f"{folder}/4bit"], limit)
    run_limited(["merge", "--adapter", str(adapter), "--output_dir", f"{folder}/merged"], limit)


if __name__ == "__main__":
    fire.Fire(run)

"""Random pairs of runs that differ only in how the work is laid out, whose losses must therefore be the same.

    python -m scripts.random_layouts --seed 1 --pairs 60

A pair is a tiny model and what is trained, by the real train.py in float32 on CPUs: 4 steps, laid out twice over ranks,
micro-batches, sharding, offloading, checkpointing, storage and chunks of the MLP. Prints a line a pair, and ends with 1 if
any two differ by more than rounding or a run fails. About 20 s a pair on two cores.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fire

from scripts.random_checkpoint import save_tokenizer
from tests.tiny import FAMILIES, save_tiny

ROOT = Path(__file__).resolve().parents[1]
SEQUENCES = 4
"""Of an optimizer step, over all ranks and micro-batches."""

TOLERANCE = 2e-6

ENTRY = """
import runpy, sys
sys.path.insert(0, {root!r})
from fsdp_qlora import chunked_mlp
chunked_mlp.CHUNK_TOKENS = int(sys.argv.pop(1))
runpy.run_path({train!r}, run_name="__main__")
"""
TEXT = "the cat dog runs over under a hill river stone blue green quickly then and it was never there"


def training(choose: random.Random) -> dict[str, Any]:
    """Return what is trained: settings that change the mathematics."""
    family = choose.choice(sorted(FAMILIES))
    has_experts = "num_experts_per_tok" in FAMILIES[family]
    settings: dict[str, Any] = {"model": family, "context_length": choose.choice((48, 64, 128))}
    settings |= {
        "packing": choose.choice(("true", "false")),
        "lr": choose.choice((1e-3, 3e-4)),
        "seed": choose.randrange(9),
    }
    settings |= {"max_grad_norm": choose.choice((1.0, 0.3)), "eval_split": choose.choice((0, 0.1))}
    settings |= {"eval_steps": 2} if settings["eval_split"] else {}
    if choose.random() < 0.15 and not has_experts:
        return settings | {"train_type": "full"}
    settings |= {"lora_rank": choose.choice((4, 8)), "quant_type": choose.choice(("nf4", "nf4", "fp4", "none"))}
    sometimes: dict[str, Any] = {"loraplus_lr_ratio": 4, "use_rslora": "true", "modules_to_save": "embed_tokens"}
    sometimes |= {"lora_target_parameters": "experts"} if has_experts else {"use_dora": "true"}
    return settings | {name: value for name, value in sometimes.items() if choose.random() < 0.2}


def layout(choose: random.Random, full: bool) -> tuple[int, int, dict[str, Any]]:
    """Return number of ranks, tokens of a chunk of the MLP, and settings that must not change the mathematics."""
    ranks = choose.choice((1, 2, 2))
    batch_size = choose.choice((1, 2, 4)[: 4 - ranks])
    sharding = choose.choice(("full", "full", "none", "hybrid"))
    settings: dict[str, Any] = {"sharding": sharding, "batch_size": batch_size}
    settings["gradient_accumulation_steps"] = SEQUENCES // (ranks * batch_size)
    settings["cpu_offload"] = (
        "none" if sharding == "none" else choose.choice(("none", "all") + ("auto", "2") * (not full))
    )
    settings["activation_checkpointing"] = choose.choice(("auto", "full", "none", "2"))
    if settings["activation_checkpointing"] != "none":
        settings["activation_offload"] = choose.choice(("true", "false"))
    if not full:
        settings["quant_storage"] = choose.choice(("float32", "bfloat16", "float16", "uint8"))
    return ranks, choose.choice((10, 8192)), settings


class Failure(Exception):
    """A run did not end well; says how."""


def run(
    folder: Path, trained: dict[str, Any], ranks: int, chunk_tokens: int, laid_out: dict[str, Any]
) -> dict[str, float]:
    """Train; return every loss by what and when."""
    model = folder / trained["model"]
    if not model.exists():
        save_tokenizer(save_tiny(trained["model"], model))
    flags = {**trained, **laid_out, "model": model, "dataset": folder / "data.jsonl", "dataset_format": "text"}
    flags |= {"precision": "fp32", "max_steps": 4, "warmup_ratio": 0, "output_dir": folder / "run", "overwrite": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [folder / "entry.py", str(chunk_tokens), *(f"--{name}={value}" for name, value in flags.items())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode:
        said = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        raise Failure(said[0] if said else result.stderr[-3000:])
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {f"{kind} {line['step']}": line[kind] for line in lines for kind in ("loss", "eval_loss") if kind in line}


def main(seed: int = 0, pairs: int = 20) -> None:
    """Compare `pairs` pairs; the same seed makes the same pairs."""
    choose = random.Random(seed)
    worst, failed = 0.0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "entry.py").write_text(ENTRY.format(root=str(ROOT), train=str(ROOT / "train.py")))
        texts = [" ".join(choose.choices(TEXT.split(), k=choose.randint(4, 70))) for _ in range(60)]
        (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        for number in range(pairs):
            trained = training(choose)
            layouts = [layout(choose, "train_type" in trained) for _ in range(2)]
            try:
                one, other = (run(folder, trained, *laid_out) for laid_out in layouts)
                assert one.keys() == other.keys()
                difference = max(abs(one[key] / other[key] - 1) for key in one)
                problem = f"differ by {difference:.1e}" if difference > TOLERANCE else ""
                worst = max(worst, difference)
            except Failure as failure:
                problem = str(failure)
            failed += bool(problem)
            print(f"{number + 1}: {trained['model']}: {problem or 'the same'}", flush=True)
            if problem:
                print(f"  {trained}\n  {layouts[0]}\n  {layouts[1]}", flush=True)
    print(f"{pairs} pairs, {failed} not the same; largest relative difference {worst:.1e}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    fire.Fire(main)

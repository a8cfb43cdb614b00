"""Write docs/after_training.md: every command of the page is run on the small model, and its output is what the page shows.

python scripts/after_training_report.py     (about three minutes on two CPU cores)
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "after_training.md"

PEFT = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fsdp_qlora.models.hub import resolve

base = resolve("smollm2-135m")  # the small model is no hub model; of others give the hub id to from_pretrained
form = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(base, quantization_config=form, dtype="float32")
model = PeftModel.from_pretrained(model, "runs/demo/adapter")
tokenizer = AutoTokenizer.from_pretrained("runs/demo/adapter")
chat = [{"role": "user", "content": "What is 7 * 8? Answer with the number only."}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""

MERGED = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("models/merged")
chat = [{"role": "user", "content": "What is 7 * 8? Answer with the number only."}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
for folder in ("models/merged", "models/merged-4bit"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    print(folder, tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""

TRAIN = "fsdp-qlora train --max_steps 3 --lr 1e-3 --context_length 256 --output_dir runs/demo"
MERGE = "fsdp-qlora merge --adapter runs/demo"

SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "An adapter",
        "Three steps on the demo data: too few to learn arithmetic, enough to move the logits.",
        (TRAIN,),
    ),
    (
        "PEFT",
        "`runs/demo/adapter` is in PEFT's own format. Load the base in the form it had in training (`run.json` says which).",
        (PEFT,),
    ),
    (
        "Merge",
        "One checkpoint that stands on its own, written matrix by matrix. The table says how far its logits are from those"
        " of base + adapter, on the files as written; the second row is what the other `--merge_base` would have given. The"
        " adapter was trained beside the 4-bit base, so the dequantised weights are what it fits; the rounding of the result"
        " to bf16 is the rest of the first row (`--output fp32` leaves it out). Quantising the result again can undo the"
        " merge: an update smaller than half a step between 4-bit values is rounded away, as here after three"
        " steps; `merge` warns.",
        (
            f"{MERGE} --output_dir models/merged",
            f"{MERGE} --output_dir models/merged-fp32 --output fp32",
            f"{MERGE} --output_dir models/merged-4bit --output 4bit",
            MERGED,
        ),
    ),
    (
        "Quantise",
        "A model as a bitsandbytes checkpoint, with bitsandbytes' own bytes: smaller to keep and load, also for training.",
        (
            "fsdp-qlora quantize --model smollm2-135m --output_dir models/base-4bit",
            "du -sh models/merged models/base-4bit",
        ),
    ),
    (
        "Push",
        "`--dry_run` prints the model card and the files, and sends nothing; without it HF_TOKEN must be set.",
        ("fsdp-qlora push --folder runs/demo --repo me/demo --private --dry_run",),
    ),
)

SERVE = """## vLLM and llama.cpp

Not run by this project's tests. Both read what `merge` writes:

```bash
vllm serve models/merged
python convert_hf_to_gguf.py models/merged --outtype bf16 --outfile merged.gguf    # of llama.cpp
```

vLLM can also apply an adapter beside a base (`--enable-lora --max-lora-rank 64 --lora-modules demo=runs/demo/adapter`). It
then computes with the base in the form that vLLM loads it in, which is the trained one only if that is the 4-bit one.
"""


def run(command: str, folder: Path) -> str:
    """Run a shell command or a Python program; return what it printed on its standard output."""
    program = [sys.executable, "-c", command] if command.startswith("from ") else ["bash", "-c", command]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "HF_HUB_OFFLINE": "1"}
    print(f"running: {command.splitlines()[0]}", flush=True)
    result = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{command}\n{result.stdout}{result.stderr}")
    return "\n".join(line.rstrip() for line in result.stdout.strip().splitlines())


def main() -> None:
    parts = ["# After training", f"Written by `python {Path(__file__).relative_to(ROOT)}`: CPU, float32, SmolLM2-135M."]
    parts.append("The times are those of a machine that was busy with other work.")
    with tempfile.TemporaryDirectory() as folder:
        for title, text, commands in SECTIONS:
            parts += [f"## {title}", text]
            for command in commands:
                output = run(command, Path(folder))
                language = "python" if command.startswith("from ") else "bash"
                fence = "````" if "```" in output else "```"
                parts.append(f"```{language}\n{command.strip()}\n```\n\n{fence}text\n{output}\n{fence}")
    parts.append(SERVE)
    page = "\n\n".join(parts)
    PAGE.write_text(re.sub(r"\n{3,}", "\n\n", page.rstrip() + "\n"))


if __name__ == "__main__":
    main()

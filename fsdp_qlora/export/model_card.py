"""The model card of an adapter or a merged model, written from the record of its run; no secrets, no local folders."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from fsdp_qlora.models.aliases import ALIASES
from fsdp_qlora.redact import redact
from fsdp_qlora.settings import show

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

SETTINGS = (
    "train_type",
    "dataset",
    "train_on",
    "context_length",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "batch_size",
    "gradient_accumulation_steps",
    "lr",
    "lr_scheduler",
    "warmup_ratio",
    "weight_decay",
    "precision",
    "seed",
)
"""Settings of the run that the card shows."""


def without_folders(value: object) -> object:
    """Return a value with the folders of an absolute path left out; others as they are."""
    if isinstance(value, str) and (value.startswith(("/", "~")) or re.match(r"[A-Za-z]:\\", value)):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def hub_id(name: str) -> str | None:
    """Return the hub id that a model's name stands for; None for a local one."""
    if name in ALIASES:
        return ALIASES[name].repo or ALIASES[name].original
    return name if HUB_ID.fullmatch(name) else None


def _command(text: str) -> str:
    words = (word.partition("=") for word in shlex.split(text))
    plain = (
        (name, sign, without_folders(value)) if sign else (without_folders(name), "", "") for name, sign, value in words
    )
    return " ".join(shlex.quote(f"{name}{sign}{value}") for name, sign, value in plain)


def is_full(record: Mapping[str, Any]) -> bool:
    """Return whether a record is that of full fine-tuning, and not of something merged."""
    return record.get("config", {}).get("train_type") == "full" and "merge" not in record


def metadata(base: str, is_adapter: bool, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card's metadata, by the hub's names.

    Args:
        base: the base model as the adapter or the merge names it.
    """
    data: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fsdp-qlora"] if is_full(record) else ["qlora", "lora", "fsdp-qlora"],
    }
    if (repo := hub_id(base)) is not None:
        data |= {"base_model": repo, "base_model_relation": "adapter" if is_adapter else "finetune"}
    names = str(record.get("config", {}).get("dataset", "")).split(",")
    repos = [name.strip().split(":")[0].split("@")[0] for name in names]
    if known := [repo for repo in repos if HUB_ID.fullmatch(repo) and not PurePath(repo).suffix]:
        data["datasets"] = known
    return data


def body(repo: str, base: str, is_adapter: bool, record: Mapping[str, Any]) -> str:
    """Return the card's text in Markdown."""
    base = str(without_folders(base))
    shown = hub_id(base) or base
    kind = f"A LoRA adapter for `{shown}`" if is_adapter else f"`{shown}` with a LoRA adapter merged into it"
    kind = f"`{shown}` with all parameters fine-tuned" if is_full(record) else kind
    parts = [f"# {repo.split('/')[-1]}", f"{kind}, trained with fsdp_qlora {_version(record)}."]
    if base in ALIASES and ALIASES[base].repo is None:
        parts.append("In training the base was a copy of it that was made from 4-bit (GGUF) values.")
    parts.append("## Use")
    parts.append(_usage(repo, shown, is_adapter, record.get("base", {})))
    if "result" in record:
        parts += ["## Results", _table(("", "value"), _results(record["result"]))]
    if "merge" in record:
        parts += ["## Merging", _merging(record["merge"])]
    if "config" in record:
        parts += ["## Training", _training(record)]
    if "versions" in record:
        rows = [(name, str(version)) for name, version in record["versions"].items()]
        parts += ["## Versions", _table(("package", "version"), rows)]
    return redact("\n\n".join(parts) + "\n")


def _version(record: Mapping[str, Any]) -> str:
    return str(record.get("versions", {}).get("fsdp_qlora", "")).strip() or "(version unknown)"


def _usage(repo: str, base: str, is_adapter: bool, form: Mapping[str, Any]) -> str:
    """Return code that loads the model; an adapter's base in the form that it had in training."""
    names = ["AutoModelForCausalLM", "AutoTokenizer"]
    lines = [f'model = AutoModelForCausalLM.from_pretrained("{repo}")']
    if is_adapter:
        lines = [
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
            f'model = PeftModel.from_pretrained(base, "{repo}")',
        ]
        if form.get("quant_type") in ("nf4", "fp4"):
            names.append("BitsAndBytesConfig")
            lines[:1] = [
                "form = BitsAndBytesConfig(",
                f'    load_in_4bit=True, bnb_4bit_quant_type="{form["quant_type"]}",'
                f" bnb_4bit_use_double_quant={form['double_quant']}",
                ")",
                f'base = AutoModelForCausalLM.from_pretrained("{base}", quantization_config=form)',
            ]
    imports = ["from peft import PeftModel"] if is_adapter else []
    imports.append(f"from transformers import {', '.join(names)}")
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{repo}")')
    return "\n".join(["```python", *imports, "", *lines, "```"])


def _results(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("optimizer steps", f"{result['steps']:,}"), ("tokens", f"{result['tokens']:,}")]
    if result["train_loss"] is not None:  # as of a run that had no step left to do
        rows.append(("training loss, last step", f"{result['train_loss']:.4f}"))
    for title, key in (("before", "eval_loss_before"), ("after", "eval_loss_after")):
        if result.get(key) is not None:
            loss = float(result[key])
            rows.append((f"evaluation loss {title}", f"{loss:.4f} (perplexity {math.exp(loss):.2f})"))
    return rows


def _merging(merge: Mapping[str, Any]) -> str:
    form = f"{merge['quant_type']}, double quantisation {show(merge['double_quant'])}"
    base = f"quantised to 4 bits ({form})" if merge["quant_type"] in ("nf4", "fp4") else f"in {merge['quant_type']}"
    text = (
        f"The adapter was trained on the base {base} and was added to the {merge['merge_base']} weights."
        f" Output: {merge['output']}."
    )
    if "logit_errors" not in merge:
        return text
    rows = [
        (title, f"{error['mean']:.2e}", f"{error['divergence']:.2e}", f"{error['agreement']:.1%}")
        for title, error in merge["logit_errors"].items()
    ]
    header = ("adapter added to", "mean logit error", "KL divergence", "same next token")
    return f"{text} Distance of the logits from base + adapter on a few prompts:\n\n{_table(header, rows)}"


def _training(record: Mapping[str, Any]) -> str:
    config = record["config"]
    names = [name for name in SETTINGS if not (is_full(record) and name.startswith("lora_"))]
    rows = [(name, f"`{show(without_folders(config[name]))}`") for name in names if name in config]  # type: ignore[arg-type]
    base = record.get("base", {})
    if "quant_type" in base and not is_full(record):
        form = f"{base['quant_type']}, double quantisation {show(base['double_quant'])}"
        rows = [("base in training", form), ("base fingerprint", f"`{base.get('fingerprint')}`"), *rows]
    rows.append(("ranks", f"{record.get('world_size')} x {record.get('device')}"))
    return f"{_table(('setting', 'value'), rows)}\n\n```bash\n{_command(record.get('command', ''))}\n```"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""Settings of model and data that several commands share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelSettings:
    """Which model."""

    # --- model ---
    model: str = "smollm2-135m"
    """Alias (llama-70b, qwen3-32b, ...), hub id (owner/name) or local folder with safetensors weights."""

    revision: str | None = None
    """Branch, tag or commit of a hub model; default: the main branch."""


@dataclass(frozen=True)
class BaseSettings:
    """In which form the base is held."""

    # --- base weights ---
    train_type: Literal["lora", "full"] = "lora"
    """lora: the base is frozen and LoRA is trained beside it; full: every parameter of the model is trained, held in float32
    with gradient and optimizer state (16 bytes a weight), sharded over the ranks."""

    quant_type: Literal["auto", "nf4", "fp4", "none"] = "auto"
    """4-bit code of the frozen base, or none to hold it in the dtype of --precision, sharded and offloaded all the same;
    auto: nf4, and none with --train_type full. Ignored for checkpoints that are already quantised, which keep theirs."""

    double_quant: bool = True
    """Quantise the block scales too (0.37 bit per weight less); bitsandbytes' double quantisation."""

    compute_dtype: Literal["same", "fp8"] = "same"
    """Products of the frozen 4-bit base: same, in the dtype of --precision; or fp8 (e4m3), for which activations, gradients
    and weights are rounded to 4 significant bits, while LoRA and all else stays in bf16. For Ada, Hopper and newer GPUs."""

    @property
    def base_form(self) -> str:
        """What --quant_type means: nf4, fp4 or none."""
        return self.quant_type if self.quant_type != "auto" else "none" if self.train_type == "full" else "nf4"


@dataclass(frozen=True)
class RowSettings:
    """How a dataset becomes sequences of tokens."""

    # --- data ---
    dataset: str = "demo"
    """Local .jsonl/.json/.csv/.parquet file, hub dataset (owner/name, owner/name@revision:config:split), or 'demo'
    (arithmetic questions made on the spot; 'demo-test': others, for evaluation); for training also several, separated by
    commas."""

    dataset_format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """Form of the rows; auto looks at the column names of the first row."""

    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that count in the loss: the model's answers and tool calls, only the last of them, or everything."""

    chat_template: str | None = None
    """File with a Jinja chat template to use in the place of the model's own; it is saved with the adapter."""

    bad_rows: Literal["stop", "skip"] = "stop"
    """A malformed row stops the run with its line number, or is skipped, counted and listed."""

    context_length: int = 2048
    """Tokens per sequence. Longer examples are cut at the end; those left without a target token are dropped."""

    packing: bool = True
    """Fill sequences with several examples, which cannot see each other; false: one example a sequence, padded, and
    examples of alike lengths near each other."""

    token_cache: str = "auto"
    """Folder for tokenised datasets, which ranks share and later runs use again; auto: among this program's cached files;
    none: every rank tokenises, in memory."""

    hub_streaming: bool = False
    """Read hub datasets as a stream: their tokens are kept on disk and the download is not, so that other settings
    download again."""

    seed: int = 42
    """Seed of shuffling, of LoRA initialisation and of dropout."""


@dataclass(frozen=True)
class DataSettings(RowSettings, ModelSettings):
    """What decides the tokens that a model learns from."""

    # --- data ---
    dataset_weights: str | None = None
    """How often each of several datasets is seen in an epoch, such as 1,0.25,3; default: once."""

    eval_dataset: str | None = None
    """Dataset to evaluate on, in the same forms as --dataset, or several: name=dataset,name2=dataset2; default: rows held
    out from --dataset."""

    eval_split: float = 0.05
    """Share of --dataset held out for evaluation when --eval_dataset is not given (at most 1,000 rows); 0: none."""


def named_datasets(text: str) -> dict[str, str]:
    """Return the datasets of an --eval_dataset value by name; one without a name is called ''."""
    if not re.match(r"[\w-]+=", text):
        return {"": text}
    return dict(part.strip().split("=", 1) for part in text.split(","))


def is_named_datasets(text: str) -> bool:
    """Return whether named_datasets can read the text, and no name is there twice."""
    if not re.match(r"[\w-]+=", text):
        return True
    parts = [part.strip() for part in text.split(",")]
    names = [part.split("=", 1)[0] for part in parts]
    return all(re.fullmatch(r"[\w-]+=.+", part) for part in parts) and len(set(names)) == len(names)


def weights_of(config: DataSettings) -> list[float]:
    """Return the weight of each training dataset."""
    if config.dataset_weights is None:
        return [1.0] * len(config.dataset.split(","))
    return [float(weight) for weight in config.dataset_weights.split(",")]


def training_datasets(config: DataSettings) -> list[str]:
    """Return the datasets to train on."""
    return [dataset.strip() for dataset in config.dataset.split(",")]

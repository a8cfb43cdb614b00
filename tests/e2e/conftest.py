"""A tiny base model with a tokenizer of its own and a dataset of questions it can learn in a few steps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import save_tiny

TEMPLATE = (
    "{% for message in messages %}<|begin|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
"""Each turn between two control tokens, in the manner of ChatML."""

SECRET = "hf_0123456789abcdef0123456789abcdef01234567"
"""Stands in the environment of every subprocess, and must be found nowhere else."""

COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sky": "blue", "the sun": "yellow"}
QUESTIONS = ("What is the colour of {}?", "Which colour has {}?", "Tell me the colour of {}.", "What colour is {}?")


def rows() -> list[dict[str, object]]:
    """Return 24 conversations."""
    return [
        {
            "messages": [
                {"role": "user", "content": question.format(thing)},
                {"role": "assistant", "content": f"The colour of {thing} is {colour}."},
            ]
        }
        for question in QUESTIONS
        for thing, colour in COLOURS.items()
    ]


def save_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE tokenizer on the dataset's sentences and save it beside a tiny model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([json.dumps(row) for row in rows()], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer; not to be changed."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("e2e") / "tiny-llama", num_hidden_layers=2)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversations as a file; not to be changed."""
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment of subprocesses: no GPU, no network, few threads, no leftovers of torchrun; and secrets."""
    removed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    secrets = dict.fromkeys(("HF_TOKEN", "WANDB_API_KEY"), SECRET)
    return kept | secrets | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

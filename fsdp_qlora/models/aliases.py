"""Short names of models, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """Where a short name leads to."""

    repo: str | None
    """Hub id; None for the model that is made from a Python package, without the hub."""

    bits: int = 16
    """4: a checkpoint already quantised by bitsandbytes, a quarter of the download."""

    gated: bool = False
    """The licence must be accepted on the model page, and HF_TOKEN set, before the download."""

    original: str | None = None
    """Hub id of the model that repo=None is a copy of: published adapters name it as their base."""


ALIASES: dict[str, Alias] = {
    "smollm2-135m": Alias(None, original="HuggingFaceTB/SmolLM2-135M-Instruct"),
    "smollm2-1.7b": Alias("HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    "llama-1b": Alias("meta-llama/Llama-3.2-1B-Instruct", gated=True),
    "llama-3b": Alias("meta-llama/Llama-3.2-3B-Instruct", gated=True),
    "llama-8b": Alias("meta-llama/Llama-3.1-8B-Instruct", gated=True),
    "llama-8b-4bit": Alias("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", bits=4),
    "llama-70b": Alias("meta-llama/Llama-3.3-70B-Instruct", gated=True),
    "llama-70b-4bit": Alias("unsloth/Llama-3.3-70B-Instruct-bnb-4bit", bits=4),
    "llama-405b": Alias("meta-llama/Llama-3.1-405B-Instruct", gated=True),
    "mistral-7b": Alias("mistralai/Mistral-7B-Instruct-v0.3"),
    "mistral-7b-4bit": Alias("unsloth/mistral-7b-instruct-v0.3-bnb-4bit", bits=4),
    "qwen2.5-7b": Alias("Qwen/Qwen2.5-7B-Instruct"),
    "qwen2.5-7b-4bit": Alias("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", bits=4),
    "qwen2.5-72b": Alias("Qwen/Qwen2.5-72B-Instruct"),
    "qwen2.5-72b-4bit": Alias("unsloth/Qwen2.5-72B-Instruct-bnb-4bit", bits=4),
    "qwen3-0.6b": Alias("Qwen/Qwen3-0.6B"),
    "qwen3-1.7b": Alias("Qwen/Qwen3-1.7B"),
    "qwen3-4b": Alias("Qwen/Qwen3-4B"),
    "qwen3-8b": Alias("Qwen/Qwen3-8B"),
    "qwen3-14b": Alias("Qwen/Qwen3-14B"),
    "qwen3-32b": Alias("Qwen/Qwen3-32B"),
    "qwen3-32b-4bit": Alias("unsloth/Qwen3-32B-bnb-4bit", bits=4),
    "gemma2-9b": Alias("google/gemma-2-9b-it", gated=True),
    "gemma2-9b-4bit": Alias("unsloth/gemma-2-9b-it-bnb-4bit", bits=4),
    "gemma2-27b": Alias("google/gemma-2-27b-it", gated=True),
    "gemma2-27b-4bit": Alias("unsloth/gemma-2-27b-it-bnb-4bit", bits=4),
    "gemma3-1b": Alias("google/gemma-3-1b-it", gated=True),
    "gemma3-27b": Alias("google/gemma-3-27b-it", gated=True),
    # Microsoft's own Phi-3 repositories ask for custom code, which is never run; these hold the weights without it.
    "phi3-mini": Alias("unsloth/Phi-3-mini-4k-instruct"),
    "phi3-medium": Alias("unsloth/Phi-3-medium-4k-instruct"),
    "phi4": Alias("microsoft/phi-4"),
    "mistral-small-24b": Alias("unsloth/Mistral-Small-3.2-24B-Instruct-2506"),
    "smollm3-3b": Alias("HuggingFaceTB/SmolLM3-3B"),
    "olmo2-7b": Alias("allenai/OLMo-2-1124-7B-Instruct"),
    "olmo2-32b": Alias("allenai/OLMo-2-0325-32B-Instruct"),
    "olmo3-7b": Alias("allenai/Olmo-3-7B-Instruct"),
    "granite-2b": Alias("ibm-granite/granite-3.3-2b-instruct"),
    "granite-8b": Alias("ibm-granite/granite-3.3-8b-instruct"),
    "command-r7b": Alias("CohereLabs/c4ai-command-r7b-12-2024", gated=True),
    "command-r-35b": Alias("CohereLabs/c4ai-command-r-v01", gated=True),
    "aya-8b": Alias("CohereLabs/aya-expanse-8b", gated=True),
    "glm4-9b": Alias("zai-org/GLM-4-9B-0414"),
    "glm4-32b": Alias("zai-org/GLM-4-32B-0414"),
    "exaone4-32b": Alias("LGAI-EXAONE/EXAONE-4.0-32B"),
    "qwen3-30b-a3b": Alias("Qwen/Qwen3-30B-A3B-Instruct-2507"),
    "qwen3-coder-30b-a3b": Alias("Qwen/Qwen3-Coder-30B-A3B-Instruct"),
    "qwen3-235b-a22b": Alias("Qwen/Qwen3-235B-A22B-Instruct-2507"),
    "mixtral-8x7b": Alias("mistralai/Mixtral-8x7B-Instruct-v0.1"),
}

"""The model families this trainer handles, as data. Adding one: a row here and a tiny model in tests/tiny.py."""

from __future__ import annotations

from dataclasses import dataclass

from fsdp_qlora.errors import ModelError


@dataclass(frozen=True)
class Family:
    """What the trainer must know of a family beyond what transformers' own definition says.

    Attributes:
        title: name for the documentation.
        text_prefixes: how the names of the language model's tensors may begin in a checkpoint that holds more than
            the language model (images), as pairs (prefix in the checkpoint, prefix in transformers' text-only model).
        renamed: parts of tensors' names in a checkpoint, and what they are called here.
        other_prefixes: how the names of tensors begin that the language model does not need.
        adapter_prefix: how the names of the decoder's modules begin in the model that an adapter is applied to.
        last_linear: the layer (or the experts) whose output does nothing but enter a block's final sum, None if something
            follows it.
        logit_factor, logit_divisor: settings of config.json by which the logits are multiplied or divided, if any.
    """

    title: str
    text_prefixes: tuple[tuple[str, str], ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    other_prefixes: tuple[str, ...] = ()
    adapter_prefix: str = "model."
    last_linear: str | None = "mlp.down_proj"
    logit_factor: str | None = None
    logit_divisor: str | None = None


IMAGE_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 2, Llama 3, SmolLM2"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen2, Qwen2.5"),
    "qwen3": Family("Qwen3"),
    "gemma2": Family("Gemma 2", last_linear=None),
    "gemma3_text": Family("Gemma 3 (text)", last_linear=None),
    "gemma3": Family(
        "Gemma 3 (text part of the image models)",
        text_prefixes=(
            ("language_model.model.", "model."),
            ("model.language_model.", "model."),
            ("language_model.lm_head.", "lm_head."),
        ),
        other_prefixes=IMAGE_PARTS,
        adapter_prefix="model.language_model.",
        last_linear=None,
    ),
    "gemma": Family("Gemma"),
    "phi3": Family("Phi-3, Phi-3.5, Phi-4"),
    "mistral3": Family(
        "Mistral Small 3.1 and 3.2, Ministral 3 (text part of the image models)",
        text_prefixes=(
            ("language_model.model.", "model."),
            ("model.language_model.", "model."),
            ("language_model.lm_head.", "lm_head."),
        ),
        other_prefixes=IMAGE_PARTS,
        adapter_prefix="model.language_model.",
    ),
    "ministral3": Family("Ministral 3 (text)"),
    "olmo2": Family("OLMo 2", last_linear=None),
    "olmo3": Family("OLMo 3", last_linear=None),
    "granite": Family("Granite 3", logit_divisor="logits_scaling"),
    "cohere": Family("Command R, Aya", logit_factor="logit_scale"),
    "cohere2": Family("Command A, Command R7B, Tiny Aya", logit_factor="logit_scale"),
    "smollm3": Family("SmolLM3"),
    "glm": Family("GLM-4 (9B chat, Edge)"),
    "glm4": Family("GLM-4 0414, GLM-Z1", last_linear=None),
    "exaone4": Family("EXAONE 4", last_linear=None),
    "ernie4_5": Family("ERNIE 4.5 (dense)"),
    "qwen3_moe": Family("Qwen3 mixture of experts", last_linear="mlp.experts"),
    "qwen2_moe": Family("Qwen1.5 and Qwen2 mixture of experts, with a shared expert", last_linear="mlp.experts"),
    "mixtral": Family(
        "Mixtral",
        renamed=(
            (".block_sparse_moe.", ".mlp."),
            (".w1.weight", ".gate_proj.weight"),
            (".w3.weight", ".up_proj.weight"),
            (".w2.weight", ".down_proj.weight"),
        ),
        last_linear="mlp.experts",
    ),
}
"""Keyed by `model_type` of config.json."""


def family_of(model_type: str) -> Family:
    """Return the family of a config's model_type; ModelError lists what is supported."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"model_type '{model_type}' is not supported; supported are {', '.join(FAMILIES)}"
            " (a further family is a row in fsdp_qlora/models/families.py)"
        )
    return FAMILIES[model_type]

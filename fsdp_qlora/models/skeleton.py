"""The model without its weights: transformers' own definition with every parameter on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fsdp_qlora.errors import ConfigError, ModelError
from fsdp_qlora.models.attention import ATTENTION
from fsdp_qlora.models.families import Family, family_of


@dataclass
class Skeleton:
    """A causal language model whose parameters are on the meta device and whose buffers are real.

    Attributes:
        model: transformers' model; `model.model` is the decoder without the head.
        config: its (text) configuration.
        family: what else the trainer knows of it.
        tied: whether the head shares its weight with the embedding.
    """

    model: PreTrainedModel
    config: PretrainedConfig
    family: Family
    tied: bool

    @property
    def decoder(self) -> nn.Module:
        decoder: nn.Module = self.model.model
        return decoder

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = self.model.model.layers
        return blocks

    @property
    def embedding(self) -> nn.Module:
        embedding: nn.Module = self.model.model.embed_tokens
        return embedding

    @property
    def vocabulary(self) -> nn.Module:
        """The module that holds the head's weight [vocab, hidden]: the embedding where they are tied."""
        return self.embedding if self.tied else self.model.lm_head

    def last_linear(self, block: nn.Module) -> nn.Module | None:
        """Return the layer (or the experts) of a block whose output only enters the block's sum, if there is one."""
        name = self.family.last_linear
        return block.get_submodule(name) if name is not None else None

    @property
    def logit_softcap(self) -> float | None:
        return getattr(self.config, "final_logit_softcapping", None)

    @property
    def logit_scale(self) -> float:
        """What the head's product is multiplied by to give the logits (Granite, Cohere)."""
        if self.family.logit_divisor is not None:
            return 1.0 / float(getattr(self.config, self.family.logit_divisor))
        return float(getattr(self.config, self.family.logit_factor)) if self.family.logit_factor is not None else 1.0


def check_context(context_length: int, longest: int | None) -> None:
    """Raise ConfigError for a context that is longer than the model's positions; None: it names no limit."""
    if longest is not None and context_length > longest:
        raise ConfigError(
            f"context_length {context_length} is longer than the model's {longest} positions; use at most {longest}"
        )


def read_config(folder: Path) -> tuple[PretrainedConfig, Family]:
    """Return the text configuration of a model folder and its family; ModelError for unsupported ones."""
    raw: dict[str, Any] = PretrainedConfig.get_config_dict(folder, local_files_only=True)[0]
    if "auto_map" in raw:
        raise ModelError(
            f"{folder}: config.json asks for custom code (auto_map), which is never run; use a model without"
        )
    family = family_of(raw.get("model_type", "<none>"))
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "text_config"):
        config = config.text_config
    return config, family


def build_skeleton(folder: Path, dtype: torch.dtype, attention: str = ATTENTION) -> Skeleton:
    """Build the model of a checkpoint folder without reading its weights.

    Args:
        folder: holds config.json.
        dtype: dtype of the computation and of every parameter that is not quantised.
        attention: name of the attention implementation; the trainer's own by default.

    Raises:
        ModelError: unsupported family or a config that asks for custom code.
    """
    config, family = read_config(folder)
    config.use_cache = False
    for name in config.to_dict():
        if name.endswith(("dropout", "pdrop")):
            setattr(config, name, 0.0)  # for pre-training; a block that runs again in backward would draw other masks
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Buffers (rotary tables, embedding scales) are not in checkpoints, so they are built for real; parameters are not.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.requires_grad_(False)
    tied = bool(config.tie_word_embeddings)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return Skeleton(model, config, family, tied)

"""Full fine-tuning: every parameter of the model is trained, as a float32 master that is cast when it is gathered."""

from __future__ import annotations

import torch
from torch import nn

from fsdp_qlora.errors import ModelError
from fsdp_qlora.models.skeleton import Skeleton
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, block_experts, quantize_and_adapt
from fsdp_qlora.quant.lora import VOCABULARY, whole_modules


def prepare(
    skeleton: Skeleton, quant: QuantSettings, lora: LoraSettings | None, dtype: torch.dtype, full: bool
) -> tuple[str, ...]:
    """Make a model the one that is trained: a quantised base with LoRA beside it, or (`full`) everything.

    Returns:
        The names in transformers' model of those of embedding and head that are trained.

    Raises:
        ModelError: as `quantize_and_adapt`, `whole_modules` and `train_everything`.
    """
    if full:
        train_everything(skeleton)
        return tuple(VOCABULARY.values())
    quantize_and_adapt(skeleton, quant, lora, dtype)
    return whole_modules(lora, skeleton.tied)


def train_everything(skeleton: Skeleton) -> None:
    """Make every parameter but embedding and head, which are ShardedVocabulary's business, a trained float32 one.

    Raises:
        ModelError: a model whose parameters are not those of its checkpoint, one by one.
    """
    if block_experts(skeleton):
        raise ModelError(
            "train_type full: this model is a mixture of experts, of which only LoRA can be trained; use --train_type lora"
        )
    for module in skeleton.model.modules():
        if module in (skeleton.embedding, skeleton.model.lm_head):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, dtype=torch.float32)))

"""AdamW over the LoRA matrices, LoRA+, learning-rate schedules and gradient clipping."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_qlora.config import TrainConfig

FASTER = ("lora_B", "lora_magnitude_vector")
"""Ends of the names of the parameters that LoRA+ gives another learning rate."""


def build_optimizer(root: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over every trainable parameter; its state is sharded and placed like the parameters.

    Each group has an entry `lr_ratio`, by which `learning_rate` is multiplied for it.

    Source: LoRA+ (arXiv 2402.12354), with PEFT's choice of what learns faster.
    """
    faster: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in root.named_parameters():
        if parameter.requires_grad:
            (faster if name.endswith(FASTER) and config.loraplus_lr_ratio != 1 else others).append(parameter)
    groups = [{"params": others, "lr_ratio": 1.0}, {"params": faster, "lr_ratio": config.loraplus_lr_ratio}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,  # one pass over the parameters; the default makes a pass, and memory, for every operation
    )


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of a step (counted from 0): a linear warm-up, then the schedule, reaching 0 at the end."""
    num_warmup = math.ceil(config.warmup_ratio * num_steps)
    if step < num_warmup:
        return config.lr * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    if config.lr_scheduler == "constant":
        return config.lr
    if config.lr_scheduler == "linear":
        return config.lr * (1 - progress)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradients(root: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to a global norm of `max_norm` (0: leave them) and return the norm before.

    The norm is that of the whole gradient over all shards, not of this rank's part.
    """
    trainable = [parameter for parameter in root.parameters() if parameter.requires_grad]
    gradients = [parameter.grad for parameter in trainable if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(trainable, max_norm, norm)
    return float(norm.item())

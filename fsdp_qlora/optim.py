"""AdamW over the LoRA matrices, LoRA+, learning-rate schedules and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks

FASTER = ("lora_B", "lora_magnitude_vector")
"""Ends of the names of the parameters that LoRA+ gives another learning rate."""

BUCKET_BYTES = 64 * 2**20
"""Gradients that are summed over replicas in one exchange."""


def local(value: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


class ShardedAdamW(torch.optim.AdamW):
    """AdamW on this rank's rows of the parameters as plain tensors.

    Given DTensors, AdamW has the GPU wait while the CPU unwraps those of several hundred matrices (docs/cuda.md).

    Attributes:
        shards: by parameter, what AdamW knows in its place: this rank's rows, or itself if it is not sharded.
        found_inf: torch's fused AdamW changes nothing where this is 1.
    """

    found_inf: Tensor

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        parameters = [parameter for group in groups for parameter in group["params"]]
        self.shards = {p: nn.Parameter(local(p.detach())) if isinstance(p, DTensor) else p for p in parameters}
        super().__init__(
            [{**group, "params": [self.shards[parameter] for parameter in group["params"]]} for group in groups],
            **settings,
        )
        self.register_step_pre_hook(ShardedAdamW._look_up_shards)

    @torch.no_grad()
    def _look_up_shards(self, *_: object) -> None:
        for parameter, shard in self.shards.items():
            if shard is not parameter:
                shard.data = local(parameter)  # FSDP may put rows into other memory in its first forward
                shard.grad = None if parameter.grad is None else local(parameter.grad)

    def step_if_finite(self, *values: Tensor) -> None:
        """Update the parameters unless a value is NaN or infinite.

        The GPU decides: the CPU need not wait for the values before it goes on.
        """
        finite = torch.isfinite(torch.stack(values)).all()
        if any(not shard.is_cuda for shard in self.shards.values()):
            finite = finite.cpu()  # AdamW would copy it there without waiting for it
        self.found_inf = 1.0 - finite.float()
        self.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the parameters and of their shards."""
        super().zero_grad(set_to_none)
        for parameter in self.shards:
            parameter.grad = None


def build_optimizer(root: nn.Module, config: TrainConfig) -> ShardedAdamW:
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
    return ShardedAdamW(
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


@torch.no_grad()
def sum_replicas(root: nn.Module, ranks: Ranks) -> None:
    """Replace the gradients of parameters that FSDP does not hold by their sums over the ranks that hold copies of them.

    Once a step, after its last micro-batch. Every rank must call this.
    """
    if ranks.num_replicas == 1:
        return
    parameters = [p for p in root.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    for bucket in _buckets(parameters):
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=ranks.replicate_group)
        pieces = flat.split_with_sizes([p.numel() for p in bucket])
        for parameter, piece in zip(bucket, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield runs of parameters of up to BUCKET_BYTES, or of a single one."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and size + parameter.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket


def clip_gradients(root: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients down to a global norm of `max_norm` (0: leave them) and return the norm before, a scalar.

    The norm is that of the whole gradient over all shards, not of this rank's part.
    """
    gradients = [parameter.grad for parameter in root.parameters() if parameter.grad is not None]
    with torch.no_grad():
        parts = [local(gradient) for gradient in gradients]
        norm = _norm_of_shards(torch.nn.utils.get_total_norm(parts), gradients)
        if max_norm > 0:
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            for device in {part.device for part in parts}:
                torch._foreach_mul_([part for part in parts if part.device == device], factor.to(device))
    return norm


def _norm_of_shards(norm: Tensor, gradients: list[Tensor]) -> Tensor:
    """Return the norm over all shards from that of this rank's; replicas, which have the same gradients, do not count."""
    if not (gradients and isinstance(gradients[0], DTensor)):
        return norm
    mesh = gradients[0].device_mesh
    squared = norm.to(mesh.device_type).square()
    dist.all_reduce(squared, group=mesh.get_group(mesh.ndim - 1))
    return squared.sqrt()

"""AdamW over the LoRA matrices, LoRA+, learning-rate schedules and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fsdp_qlora.activation_checkpointing import Block
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.host_updates import HostUpdates

Group = dict[str, Any]
"""A parameter group, as torch.optim has them."""

FASTER = ("lora_B", "lora_magnitude_vector")
"""Ends of the names of the parameters that LoRA+ gives another learning rate."""

BUCKET_BYTES = 64 * 2**20
"""Gradients that are summed over replicas in one exchange."""


def local(value: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


class ShardedAdamW(torch.optim.AdamW):
    """AdamW on this rank's rows of the parameters as plain tensors, with clipping; see `build_optimizer`.

    Given DTensors, AdamW has the GPU wait while the CPU unwraps those of several hundred matrices (docs/cuda.md).

    Args:
        groups: as of any optimizer.
        max_grad_norm: what the norm of the gradient is scaled down to (0: it is left).
        blocks: all decoder blocks.
        beside: by place among them, the groups of parameters, held by FSDP, that are updated while the next forward runs.

    Attributes:
        shards: by parameter, what AdamW knows in its place: this rank's rows, or itself if it is not sharded.
        found_inf: torch's fused AdamW changes nothing where this is 1.
    """

    found_inf: Tensor

    def __init__(
        self,
        groups: list[Group],
        max_grad_norm: float,
        blocks: Sequence[nn.Module],
        beside: Mapping[int, list[Group]],
        **settings: Any,
    ) -> None:
        every = [group for own in (groups, *beside.values()) for group in own]
        parameters = [parameter for group in every for parameter in group["params"]]
        self.shards = {p: nn.Parameter(local(p.detach())) if isinstance(p, DTensor) else p for p in parameters}
        self.max_grad_norm = max_grad_norm
        super().__init__(self._of_shards(groups), **settings)
        self._beside = {place: torch.optim.AdamW(self._of_shards(own), **settings) for place, own in beside.items()}
        for optimizer in self._beside.values():
            optimizer.state = self.state
        self._updates = HostUpdates(blocks, self._beside)

    def _of_shards(self, groups: list[Group]) -> list[Group]:
        return [{**group, "params": [self.shards[parameter] for parameter in group["params"]]} for group in groups]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every group to `lr` times the group's `lr_ratio`."""
        self.finish()
        for optimizer in (self, *self._beside.values()):
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_ratio"]

    @torch.no_grad()
    def step_if_finite(self, loss: Tensor, norm: Tensor) -> None:
        """Clip the gradients and update the parameters, unless the loss or the norm of the gradient is NaN or infinite.

        The GPU decides: the CPU need not wait for the values before it goes on.
        """
        self.finish()
        self._look_up_shards()
        finite = torch.isfinite(torch.stack([loss, norm])).all()
        limit = self.max_grad_norm if self.max_grad_norm > 0 else math.inf
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        for device in {gradient.device for gradient in gradients}:
            torch._foreach_mul_([g for g in gradients if g.device == device], factor.to(device))
        self._updates.start(finite, factor)
        if any(not gradient.is_cuda for gradient in gradients):
            finite = finite.cpu()  # AdamW would copy it there without waiting for it
        self.found_inf = 1.0 - finite.float()
        self.step()

    def finish(self) -> None:
        """Wait for the updates that run beside the forward: for whoever reads parameters or state outside of a forward."""
        self._updates.finish()

    def _look_up_shards(self) -> None:
        for parameter, shard in self.shards.items():
            if shard is not parameter:
                shard.data = local(parameter)  # FSDP may put rows into other memory in its first forward
                shard.grad = None if parameter.grad is None else local(parameter.grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the parameters and of their shards, but for those that an update still needs."""
        super().zero_grad(set_to_none)
        for parameter in self.shards:
            parameter.grad = None


def build_optimizer(
    root: nn.Module, config: TrainConfig, offloaded: Collection[tuple[nn.Module, str]] = ()
) -> ShardedAdamW:
    """Return AdamW over every trainable parameter; its state is sharded and placed like the parameters.

    Each group has an entry `lr_ratio`, by which `learning_rate` is multiplied for it.

    Args:
        offloaded: what rests in CPU memory, as (module, name); of the decoder blocks it is updated beside the next forward.

    Source: LoRA+ (arXiv 2402.12354), with PEFT's choice of what learns faster.
    """
    blocks = [module for module in root.modules() if isinstance(module, Block)]
    place_of = {module: place for place, block in enumerate(blocks) for module in block.modules()}
    beside = {getattr(module, name): place_of[module] for module, name in offloaded if module in place_of}
    trained: dict[int | None, dict[str, nn.Parameter]] = {None: {}}
    for name, parameter in root.named_parameters():
        if parameter.requires_grad:
            trained.setdefault(beside.get(parameter), {})[name] = parameter
    groups = {place: _groups(parameters, config) for place, parameters in trained.items()}
    return ShardedAdamW(
        groups.pop(None),
        config.max_grad_norm,
        blocks,
        {place: own for place, own in groups.items() if place is not None},
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
        fused=True,  # one pass over the parameters; the default makes a pass, and memory, for every operation
    )


def _groups(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> list[Group]:
    """Return the group of most parameters and, where LoRA+ has any, that of those that learn faster."""
    faster = [name for name in parameters if name.endswith(FASTER) and config.loraplus_lr_ratio != 1]
    others = [parameters[name] for name in parameters if name not in faster]
    groups = [{"params": others, "lr_ratio": 1.0}]
    if faster:
        groups.append({"params": [parameters[name] for name in faster], "lr_ratio": config.loraplus_lr_ratio})
    return groups


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


@torch.no_grad()
def gradient_norm(root: nn.Module) -> Tensor:
    """Return the norm of the whole gradient over all shards, not of this rank's part; a scalar.

    Every rank must call this.
    """
    gradients = [parameter.grad for parameter in root.parameters() if parameter.grad is not None]
    parts = [local(gradient) for gradient in gradients]
    on_gpu, in_host = ([part for part in parts if part.is_cuda is where] for where in (True, False))
    norms = [torch.stack(torch._foreach_norm(on_gpu))] if on_gpu else []
    if in_host:
        found = torch.stack(_norms_in_host_memory(in_host))
        norms.append(found.to(on_gpu[0].device) if on_gpu else found)
    norm = torch.linalg.vector_norm(torch.cat(norms)) if norms else torch.zeros(())
    return _norm_of_shards(norm, gradients)


def _norms_in_host_memory(parts: list[Tensor]) -> list[Tensor]:
    """Return the norm of each; PyTorch's runs in one thread."""
    num_threads = torch.get_num_threads()
    size = -(-len(parts) // num_threads)
    runs = [parts[start : start + size] for start in range(0, len(parts), size)]
    with ThreadPoolExecutor(num_threads) as threads:
        return [norm for norms in threads.map(_norms, runs) for norm in norms]


def _norms(parts: list[Tensor]) -> list[Tensor]:
    return [torch.linalg.vector_norm(part) for part in parts]


def _norm_of_shards(norm: Tensor, gradients: list[Tensor]) -> Tensor:
    """Return the norm over all shards from that of this rank's; replicas, which have the same gradients, do not count."""
    if not (gradients and isinstance(gradients[0], DTensor)):
        return norm
    mesh = gradients[0].device_mesh
    squared = norm.to(mesh.device_type).square()
    dist.all_reduce(squared, group=mesh.get_group(mesh.ndim - 1))
    return squared.sqrt()

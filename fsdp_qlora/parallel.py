"""Everything that turns the plain model into the one that is trained, in one place and one order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from fsdp_qlora.distributed import Ranks
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.loss import chunked_cross_entropy
from fsdp_qlora.models.skeleton import Skeleton
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, lora_linears, quantize_and_adapt


class CheckpointedBlock(nn.Module):
    """A decoder block of which only the input is kept; backward runs it again."""

    def __init__(self, block: nn.Module, preserve_rng_state: bool) -> None:
        super().__init__()
        self.block = block
        self.preserve_rng_state = preserve_rng_state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block; arguments and results are the block's own."""
        if not torch.is_grad_enabled():
            return self.block(*args, **kwargs)
        return checkpoint(self.block, *args, use_reentrant=False, preserve_rng_state=self.preserve_rng_state, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Look up what transformers reads off a block (such as its attention type) on the block."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class LossModel(nn.Module):
    """The root that FSDP sees: tokens in, sum of token losses out."""

    def __init__(self, skeleton: Skeleton) -> None:
        super().__init__()
        self.model = skeleton.model
        self.vocabulary = skeleton.vocabulary
        self.softcap = skeleton.logit_softcap

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        target_positions: Tensor,
        target_ids: Tensor,
    ) -> dict[str, Tensor]:
        """Return {'loss': sum of the token losses}, a dict so that FSDP finds the tensor to hook backward on.

        Args:
            input_ids, position_ids: int64 [batch, tokens].
            cu_seqlens, max_seqlen: document boundaries, see models/attention.py.
            target_positions: int64 [targets], positions among the batch * tokens ones that predict a target.
            target_ids: int64 [targets], the tokens to predict there.
        """
        hidden = self.model.model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            max_length_q=max_seqlen,
        ).last_hidden_state
        targets = hidden.flatten(0, 1).index_select(0, target_positions)
        return {"loss": self._loss(targets, target_ids)}

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        # The head is gathered by hand: through FSDP's hooks it would be gathered once more in backward, for nothing.
        if isinstance(self.vocabulary, FSDPModule):
            self.vocabulary.unshard()
        head = self.vocabulary.weight
        assert isinstance(head, Tensor)
        loss = chunked_cross_entropy(hidden, head, labels, self.softcap)
        if isinstance(self.vocabulary, FSDPModule):
            self.vocabulary.reshard()
        return loss


@dataclass
class Parallelized:
    """The model ready to be loaded and trained.

    Attributes:
        root: the module to call.
        units: what is loaded, sharded and gathered together, in the order of use.
        names: name in transformers' model of each module that owns parameters.
        offloaded: the modules whose parameters rest in CPU memory.
    """

    root: LossModel
    units: list[nn.Module]
    names: dict[nn.Module, str]
    offloaded: set[nn.Module] = field(default_factory=set)


def parallelize(
    skeleton: Skeleton,
    ranks: Ranks,
    quant: QuantSettings,
    lora: LoraSettings | None,
    dtype: torch.dtype,
    *,
    cpu_offload: bool,
    activation_checkpointing: bool,
    shard: bool = True,
) -> Parallelized:
    """Apply, in this order: quantise -> adapt -> activation checkpointing -> shard. All on the meta device.

    Args:
        skeleton: the model; changed in place.
        shard: hand the parameters to FSDP; without, the model is a plain one (for generation in one process).
        cpu_offload: keep sharded parameters in pinned CPU memory between uses.
        activation_checkpointing: keep only each block's input for backward.

    Raises:
        ModelError: a LoRA target that matches nothing.
        ConfigError: a quant_storage that FSDP would corrupt.
    """
    quantize_and_adapt(skeleton, quant, lora, dtype)
    names = {module: name for name, module in skeleton.model.named_modules()}
    blocks = skeleton.blocks
    if activation_checkpointing:
        for index, block in enumerate(blocks):
            blocks[index] = CheckpointedBlock(block, preserve_rng_state=lora is not None and lora.dropout > 0)
    root = LossModel(skeleton)
    units = [skeleton.embedding, *blocks, *([] if skeleton.tied else [skeleton.vocabulary]), root]
    if not shard:
        return Parallelized(root, units, names)
    if skeleton.tied:
        # FSDP would take the shared weight for a parameter of the root's own; the loss reads it off the embedding
        skeleton.model.lm_head = nn.Identity()
    for block in blocks:
        _refuse_corrupting_storage(block)
    policy: OffloadPolicy = OffloadPolicy()
    if cpu_offload:
        policy = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    for unit in units:
        # Parameters keep their dtypes (no MixedPrecisionPolicy): a policy that casts would destroy packed bytes.
        fully_shard(unit, mesh=ranks.mesh, offload_policy=policy)
    _configure_fsdp(root, blocks)
    offloaded = set(root.modules()) if cpu_offload else set()
    return Parallelized(root, units, names, offloaded)


def _refuse_corrupting_storage(block: nn.Module) -> None:
    """Raise ConfigError for a block whose parameters all have one 16-bit dtype.

    FSDP gathers such a block in that dtype with torch._foreach_copy_, which changes NaN bit patterns of 16-bit floats on
    CUDA (pytorch#159333), and so the packed bytes; a block of mixed dtypes is gathered as bytes.
    """
    dtypes = {parameter.dtype for parameter in block.parameters()}
    packed = next((linear.layout for linear in lora_linears(block)), None)
    if packed is not None and packed.storage_dtype.itemsize == 2 and len(dtypes) == 1:
        raise ConfigError(
            f"quant_storage {packed.storage}: a block without float32 LoRA matrices would be corrupted by FSDP;"
            " use --quant_storage float32"
        )


def _configure_fsdp(root: nn.Module, blocks: nn.ModuleList) -> None:
    """Sum gradients over ranks (the loss is already divided by the global token count); prefetch the next block."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    sharded = [block for block in blocks if isinstance(block, FSDPModule)]
    for current, following in itertools.pairwise(sharded):
        current.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([current])


def device_allocator(device: torch.device, offloaded: set[nn.Module]) -> Callable[..., Tensor]:
    """Return the allocator for the loader: CPU memory for offloaded modules, the device for the others."""

    def allocate(module: nn.Module, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if module not in offloaded:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")

    return allocate

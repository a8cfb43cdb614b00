"""Everything that turns the plain model into the one that is trained, in one place and one order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from fsdp_qlora.activation_checkpointing import Block, HiddenStore
from fsdp_qlora.balance import RouterBalance
from fsdp_qlora.chunked_mlp import ChunkedMLP
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.errors import ConfigError
from fsdp_qlora.host_memory import HostArena
from fsdp_qlora.loss import chunked_cross_entropy, count_correct
from fsdp_qlora.masters import prepare
from fsdp_qlora.models.skeleton import Skeleton
from fsdp_qlora.models.vocabulary import ShardedVocabulary
from fsdp_qlora.parallel_loss import most_likely, parallel_cross_entropy
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, packed_layers
from fsdp_qlora.quant.experts import QuantizedExperts
from fsdp_qlora.quant.linear import LoRALinear
from fsdp_qlora.quant.lora import VOCABULARY
from fsdp_qlora.weight_stream import WeightStream


class LossModel(nn.Module):
    """The root that FSDP sees: tokens in, sum of token losses out.

    Attributes:
        masters: in full fine-tuning, the name in transformers' model of every parameter, its module and its name there.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        super().__init__()
        self.model = skeleton.model
        self.vocabulary, self.tied = skeleton.vocabulary, skeleton.tied
        self.softcap, self.logit_scale = skeleton.logit_softcap, skeleton.logit_scale
        self.adapter_prefix = skeleton.family.adapter_prefix
        self.balance: RouterBalance | None = None
        self.masters: tuple[tuple[str, nn.Module, str], ...] = ()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        target_positions: Tensor,
        target_ids: Tensor,
    ) -> dict[str, Tensor]:
        """Return {'loss': sum of the token losses}, a dict so that FSDP finds the tensor to hook backward on.

        With gradients it includes the load-balancing loss of a mixture of experts, if that is wanted (balance.py).

        Without gradients there is also 'correct': how many targets are the most likely token.

        Args:
            input_ids, position_ids: int64 [batch, tokens].
            cu_seqlens, max_seqlen: document boundaries, see models/attention.py; None where each row is one document.
            target_positions: int64 [targets], positions among the batch * tokens ones that predict a target.
            target_ids: int64 [targets], the tokens to predict there.
        """
        balance = self.balance if torch.is_grad_enabled() else None
        if balance is not None:
            balance.begin(input_ids.shape, target_positions)
        hidden = self.model.model(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            max_length_q=max_seqlen,
        ).last_hidden_state
        targets = hidden.flatten(0, 1).index_select(0, target_positions)
        if self.logit_scale != 1.0:  # smaller than the logits, and as good a place: the head is linear
            targets = targets * self.logit_scale
        result = self._loss(targets, target_ids)
        if balance is not None:
            result["loss"] = balance.add_to(result["loss"])
        return result

    def _loss(self, targets: Tensor, target_ids: Tensor) -> dict[str, Tensor]:
        vocabulary = self.vocabulary if isinstance(self.vocabulary, ShardedVocabulary) else None
        if vocabulary is not None and vocabulary.is_parallel:
            return parallel_cross_entropy(targets, vocabulary, target_ids, self.softcap)
        head = self._head()
        trained = vocabulary if vocabulary is not None and vocabulary.is_trained else None
        rows, reduce = (trained.rows, trained.gathered_gradient) if trained is not None else (None, None)
        result = {"loss": chunked_cross_entropy(targets, head, target_ids, self.softcap, rows, reduce)}
        if not torch.is_grad_enabled():
            result["correct"] = count_correct(targets, head, target_ids)
        return result

    def next_tokens(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, cache: dict[str, Any]
    ) -> Tensor:
        """Return the most likely next token of each row, int64 [batch]; see decode.py.

        Args:
            input_ids, position_ids: int64 [batch, tokens], of the tokens that are not in the cache yet.
            attention_mask: int64 [batch, cached + tokens], 0 at padding.
            cache: transformers' cache of keys and values, which is extended, by the name that the model takes it by.
        """
        hidden = self.model.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=True,
            **cache,
        ).last_hidden_state
        if isinstance(self.vocabulary, ShardedVocabulary) and self.vocabulary.is_parallel:
            return most_likely(hidden[:, -1], self.vocabulary)
        return torch.nn.functional.linear(hidden[:, -1], self._head()).argmax(dim=-1)

    def _head(self) -> Tensor:
        head = self.vocabulary.gather() if isinstance(self.vocabulary, ShardedVocabulary) else self.vocabulary.weight
        assert isinstance(head, Tensor)
        return head


COMPILED_VERSIONS = 64
"""Most versions of a compiled block."""


@dataclass(frozen=True)
class MemorySettings:
    """Where things rest between uses, and what backward computes again.

    Attributes:
        offload_blocks: decoder blocks whose 4-bit weights rest in pinned CPU memory.
        offload_vocabulary: whether embedding and head rest there.
        offload_lora: whether what is trained in the offloaded blocks, with gradients and optimizer state, rests there.
        checkpoint_blocks: decoder blocks that backward runs again instead of keeping their activations.
        offload_activations: whether the inputs of those blocks wait for backward in pinned CPU memory.
    """

    offload_blocks: int = 0
    offload_vocabulary: bool = False
    offload_lora: bool = False
    checkpoint_blocks: int = 0
    offload_activations: bool = False


def spread(count: int, total: int) -> list[bool]:
    """Return which `count` of `total` blocks are chosen: evenly spread, so that copies and computation alternate."""
    return [(index + 1) * count // total > index * count // total for index in range(total)]


@dataclass
class Parallelized:
    """The model ready to be loaded and trained.

    Attributes:
        root: the module to call.
        units: what is loaded together, in the order of use.
        names: name in transformers' model of each module that owns parameters.
        offloaded: the parameters that rest in CPU memory, as (module, name).
    """

    root: LossModel
    units: list[nn.Module]
    names: dict[nn.Module, str]
    offloaded: set[tuple[nn.Module, str]] = field(default_factory=set)


def parallelize(
    skeleton: Skeleton,
    ranks: Ranks,
    quant: QuantSettings,
    lora: LoraSettings | None,
    dtype: torch.dtype,
    memory: MemorySettings,
    *,
    compiled: bool = False,
    shard: bool = True,
    full: bool = False,
) -> Parallelized:
    """Apply, in this order: quantise -> adapt -> compile -> activation checkpointing -> shard. All on the meta device.

    Args:
        skeleton: the model; changed in place.
        memory: what rests where, and what is computed again.
        compiled: compile each block with torch.compile; equal blocks share the compiled code.
        shard: hand the parameters to FSDP; without, the model is a plain one (for generation in one process).
        full: instead of quantising and adapting, train every parameter; needs FSDP.

    Raises:
        ModelError: a LoRA target that matches nothing, or modules_to_save that cannot be trained.
        ConfigError: a quant_storage that FSDP would corrupt.
    """
    whole = prepare(skeleton, quant, lora, dtype, full)
    if not shard:
        names = {module: name for name, module in skeleton.model.named_modules()}
        root = LossModel(skeleton)
        return Parallelized(root, [skeleton.embedding, *skeleton.blocks, root], names)
    _shard_vocabulary(skeleton, ranks, whole)
    names = {module: name for name, module in skeleton.model.named_modules()}
    blocks = skeleton.blocks
    store = HiddenStore(memory.offload_activations)
    repeat_random = lora is not None and lora.dropout > 0
    offload = spread(memory.offload_blocks, len(blocks))
    streamed: dict[int, list[tuple[nn.Module, str]]] = {}
    weights = WeightStream(streamed, ranks.device)
    for index, checkpointed in enumerate(spread(memory.checkpoint_blocks, len(blocks))):
        block = blocks[index]
        last = None if full else skeleton.last_linear(block)
        assert last is None or isinstance(last, LoRALinear | QuantizedExperts)
        if isinstance(last, LoRALinear) and not repeat_random:
            block.mlp = ChunkedMLP(block.get_submodule("mlp"), last, compiled)
        if compiled:
            # All blocks share their compiled code, which has a version for each kind of block, mode and shape; at PyTorch's
            # limit of 8 the rest of them would run uncompiled without an error.
            torch._dynamo.config.recompile_limit = COMPILED_VERSIONS
            block.compile()
        if ranks.num_shards == 1 and checkpointed and offload[index] and not full:
            streamed[index] = [(layer, "packed") for layer in packed_layers(block)]
        arriving = weights if index in streamed else None
        blocks[index] = Block(block, index, store if checkpointed else None, last, repeat_random, arriving)
    root = LossModel(skeleton)
    if full:
        root.masters = _masters(names)
    offloaded = _fully_shard(root, blocks, ranks, memory, _policy(dtype) if full else MixedPrecisionPolicy())
    if memory.offload_vocabulary:
        offloaded |= {(skeleton.embedding, "weight"), (skeleton.vocabulary, "weight")}
    units = [skeleton.embedding, *blocks, *([] if skeleton.tied else [skeleton.vocabulary]), root]
    return Parallelized(root, units, names, offloaded)


def _masters(names: dict[nn.Module, str]) -> tuple[tuple[str, nn.Module, str], ...]:
    """Return LossModel.masters."""
    owned = ((module, name, own) for module, name in names.items() for own, _ in module.named_parameters(recurse=False))
    return tuple((f"{name}.{own}", module, own) for module, name, own in owned)


def _policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Return how float32 masters are gathered and their gradients summed; for a frozen base, whose bytes it would destroy,
    there must be none."""
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _shard_vocabulary(skeleton: Skeleton, ranks: Ranks, trained: tuple[str, ...]) -> None:
    """Replace embedding and head by row-sharded ones, one for both where they are tied.

    Args:
        trained: names of those that are trained.
    """
    embedding, head = skeleton.embedding, skeleton.model.lm_head

    def sharded(name: str, weight: Tensor, **settings: Any) -> ShardedVocabulary:
        num_rows, width = weight.shape
        is_trained = VOCABULARY[name] in trained
        return ShardedVocabulary(num_rows, width, weight.dtype, ranks, trained=is_trained, **settings)

    assert isinstance(embedding.weight, Tensor)
    settings = {name: getattr(embedding, name, None) for name in ("embed_scale", "padding_idx")}
    skeleton.model.model.embed_tokens = sharded("embed_tokens", embedding.weight, **settings)
    skeleton.model.lm_head = nn.Identity() if skeleton.tied else sharded("lm_head", head.weight)


def _fully_shard(
    root: LossModel, blocks: nn.ModuleList, ranks: Ranks, memory: MemorySettings, policy: MixedPrecisionPolicy
) -> set[tuple[nn.Module, str]]:
    """Make every block, if need be, and the root (final norm) an FSDP unit; return what rests in CPU memory."""
    ignored = {module.weight for module in root.modules() if isinstance(module, ShardedVocabulary)}
    offloaded: set[tuple[nn.Module, str]] = set()
    for block, offload in zip(blocks, spread(memory.offload_blocks, len(blocks)), strict=True):
        assert isinstance(block, Block)
        _refuse_corrupting_storage(block)
        packed = {(layer, "packed") for layer in packed_layers(block)}
        streamed = block.weights is not None
        if offload:
            offloaded |= packed
        # What a rank holds whole on its device, or a WeightStream brings there, FSDP would only copy.
        plain = streamed or not offload
        if ranks.num_shards == 1 and plain and not (offload and memory.offload_lora) and not root.masters:
            ignored.update(block.parameters())
            continue
        weights = {layer.packed for layer, _ in packed} if plain and ranks.num_shards == 1 else None
        fully_shard(block, mesh=ranks.mesh, ignored_params=weights, mp_policy=policy)
        if offload:
            offloaded |= _offload(block, memory.offload_lora, ranks)
    # FSDP would leave a root gathered after forward; a trained one, to be saved then, must be what the optimizer knows
    reshard = True if root.masters else None
    fully_shard(root, mesh=ranks.mesh, ignored_params=ignored, mp_policy=policy, reshard_after_forward=reshard)
    register_fsdp_forward_method(root, "next_tokens")
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # the loss is already divided by the global number of targets: gradients are summed, not averaged
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    sharded = [block for block in blocks if isinstance(block, FSDPModule)]
    for current, following in itertools.pairwise(sharded):
        current.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([current])
    return offloaded


def _offload(block: nn.Module, trained: bool, ranks: Ranks) -> set[tuple[nn.Module, str]]:
    """Let the 4-bit parameters of an FSDP unit rest in CPU memory, and the trained ones if asked for; return them.

    FSDP's CPUOffloadPolicy is for whole units and its bookkeeping for parameters; only the latter can leave the small LoRA
    matrices and their optimizer state on the GPU.
    """
    assert isinstance(block, FSDPModule)
    group = block._get_fsdp_state()._fsdp_param_group
    assert group is not None
    offloaded = set()
    for parameter in group.fsdp_params:
        info = parameter._module_info
        if info.param_name == "packed" or (trained and parameter.sharded_param.requires_grad):
            offloaded.add((info.module, info.param_name))
            parameter.offload_to_cpu = True
            parameter.pin_memory = ranks.device.type == "cuda"
    return offloaded


def _refuse_corrupting_storage(block: nn.Module) -> None:
    """Raise ConfigError for a block whose parameters all have one 16-bit dtype.

    FSDP gathers such a block in that dtype with torch._foreach_copy_, which changes NaN bit patterns of 16-bit floats on
    CUDA (pytorch#159333), and so the packed bytes; a block of mixed dtypes is gathered as bytes.
    """
    dtypes = {parameter.dtype for parameter in block.parameters()}
    packed = next((layer.layout for layer in packed_layers(block)), None)
    if packed is not None and packed.storage_dtype.itemsize == 2 and len(dtypes) == 1:
        raise ConfigError(
            f"quant_storage {packed.storage}: a block without float32 LoRA matrices would be corrupted by FSDP;"
            " use --quant_storage float32"
        )


def local_bytes(module: nn.Module, name: str) -> int:
    """Return the bytes of this rank's part of a parameter."""
    parameter = getattr(module, name)
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return int(local.numel() * local.itemsize)


def allocator(
    device: torch.device, offloaded: set[tuple[nn.Module, str]]
) -> Callable[[nn.Module, str, torch.Size, torch.dtype], Tensor]:
    """Return the loader's allocator: one pinned arena for the offloaded parameters, the device for the others."""
    size = sum(HostArena.padded(local_bytes(module, name)) for module, name in offloaded)
    arena = HostArena(size, pinned=device.type == "cuda")

    def allocate(module: nn.Module, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if (module, name) in offloaded:
            return arena.take(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=device)

    return allocate

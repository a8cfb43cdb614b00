"""The sizes of a model's parameters and tensors, as one rank holds them: what the planner calculates with."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fsdp_qlora.errors import ModelError
from fsdp_qlora.masters import prepare
from fsdp_qlora.models.skeleton import Skeleton, build_skeleton, read_config
from fsdp_qlora.models.vocabulary import shares_logits
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, lora_layers, lora_linears, packed_layers
from fsdp_qlora.quant.expert_lora import ExpertLora
from fsdp_qlora.quant.experts import ExpertStack, group_size
from fsdp_qlora.quant.linear import LoRALinear
from fsdp_qlora.quant.lora import VOCABULARY


@dataclass(frozen=True)
class Widths:
    """Elements a token takes in the tensors of a block; `norm` sums over the inputs of all its norms."""

    norm: int
    hidden: int
    query: int
    key_value: int
    intermediate: int


@dataclass(frozen=True)
class BlockShape:
    """Bytes of one decoder block's parameters, whole and in this rank's part: 4-bit, other frozen, trained (float32).

    Attributes:
        num_weights: the quantised weights that one token meets: of experts those it is sent to.
        gathered: bytes of the whole block as FSDP gathers it.
    """

    packed: int
    packed_part: int
    frozen: int
    frozen_part: int
    lora: int
    lora_part: int
    num_weights: int
    gathered: int


@dataclass(frozen=True)
class ModelShape:
    """What the planner knows of a model, as one rank of `num_shards` holds it.

    Attributes:
        blocks: the decoder blocks.
        norm_part: bytes of this rank's part of the final norm.
        vocabulary_rows, vocabulary_part_rows: rows of the head, whole and in this rank's part.
        tied: whether the embedding is the same matrix.
        widths: see Widths.
        num_heads: query heads.
        held: what the matrices of the blocks are: 4-bit, 16-bit or 32-bit weights.
        largest_matrix: bytes of the largest matrix of a block when dequantised, one at a time, or of those of experts that
            are dequantised together; 0 where they are held as they compute.
        fp8_width: widest input or output of a layer that computes in fp8, of which there is a copy in fp8 meanwhile.
        largest_packed: bytes of the largest 4-bit parameter, which is one matrix, or that of all experts.
        lora_widths: sums over the linear layers of a block with LoRA: rank, input width, and with DoRA output width.
        expert_lora: elements of the LoRA matrices of a block's experts, which are copied in the compute dtype.
        itemsize: bytes of the compute dtype.
        softcapped: whether logits, and whether attention scores, are soft-capped.
        max_positions: the model's longest context.
        trained: whether the embedding, and whether the head, is trained whole; a tied one is both.
        full: whether all parameters are trained, so that `lora` of a block is the block.
        chunks_mlp: whether a recomputed block can run its MLP on some tokens at a time (chunked_mlp.py).
    """

    num_shards: int
    blocks: tuple[BlockShape, ...]
    norm_part: int
    vocabulary_rows: int
    vocabulary_part_rows: int
    tied: bool
    widths: Widths
    num_heads: int
    held: str
    largest_matrix: int
    fp8_width: int
    largest_packed: int
    lora_widths: tuple[int, int, int]
    expert_lora: int
    itemsize: int
    softcapped: tuple[bool, bool]
    max_positions: int
    trained: tuple[bool, bool] = (False, False)
    full: bool = False
    chunks_mlp: bool = False

    @property
    def head_bytes(self) -> int:
        return self.vocabulary_rows * self.widths.hidden * self.itemsize

    @property
    def shares_logits(self) -> bool:
        return shares_logits(self.vocabulary_rows, self.num_shards)

    @property
    def vocabulary_part(self) -> int:
        """Bytes of this rank's rows of embedding and head; trained ones are float32."""
        itemsizes = [4 if trained else self.itemsize for trained in (self.trained[:1] if self.tied else self.trained)]
        return self.vocabulary_part_rows * self.widths.hidden * sum(itemsizes)

    @property
    def trained_rows(self) -> tuple[int, int]:
        """Float32 bytes of the trained ones of embedding and head, whole and this rank's rows."""
        matrices = self.trained[0] if self.tied else sum(self.trained)
        both = self.vocabulary_rows, self.vocabulary_part_rows
        whole, part = (4 * matrices * rows * self.widths.hidden for rows in both)
        return whole, part

    @property
    def trained_name(self) -> str:
        """What the planner calls the trained parameters of the blocks."""
        return "float32 weights" if self.full else "LoRA"

    @functools.cached_property
    def gathered(self) -> int:
        return max(block.gathered for block in self.blocks)


def model_shape(
    folder: Path, quant: QuantSettings, lora: LoraSettings | None, dtype: torch.dtype, shard: int = 0
) -> ModelShape:
    """Measure the model of a folder with config.json as quantised, adapted and sharded; nothing is allocated.

    Args:
        quant: form of the base, including the number of shards; a quantised checkpoint keeps its own.
        lora: what is trained; None for every parameter.
        shard: whose part; the first is never smaller than the others.

    Raises:
        ModelError: unsupported model, a LoRA target that matches nothing, modules_to_save that cannot be trained, or a model
            that cannot be trained whole.
    """
    quant = _own_form(folder, quant, lora)
    skeleton = build_skeleton(folder, dtype)
    whole = prepare(skeleton, quant, lora, dtype, full=lora is None)
    embedding_is_trained, head_is_trained = (VOCABULARY[name] in whole for name in ("embed_tokens", "lm_head"))
    config = skeleton.config
    block = max(skeleton.blocks, key=lambda block: sum(p.numel() for p in block.parameters() if p.requires_grad))
    layouts = [layer.layout for layer in packed_layers(block)]
    adapted = [(layer.rank, layer.in_features) for layer in lora_layers(block) if isinstance(layer, LoRALinear)]
    experts = [layer for layer in lora_layers(block) if isinstance(layer, ExpertLora)]
    dora = [linear.out_features for linear in lora_linears(block) if linear.lora_magnitude_vector is not None]
    head = skeleton.vocabulary.weight
    norm = skeleton.decoder.norm
    gathered_size = dtype.itemsize if lora is None else 4
    assert isinstance(head, Tensor)
    assert isinstance(norm, nn.Module)
    return ModelShape(
        num_shards=quant.num_shards,
        blocks=tuple(
            _block_shape(block, quant.num_shards, shard, _experts_per_token(skeleton), gathered_size)
            for block in skeleton.blocks
        ),
        norm_part=sum(_part(parameter, quant.num_shards, shard) for parameter in norm.parameters()),
        vocabulary_rows=head.shape[0],
        vocabulary_part_rows=_rows(head.shape[0], quant.num_shards, shard),
        tied=skeleton.tied,
        widths=_widths(skeleton),
        num_heads=config.num_attention_heads,
        held="4-bit weights" if quant.is_4bit else f"{8 * dtype.itemsize}-bit weights",
        largest_matrix=max((_dequantised_bytes(layer, dtype) for layer in packed_layers(block)), default=0),
        fp8_width=max(
            (max(linear.out_features, linear.in_features) for linear in lora_linears(block) if linear.fp8), default=0
        ),
        largest_packed=max((layout.padded_bytes for layout in layouts), default=0),
        lora_widths=(sum(rank for rank, _ in adapted), sum(width for _, width in adapted), sum(dora)),
        expert_lora=sum(p.numel() for layer in experts for _, p in layer.adapter()),
        itemsize=dtype.itemsize,
        softcapped=(skeleton.logit_softcap is not None, bool(getattr(config, "attn_logit_softcapping", None))),
        max_positions=config.max_position_embeddings,
        trained=(embedding_is_trained, embedding_is_trained if skeleton.tied else head_is_trained),
        full=lora is None,
        chunks_mlp=isinstance(skeleton.last_linear(block), LoRALinear),
    )


def _own_form(folder: Path, quant: QuantSettings, lora: LoraSettings | None) -> QuantSettings:
    """Return the form of the base: that of the checkpoint if it is quantised."""
    stored = getattr(read_config(folder)[0], "quantization_config", None)
    if not isinstance(stored, dict):
        return quant
    if lora is None:
        raise ModelError(
            f"train_type full: the weights of {folder.name} are quantised, and cannot be trained themselves; use the"
            " model in 16 or 32 bits, or --train_type lora"
        )
    own = stored.get("bnb_4bit_quant_type", "fp4"), bool(stored.get("bnb_4bit_use_double_quant", False))
    return replace(quant, quant_type=own[0], double_quant=own[1])


def _dequantised_bytes(layer: LoRALinear | ExpertStack, dtype: torch.dtype) -> int:
    if layer.layout.dense_dtype == dtype:
        return 0
    in_fp8 = isinstance(layer, LoRALinear) and layer.fp8
    together = group_size(layer.layout, dtype) if isinstance(layer, ExpertStack) else 1
    return together * layer.layout.num_weights * (1 if in_fp8 else dtype.itemsize)


def _rows(rows: int, num_shards: int, shard: int) -> int:
    """Return the rows of one shard: equal runs, of which the last may be shorter."""
    size = -(-rows // num_shards)
    return max(0, min(size, rows - shard * size))


def _part(parameter: Tensor, num_shards: int, shard: int) -> int:
    row_bytes = parameter.numel() // parameter.shape[0] * parameter.itemsize
    return _rows(parameter.shape[0], num_shards, shard) * row_bytes


def _block_shape(
    block: nn.Module, num_shards: int, shard: int, experts_per_token: int, gathered_size: int
) -> BlockShape:
    """Measure a block, whose trained weights take `gathered_size` bytes each when FSDP has gathered them."""
    sums = {"packed": [0, 0], "lora": [0, 0], "frozen": [0, 0]}
    for name, parameter in block.named_parameters():
        is_packed = name.rpartition(".")[2] == "packed"
        both = sums["packed" if is_packed else "lora" if parameter.requires_grad else "frozen"]
        both[0] += parameter.numel() * parameter.itemsize
        both[1] += _part(parameter, num_shards, shard)
    num_weights = sum(
        layer.layout.num_weights * (experts_per_token if isinstance(layer, ExpertStack) else 1)
        for layer in packed_layers(block)
    )
    (packed, packed_part), (lora, lora_part), (frozen, frozen_part) = sums.values()
    gathered = packed + frozen + lora * gathered_size // 4
    return BlockShape(packed, packed_part, frozen, frozen_part, lora, lora_part, num_weights, gathered)


def _widths(skeleton: Skeleton) -> Widths:
    config = skeleton.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key_value = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    named = skeleton.blocks[0].named_parameters()
    norms = [parameter.numel() for name, parameter in named if name.endswith("norm.weight")]
    per_head = [size for size in norms if size == head_dim != config.hidden_size]  # Qwen3, Gemma 3: norms of q and k
    norm = sum(norms) - sum(per_head) + (query + key_value if per_head else 0)
    # of experts, those of one token together: a little more than they take, as each works for itself
    inner = [layer.layout for layer in packed_layers(skeleton.blocks[0]) if isinstance(layer, ExpertStack)]
    intermediate = config.intermediate_size
    if inner:
        shared = getattr(config, "shared_expert_intermediate_size", 0)
        intermediate = _experts_per_token(skeleton) * inner[0].out_features + shared
    return Widths(norm, config.hidden_size, query, key_value, intermediate)


def _experts_per_token(skeleton: Skeleton) -> int:
    return int(getattr(skeleton.config, "num_experts_per_tok", 1))

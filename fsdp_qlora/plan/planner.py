"""What a run needs of GPU and host memory, from the model's config alone, and the settings that make it fit.

The estimate is the largest of the phases of a step, not the sum of everything: what is alive in one phase gives its memory
to the next. Parameters are counted exactly; activations follow from the widths of a block and the coefficients below,
which are there to be fitted to measurements.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

from fsdp_qlora import loss
from fsdp_qlora.chunked_mlp import num_chunks
from fsdp_qlora.host_memory import GIB
from fsdp_qlora.optim import BUCKET_BYTES
from fsdp_qlora.parallel import MemorySettings, spread
from fsdp_qlora.plan.model_shape import ModelShape, Widths


@dataclass(frozen=True)
class Alive:
    """How many tensors of each width are alive at once; those of `norm` are float32, the others of the compute dtype.

    Those of `mlp_hidden` are as wide as `hidden`, and as long as what the MLP works on.
    """

    norm: float = 0
    hidden: float = 0
    query: float = 0
    key_value: float = 0
    mlp_hidden: float = 0
    intermediate: float = 0

    def bytes(self, widths: Widths, itemsize: int, tokens: int, mlp_tokens: int) -> float:
        """Return the bytes for so many tokens, of which the MLP works on `mlp_tokens` at a time."""
        others = self.hidden * widths.hidden + self.query * widths.query + self.key_value * widths.key_value
        of_mlp = mlp_tokens * (self.mlp_hidden * widths.hidden + self.intermediate * widths.intermediate)
        return tokens * (4 * self.norm * widths.norm + itemsize * others) + itemsize * of_mlp


# --- coefficients, to be fitted to measurements (eager modules of transformers) ---
SAVED = Alive(norm=1, hidden=2, query=2, key_value=2, intermediate=4)
"""Kept by autograd in one block: float32 copy before each norm; inputs of q/k/v and gate/up; q and attention output; k
and v; gate, silu(gate), up and their product."""

SAVED_COMPILED = Alive(hidden=3, query=2, key_value=2, intermediate=3)
"""The same of a compiled block, which makes float32 copies and one tensor of the MLP again in backward."""

FORWARD = Alive(hidden=2, intermediate=3)
"""Alive in a forward that keeps nothing: residual, norm output; silu(gate), up before and after LoRA is added."""

BACKWARD = Alive(hidden=4, mlp_hidden=2, intermediate=2)
"""Alive in the backward of a block's MLP beside SAVED: gradients of the output and of two tensors of the MLP, widened
copies."""

ATTENTION_BACKWARD = Alive(hidden=7, query=1, key_value=2)
"""Alive in the backward before the MLP beside SAVED, of which the MLP's part is free by then: more where MLPs work on few
tokens at a time."""

LOSS_FORWARD = Alive(norm=1, hidden=4)
"""Beside the logits: final norm's float32 copy; hidden states before it, after it, of the targets, and their gradient."""

LOSS_BACKWARD = Alive(norm=4, hidden=3)
"""Backward of the final norm, in float32."""

LOGITS = 2
"""Chunks of logits: the old one's, which hold their gradient, and the new one's. (Shared out over ranks, it is one.)"""

SHARED_HIDDEN = 3
"""Every rank's hidden states of a chunk: the old one's, the new one's, and their gradient."""

SCORE_BYTES = 4, 3
"""Per score of soft-capped attention, which keeps them all: bytes in float32, and tensors in the compute dtype."""

PADDED_GRADIENTS = 2
"""Copies of a trained head's gradient: as summed over the chunks, and padded to equal parts for the ranks."""

GATHER_BUFFERS = 2
"""Block-sized buffers of FSDP's gather stream (current and prefetched block), never free for other tensors."""

STREAM_BUFFERS = 2
"""Buffers of a WeightStream, each for the 4-bit weights of a block."""

COMPLETE = ("backward of the first block", "backward of the embedding", "optimizer")
"""Phases in which the gradients of the other blocks are there, though no earlier micro-batch left any. FSDP's, which it sums
on a stream of its own, lie in memory that serves nothing else in the other phases either."""

SLACK = 0.10
"""The allocator's fragmentation, as a share of all that comes and goes (docs/cuda.md has the measurements)."""

CONTEXT_BYTES = GIB // 2
"""CUDA context and libraries, outside torch's allocator."""

PROCESS_BYTES = 5 * GIB // 4
"""Host memory of one process: Python, torch, CUDA."""

COMPILER_BYTES = GIB // 4
"""Host memory of torch.compile where nothing was compiled before."""


@dataclass(frozen=True)
class Run:
    """One micro-batch of a rank.

    Attributes:
        batch_size, context_length: its sequences, and the tokens of each.
        memory: what rests where.
        local_ranks: ranks that share the host's memory.
        num_replicas: copies of the base over all ranks.
        accumulates: whether gradients of an earlier micro-batch are there already.
        has_dropout: whether LoRA's inputs go through dropout.
        compiled: whether the blocks are compiled.
    """

    batch_size: int
    context_length: int
    memory: MemorySettings = field(default_factory=MemorySettings)
    local_ranks: int = 1
    num_replicas: int = 1
    accumulates: bool = True
    has_dropout: bool = False
    compiled: bool = False

    @property
    def tokens(self) -> int:
        return self.batch_size * self.context_length


@dataclass(frozen=True)
class Estimate:
    """Bytes by component: on the GPU of one rank in the phase that needs most, and on the host for all its ranks.

    Attributes:
        phase: the phase of `gpu`.
        phases: bytes on the GPU in each phase.
    """

    phase: str
    gpu: dict[str, int]
    host: dict[str, int]
    phases: dict[str, int]

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def estimate(shape: ModelShape, run: Run) -> Estimate:
    """Return what a training step takes on the GPU of one rank and on its host."""
    resting, summed, trained = _resting(shape, run)
    phases = {}
    for phase, transient in _phases(shape, run).items():
        others = trained if run.accumulates or phase in COMPLETE else summed
        transient["gradients"] = transient.get("gradients", 0) + others
        slack = SLACK * sum(transient.values())
        alive = {**resting, **transient, "allocator slack": slack, "CUDA context": CONTEXT_BYTES}
        phases[phase] = {name: round(size) for name, size in alive.items() if size}
    totals = {phase: sum(alive.values()) for phase, alive in phases.items()}
    worst = max(totals, key=lambda phase: totals[phase])
    return Estimate(worst, phases[worst], _host(shape, run), totals)


def _resting(shape: ModelShape, run: Run) -> tuple[dict[str, float], float, float]:
    """Return what is on the GPU in every phase, and of this rank's gradients there the bytes of FSDP's and of all."""
    memory = run.memory
    offloaded = spread(memory.offload_blocks, len(shape.blocks))
    lora = sum(
        block.lora_part
        for block, away in zip(shape.blocks, offloaded, strict=True)
        if not (away and memory.offload_lora)
    )
    lora += shape.norm_part if shape.full else 0
    trained = lora + (0 if memory.offload_vocabulary else shape.trained_rows[1])
    resident = itertools.compress(shape.blocks, [not away for away in offloaded])
    frozen = sum(block.frozen_part for block in shape.blocks) + (0 if shape.full else 2 * shape.norm_part)
    resting: dict[str, float] = {
        shape.held: sum(block.packed_part for block in resident) + frozen,
        "embedding and head": 0 if memory.offload_vocabulary else shape.vocabulary_part,
        shape.trained_name: lora,
        "optimizer state": 2 * trained,
    }
    if shape.num_shards > 1:
        resting["gathered blocks"] = GATHER_BUFFERS * shape.gathered
    elif _offloads_blocks(shape, memory, checkpointed=True):
        resting["streamed blocks"] = STREAM_BUFFERS * max(block.packed for block in shape.blocks)
    return resting, lora if shape.num_shards > 1 else 0, trained


def _phases(shape: ModelShape, run: Run) -> dict[str, dict[str, float]]:
    """Return what comes and goes in each phase of a step, but for the gradients of other micro-batches and blocks."""
    memory, tokens, count, widths, itemsize = run.memory, run.tokens, len(shape.blocks), shape.widths, shape.itemsize
    hidden = tokens * widths.hidden * itemsize
    on_gpu = min(memory.checkpoint_blocks, 2) if memory.offload_activations else memory.checkpoint_blocks
    mlp_tokens = _mlp_tokens(shape, run)
    keeps = memory.checkpoint_blocks < count
    saved = _saved(shape, run, tokens)
    kept = {"kept hidden states": on_gpu * hidden, "kept activations": (count - memory.checkpoint_blocks) * saved}
    first = {"kept hidden states": min(on_gpu, 1) * hidden, "kept activations": kept["kept activations"] / count}
    running = {
        "running block": _running(shape, memory),
        "dequantised matrix": shape.largest_matrix,
        "activations in fp8": tokens * shape.fp8_width,
        "LoRA of experts": shape.expert_lora * itemsize,
    }
    again = max(
        _saved(shape, run, mlp_tokens) + BACKWARD.bytes(widths, itemsize, tokens, mlp_tokens),
        _saved(shape, run, 0) + ATTENTION_BACKWARD.bytes(widths, itemsize, tokens, 0),
    )
    of_kept = BACKWARD.bytes(widths, itemsize, tokens, tokens)
    backward = {
        **running,
        "activations": max(again if memory.checkpoint_blocks else 0, of_kept if keeps else 0),
        # as computed, in the dtype of what was gathered, and as reduce-scatter's float32 input
        "gradients": max(block.lora + (block.gathered if shape.full else block.lora) for block in shape.blocks),
    }
    final = replace(widths, norm=widths.hidden)
    loss_forward, loss_backward = (way.bytes(final, itemsize, tokens, tokens) for way in (LOSS_FORWARD, LOSS_BACKWARD))
    forward = FORWARD.bytes(widths, itemsize, tokens, tokens if keeps else mlp_tokens)
    exchanged = 2 * shape.num_shards if shape.num_shards > 1 else 1
    trains_embedding, trains_head = shape.trained
    head_rows = shape.vocabulary_part_rows if shape.shares_logits else PADDED_GRADIENTS * shape.vocabulary_rows
    head_gradient = 4 * head_rows * widths.hidden if trains_head else 0
    # every rank's gradients of the looked-up rows, also in float32, and those of this rank's rows
    rows = (1 + 4 / itemsize) * shape.num_shards * hidden + 4 * shape.vocabulary_part_rows * widths.hidden
    of_embedding = {"backward of the embedding": {"activations": rows}} if trains_embedding else {}
    return {
        "embedding": {"activations": exchanged * hidden},
        "forward": {**kept, **running, "activations": forward},
        "loss": {**kept, "activations": loss_forward, **_loss(shape, run)},
        "loss backward": {**kept, "activations": loss_backward, "gradients": head_gradient},
        "backward of the last block": {**kept, **backward},
        "backward of the first block": {**first, **backward},
        **of_embedding,
        "optimizer": {"gradients": _bucket(shape, run)},
    }


def _bucket(shape: ModelShape, run: Run) -> int:
    """Return the bytes of the copy in which gradients are summed over the replicas, where FSDP does not do that."""
    if run.num_replicas == 1 or shape.num_shards > 1 or shape.full:
        return 0
    return min(BUCKET_BYTES, sum(block.lora for block in shape.blocks))


def _running(shape: ModelShape, memory: MemorySettings) -> float:
    """Return the bytes of the parameters of the block that runs, beside the buffers of the gathers or the stream."""
    if shape.num_shards == 1 and not shape.full and not _offloads_blocks(shape, memory, checkpointed=False):
        # only where LoRA comes from the host is a block FSDP's, without its 4-bit weights
        from_host = memory.offload_lora and memory.offload_blocks > 0
        return max(block.frozen + block.lora for block in shape.blocks) if from_host else 0
    if not memory.offload_blocks:
        return shape.gathered
    if shape.full:  # the float32 part of the next block, before it is cast
        return shape.gathered + max(block.lora_part for block in shape.blocks)
    # on its way from the host: one matrix at a time, or with several ranks the whole part of the next block
    arriving = shape.largest_packed if shape.num_shards == 1 else max(block.packed_part for block in shape.blocks)
    return shape.gathered + arriving


def _offloads_blocks(shape: ModelShape, memory: MemorySettings, checkpointed: bool) -> bool:
    """Whether there are offloaded blocks that are, or are not, checkpointed; only the former are streamed."""
    away, again = (spread(count, len(shape.blocks)) for count in (memory.offload_blocks, memory.checkpoint_blocks))
    return any(rests and repeats is checkpointed for rests, repeats in zip(away, again, strict=True))


def _mlp_tokens(shape: ModelShape, run: Run) -> int:
    """Return the tokens that the MLP of a recomputed block works on at a time."""
    return -(-run.tokens // num_chunks(run.tokens)) if shape.chunks_mlp and not run.has_dropout else run.tokens


def _saved(shape: ModelShape, run: Run, mlp_tokens: int) -> float:
    """Return the bytes that autograd keeps of one block between forward and backward, `mlp_tokens` at a time in its MLP."""
    rank_width, input_width, dora_width = shape.lora_widths
    saved = (SAVED_COMPILED if run.compiled else SAVED).bytes(shape.widths, shape.itemsize, run.tokens, mlp_tokens)
    # log-sum-exp of attention; x A^T of every layer; with DoRA its output before it is scaled
    per_token = 4 * shape.num_heads + shape.itemsize * (rank_width + dora_width)
    if run.has_dropout:
        per_token += (shape.itemsize + 1) * input_width  # the dropped inputs and their masks
    scores = 0
    if shape.softcapped[1]:
        float32, others = SCORE_BYTES
        scores = run.batch_size * shape.num_heads * run.context_length**2 * (float32 + others * shape.itemsize)
    return saved + run.tokens * per_token + scores


def _loss(shape: ModelShape, run: Run) -> dict[str, float]:
    """Return the bytes of the head, of its gradient with a chunk's share of it, and of the logits or, earlier and if larger,
    of the head's part from the host."""
    trained, away = shape.trained[1], run.memory.offload_vocabulary
    part, copies = shape.head_bytes / shape.num_shards, away or (trained and shape.itemsize < 4)
    gradients = 1 + 4 / shape.itemsize if trained else 0
    if shape.shares_logits:
        size, width = shape.itemsize, shape.widths.hidden
        rows = min(shape.num_shards * run.tokens, loss.CHUNK_BYTES / (size * max(shape.vocabulary_part_rows, width)))
        logits = rows * size * (shape.vocabulary_part_rows + SHARED_HIDDEN * width)
        arriving = 4 / size * part if away and trained and size < 4 else 0  # in float32
        return {"head": part if copies else 0, "gradients": gradients * part, "logits": max(logits, arriving)}
    gathers = shape.num_shards > 1 or copies
    logits = LOGITS * min(loss.CHUNK_BYTES, shape.itemsize * shape.vocabulary_rows * run.tokens)
    return {
        "gathered head": shape.head_bytes if gathers else 0,
        "gradients": gradients * shape.head_bytes,
        "logits": max(logits, part if away and shape.num_shards > 1 else 0),
    }


def _host(shape: ModelShape, run: Run) -> dict[str, int]:
    memory, ranks = run.memory, run.local_ranks
    offloaded = list(itertools.compress(shape.blocks, spread(memory.offload_blocks, len(shape.blocks))))
    lora = sum(block.lora_part for block in offloaded) if memory.offload_lora else 0
    hidden = run.tokens * shape.widths.hidden * shape.itemsize
    matrices = [(block.lora, block.lora_part) for block in shape.blocks]
    trained, trained_part = (sum(parts) for parts in zip(*matrices, shape.trained_rows, strict=True))
    lora_and_rows = lora + (shape.trained_rows[1] if memory.offload_vocabulary else 0)
    # what a thread writes while training goes on: copies of AdamW's two moments, and of the adapter, which one rank gathers,
    # or the trained weights, of which each rank has its part; replicas save nothing
    saving = min(ranks, shape.num_shards)
    saved = saving * 3 * trained_part if shape.full else trained + saving * 2 * trained_part
    sizes = {
        shape.held: ranks * sum(block.packed_part for block in offloaded),
        "embedding and head": ranks * shape.vocabulary_part if memory.offload_vocabulary else 0,
        shape.trained_name: ranks * lora,
        "gradients": ranks * lora_and_rows,
        "optimizer state": ranks * 2 * lora_and_rows,
        "kept hidden states": ranks * memory.checkpoint_blocks * hidden if memory.offload_activations else 0,
        "checkpoint being saved": saved,
        "processes": ranks * (PROCESS_BYTES + (COMPILER_BYTES if run.compiled else 0)),
    }
    return {name: size for name, size in sizes.items() if size}

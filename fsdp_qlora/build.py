"""From a checkpoint folder to a loaded, sharded and verified model; shared by training and generation."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fsdp_qlora.activation_checkpointing import Block
from fsdp_qlora.adapters import TrainedAdapter, check_adapter, check_layers
from fsdp_qlora.distributed import Ranks, agree_on_errors, shard_rows
from fsdp_qlora.errors import CheckpointError, ModelError, WeightsError
from fsdp_qlora.models.attention import ATTENTION
from fsdp_qlora.models.skeleton import Skeleton, build_skeleton
from fsdp_qlora.output_files import read_record
from fsdp_qlora.parallel import LossModel, MemorySettings, allocator, parallelize
from fsdp_qlora.quant.adapt import (
    LoraSettings,
    QuantSettings,
    block_linears,
    expert_parameters,
    lora_layers,
    lora_linears,
    packed_layers,
    tensor_names,
)
from fsdp_qlora.quant.experts import ExpertStack
from fsdp_qlora.quant.linear import LoRALinear
from fsdp_qlora.quant.lora import VOCABULARY, whole_modules
from fsdp_qlora.weights.fingerprint import fingerprint
from fsdp_qlora.weights.index import read_index
from fsdp_qlora.weights.loader import Loader, LoadReport, check_tensors, reads_base
from fsdp_qlora.weights.reader import Reader
from fsdp_qlora.weights.source import check_complete, detect_quantization, model_names

Progress = Callable[[int, int], None]


@dataclass
class BuiltModel:
    """A model whose weights are loaded.

    Attributes:
        root: call it with a batch to get the loss.
        skeleton: transformers' model inside.
        report: what loading did.
        quant: the form in which the base is held.
        offloaded: the parameters that rest in CPU memory, as (module, name).
    """

    root: LossModel
    skeleton: Skeleton
    report: LoadReport
    quant: QuantSettings
    offloaded: set[tuple[nn.Module, str]]

    @property
    def fingerprint(self) -> str | None:
        """One number for the whole frozen base, the same for every world size; None where there is none."""
        if not self.report.fingerprints:
            return None
        total = sum(value * (2 * position + 1) for position, value in enumerate(self.report.fingerprints.values()))
        return f"{total % 2**64:016x}"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model or adapter folder; ModelError if it has none or a damaged one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files raise whatever their parsers do, down to KeyError and AttributeError
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(
            f"{folder}: its tokenizer cannot be loaded ({reason}); the folder needs tokenizer.json and"
            " tokenizer_config.json as tokenizer.save_pretrained writes them"
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files beside the folder, and put them into it once they are whole.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        tokenizer.save_pretrained(partial)
        for path in partial.iterdir():
            if path.is_dir():  # further chat templates
                shutil.rmtree(folder / path.name, ignore_errors=True)
            path.replace(folder / path.name)
        partial.rmdir()
    except Exception as error:  # the tokenizers library raises this very class, on a full disk for instance
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be written ({error}); free space and start again: the run goes on from its"
            " last checkpoint"
        ) from error


def form_alone(folder: Path) -> QuantSettings:
    """Return the form to hold a model in that is used without an adapter: as it was trained, if it was trained whole; else
    the one that a base is trained in by default."""
    is_full = read_record(folder).get("config", {}).get("train_type") == "full"
    return QuantSettings("none" if is_full else "nf4")


def tokenizer_folder(adapter: TrainedAdapter | None, base: Path) -> Path:
    """Return where the tokenizer is: with the adapter, if it has one, else with the base."""
    has_own = adapter is not None and (adapter.folder / "tokenizer_config.json").exists()
    return adapter.folder if adapter is not None and has_own else base


def build_model(
    folder: Path,
    ranks: Ranks,
    quant: QuantSettings,
    lora: LoraSettings | None,
    dtype: torch.dtype,
    *,
    memory: MemorySettings | None = None,
    seed: int = 0,
    adapter: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
    compiled: bool = False,
    shard: bool = True,
    attention: str = ATTENTION,
    broadcast: bool = False,
    full: bool = False,
) -> BuiltModel:
    """Build the model of a checkpoint folder and load this rank's shards.

    Args:
        folder: config.json and safetensors weights, in 16 or 32 bits or quantised by bitsandbytes.
        quant: wanted form of the base; a quantised checkpoint keeps its own type.
        lora: the adapters to add.
        memory: what rests where; default: all on the device, nothing computed again.
        adapter: values for them (adapters.read_adapter); default: PEFT's initial values.
        progress: called with (units loaded, units in all).
        compiled: compile the decoder blocks.
        shard: hand the parameters to FSDP, as training does.
        attention: transformers' name of the attention implementation.
        broadcast: read only one of several copies of the base, and send it to the ranks that hold the others.
        full: train every parameter, held in float32; `quant`, `lora` and `adapter` are for frozen bases.

    Raises:
        ModelError: unsupported model, a LoRA target that matches nothing, or no layer that can compute in fp8.
        WeightsError: damaged, incomplete or foreign weights.
        CheckpointError: the adapter does not fit the model.
    """
    with agree_on_errors(ranks, "checking the model"):
        skeleton, reader = _open(folder, dtype, attention)
        whole = _whole_shapes(skeleton, lora)
        adapter = None if adapter is None else _of_model(adapter, skeleton)
        quant = detect_quantization(reader, [name + ".weight" for name, _ in block_linears(skeleton)], quant)
        quant, memory = quant.held(torch.float32 if full else dtype), memory or MemorySettings()
        kinds = {"compiled": compiled, "shard": shard, "full": full}
        parallelized = parallelize(skeleton, ranks, quant, lora, dtype, memory, **kinds)
        if reads_base(ranks, broadcast):
            check_tensors(reader, parallelized.root, parallelized.names)
        if adapter is not None:
            check_adapter(adapter, lora_layers(parallelized.root), whole)
    with agree_on_errors(ranks, "reserving CPU memory"):
        allocate = allocator(ranks.device, parallelized.offloaded)
    with reader:
        shared = reader, ranks, parallelized.names, allocate, seed, adapter
        report = Loader(*shared, lora.init if lora else "default", broadcast).load(parallelized.units, progress)
    if adapter is None and lora is not None and lora.use_dora:
        _begin_magnitudes(skeleton, ranks, dtype)
    if quant.fp8:
        _begin_fp8(skeleton)
    _move_buffers(skeleton, ranks.device)
    return BuiltModel(parallelized.root, skeleton, report, quant, parallelized.offloaded)


def _open(folder: Path, dtype: torch.dtype, attention: str) -> tuple[Skeleton, Reader]:
    """Return the model on the meta device, and its checkpoint, in which nothing is missing."""
    skeleton = build_skeleton(folder, dtype, attention)
    reader = Reader(model_names(read_index(folder), skeleton.family))
    check_complete(reader.tensors, tensor_names(skeleton), skeleton.tied)
    return skeleton, reader


def _whole_shapes(skeleton: Skeleton, lora: LoraSettings | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the modules_to_save by their names, before they are sharded."""
    modules = {name: skeleton.model.get_submodule(name) for name in whole_modules(lora, skeleton.tied)}
    return {name: tuple(module.weight.shape) for name, module in modules.items()}


def _of_model(adapter: Mapping[str, Tensor], skeleton: Skeleton) -> Mapping[str, Tensor]:
    """Return an adapter's matrices, all of which must be of layers of the model."""
    if skeleton.tied:  # PEFT stores the one matrix a second time
        adapter = {name: value for name, value in adapter.items() if name != VOCABULARY["lm_head"]}
    check_layers(adapter, [*(name for name, _ in block_linears(skeleton)), *expert_parameters(skeleton)])
    return adapter


def _move_buffers(skeleton: Skeleton, device: torch.device) -> None:
    for module in skeleton.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


@contextlib.contextmanager
def gathered(block: nn.Module) -> Iterator[None]:
    """Have a block's whole weights on the device."""
    if isinstance(block, FSDPModule):
        block.unshard()
    if isinstance(block, Block):
        block.arrive(backward=False)
    yield
    if isinstance(block, FSDPModule):
        block.reshard()


def _begin_fp8(skeleton: Skeleton) -> None:
    """Find the gains of the matrices that are multiplied in fp8."""
    for block in skeleton.blocks:
        with gathered(block):
            for linear in lora_linears(block):
                if linear.fp8:
                    linear.begin_fp8()


@torch.no_grad()
def _begin_magnitudes(skeleton: Skeleton, ranks: Ranks, dtype: torch.dtype) -> None:
    """Give DoRA's magnitudes their initial values, the lengths of the rows, from each block's whole matrices."""
    for block in skeleton.blocks:
        sharded = isinstance(block, FSDPModule)
        with gathered(block):
            adapted = [linear for linear in lora_linears(block) if linear.lora_magnitude_vector is not None]
            norms = [linear.row_norms(dtype) for linear in adapted]
        for linear, values in zip(adapted, norms, strict=True):
            parameter = linear.lora_magnitude_vector
            assert parameter is not None
            start, stop = shard_rows(len(values), ranks.shard, ranks.num_shards) if sharded else (0, len(values))
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.copy_(values[start:stop])


def verify_weights(built: BuiltModel, ranks: Ranks) -> None:
    """Gather every block as training will and compare its bytes with those that were loaded.

    Raises:
        WeightsError: on every rank, naming the first layer whose bytes differ on any rank.
    """
    wrong: list[str] = []
    for block in built.skeleton.blocks:
        with gathered(block):
            wrong += [layer.name for layer in packed_layers(block) if not _is_intact(layer, built.report.fingerprints)]
    found: list[list[str]] = [[] for _ in range(ranks.world_size)]
    dist.all_gather_object(found, wrong)
    for rank, names in enumerate(found):
        if names:
            raise WeightsError(
                f"'{names[0]}' ({len(names)} layers in all) was loaded correctly but is gathered with other bytes on rank"
                f" {rank}: training would use wrong weights. Try --quant_storage float32, and report this with your"
                f" versions of torch and driver; --verify_weights false switches the check off"
            )


def _is_intact(layer: LoRALinear | ExpertStack, fingerprints: Mapping[str, int]) -> bool:
    gathered = layer.packed.view(torch.uint8)
    return int(fingerprint(gathered).item()) == fingerprints[layer.name]

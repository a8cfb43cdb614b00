"""Load a checkpoint into the shards of this rank, layer by layer: read the rows whose bytes it will own, quantise, store.

No rank ever holds more than its own shards and one matrix. Where there are several copies of the base, each is read, or only
the first, whose ranks send every shard to the ranks that hold the same one, quantised.
"""

from __future__ import annotations

import itertools
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fsdp_qlora.distributed import Ranks, agree_on_errors, shard_rows
from fsdp_qlora.errors import WeightsError
from fsdp_qlora.models.vocabulary import ShardedVocabulary
from fsdp_qlora.quant.expert_lora import ExpertLora
from fsdp_qlora.quant.experts import ExpertStack
from fsdp_qlora.quant.layout import BLOCKSIZE, Layout
from fsdp_qlora.quant.linear import LoRALinear, initial_lora_A
from fsdp_qlora.quant.nf4 import dense_bytes, pack_statistics, quantize_blocks, quantize_matrix
from fsdp_qlora.weights.fingerprint import fingerprint
from fsdp_qlora.weights.read_ahead import Run
from fsdp_qlora.weights.reader import Reader
from fsdp_qlora.weights.source import (
    BLOCK_BYTES,
    check_quantized,
    check_shape,
    copy_quantized,
    flat_sources,
    is_quantized,
    place,
    require_finite,
)


@dataclass
class LoadReport:
    """What loading did on this rank.

    Attributes:
        bytes_read: from the checkpoint.
        bytes_received: from the rank that read this rank's shard for it.
        fingerprints: checksum of each 4-bit matrix's bytes over all shards, by the layer's name.
    """

    bytes_read: int = 0
    bytes_received: int = 0
    seconds: float = 0.0
    fingerprints: dict[str, int] = field(default_factory=dict)


def reads_base(ranks: Ranks, broadcast: bool) -> bool:
    """Return whether a rank reads the base, or receives it where only one copy of it is read."""
    return ranks.replica == 0 or not broadcast


def check_tensors(reader: Reader, root: nn.Module, names: Mapping[nn.Module, str]) -> None:
    """Raise WeightsError unless each tensor has the shape and dtype of the parameter it is for; reads no weights."""
    seen: set[int] = set()  # tied weights are one tensor
    for module in root.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or _is_lora(module, name):
                continue
            seen.add(id(parameter))
            if name != "packed":
                check_shape(reader, f"{names[module]}.{name}", _full_shape(module, parameter))
            elif isinstance(module, ExpertStack):
                for matrix in module.matrix_names():
                    check_matrix(reader, matrix, module.layout)
            else:
                assert isinstance(module, LoRALinear)
                check_matrix(reader, f"{module.name}.weight", module.layout)


def _is_lora(module: nn.Module, name: str) -> bool:
    return isinstance(module, LoRALinear | ExpertLora) and name.startswith("lora_")


def check_matrix(reader: Reader, name: str, layout: Layout) -> None:
    """Raise WeightsError unless a matrix, quantised or not, is of the form `layout` expects."""
    if is_quantized(reader.tensors, name):
        check_quantized(reader, name, layout)
    else:
        check_shape(reader, name, (layout.out_features, layout.in_features))


def _full_shape(module: nn.Module, parameter: nn.Parameter) -> tuple[int, ...]:
    if isinstance(module, ShardedVocabulary):
        return (module.num_rows, parameter.shape[1])
    return tuple(parameter.shape)


class Loader:
    """Fills the parameters of a model on the meta device, sharded by FSDP or whole.

    Args:
        reader: the checkpoint, by the model's own names; checked by `check_tensors`.
        ranks: whose shard to load.
        names: name in the model of each module that owns parameters.
        allocate: returns the CPU or device memory that a module's parameter is to live in: (module, name, shape, dtype).
        seed: seed of LoRA's initial values, the same at every world size.
        adapter: values of the LoRA matrices by '<layer name>.lora_A' / '.lora_B', instead of initial ones, and of
            modules that were trained whole by their names.
        init: kind of initial values, as `initial_lora_A` takes it.
        broadcast: read only one copy of the base and send it to the others.
    """

    def __init__(
        self,
        reader: Reader,
        ranks: Ranks,
        names: Mapping[nn.Module, str],
        allocate: Callable[[nn.Module, str, torch.Size, torch.dtype], Tensor],
        seed: int,
        adapter: Mapping[str, Tensor] | None = None,
        init: str = "default",
        broadcast: bool = False,
    ) -> None:
        self.reader, self.ranks, self.names, self.allocate = reader, ranks, names, allocate
        self.seed, self.adapter, self.init = seed, adapter, init
        self._broadcasts = broadcast and ranks.num_replicas > 1
        self._reads = reads_base(ranks, broadcast)
        self._bytes_received = 0
        self._fingerprints: dict[str, Tensor] = {}
        self._filled: dict[int, nn.Parameter] = {}

    def load(self, units: list[nn.Module], progress: Callable[[int, int], None] | None = None) -> LoadReport:
        """Fill the parameters of the units (decoder blocks, embedding, ...), one after the other.

        Raises:
            WeightsError, on every rank, if any rank finds a damaged tensor or cannot read one.
        """
        started = time.monotonic()
        with self.reader.ahead(list(self._runs(units)) if self._reads else []):
            for done, unit in enumerate(units):
                with agree_on_errors(self.ranks, "loading weights"):
                    self._load_unit(unit)
                if progress is not None:
                    progress(done + 1, len(units))
        fingerprints = self._sum_fingerprints()
        return LoadReport(self.reader.bytes_read, self._bytes_received, time.monotonic() - started, fingerprints)

    def _runs(self, units: list[nn.Module]) -> Iterator[Run]:
        """Yield what this rank will read of the checkpoint, in that order."""
        seen: set[int] = set()
        for module in itertools.chain.from_iterable(unit.modules() for unit in units):
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:  # tied weights
                    continue
                seen.add(id(parameter))
                if _is_lora(module, name) or self._trained_whole(module, name) is not None:
                    continue
                for tensor, first, last in self._sources(module, name, parameter):
                    entry = self.reader.entry(tensor)
                    size = entry.dtype.itemsize
                    yield entry.file, entry.start + first * size, (last - first) * size

    def _sources(self, module: nn.Module, name: str, parameter: nn.Parameter) -> Iterator[tuple[str, int, int]]:
        """Yield (tensor, first, last) for the elements [first, last) that this rank's part of a parameter is made of."""
        tensors = self.reader.tensors
        if isinstance(module, LoRALinear) and name == "packed":
            shard = module.layout.shard_range(self.ranks.shard)
            yield from flat_sources(tensors, f"{module.name}.weight", module.layout, shard.start, shard.stop)
        elif isinstance(module, ExpertStack):
            for index, matrix in enumerate(module.matrix_names()):
                begin, end = self._part_of_stack(module.layout, index)
                if begin < end:
                    yield from flat_sources(tensors, matrix, module.layout, 0, module.layout.num_bytes)
        else:
            start, stop = self._rows(_full_shape(module, parameter)[0])
            row_size = math.prod(parameter.shape[1:])
            yield f"{self.names[module]}.{name}", start * row_size, stop * row_size

    def _trained_whole(self, module: nn.Module, name: str) -> Tensor | None:
        """Return the values of a parameter that comes from the adapter in place of the base."""
        return self.adapter.get(self.names[module]) if self.adapter is not None and name == "weight" else None

    def _load_unit(self, unit: nn.Module) -> None:
        failure: WeightsError | None = None
        for module in unit.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.is_meta:
                    continue
                try:
                    self._load_parameter(module, name, parameter)
                except WeightsError as error:
                    # go on: the other ranks wait for this one in the exchange of scales of every matrix
                    failure = failure or error
        if failure is not None:
            raise failure

    def _load_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if id(parameter) in self._filled:  # tied weights
            setattr(module, name, self._filled[id(parameter)])
            return
        local_shape = parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape
        target = self.allocate(module, name, local_shape, parameter.dtype)
        if _is_lora(module, name):
            assert isinstance(module, LoRALinear | ExpertLora)
            self._load_lora(module, name, target)
        elif (whole := self._trained_whole(module, name)) is not None:
            self._load_part(whole, target)
        else:
            try:
                if self._reads:
                    self._read_base(module, name, _full_shape(module, parameter)[0], target)
            finally:
                if self._broadcasts:  # after an error too, as the other replicas wait
                    self._broadcast(module, name, target)
        filled = target
        if isinstance(parameter, DTensor):
            filled = torch.empty_like(parameter, device=target.device)
            assert isinstance(filled, DTensor)
            filled._local_tensor = target
        self._filled[id(parameter)] = nn.Parameter(filled, requires_grad=parameter.requires_grad)
        setattr(module, name, self._filled[id(parameter)])

    def _read_base(self, module: nn.Module, name: str, num_rows: int, target: Tensor) -> None:
        """Fill this rank's part of a frozen parameter from the checkpoint."""
        if isinstance(module, LoRALinear) and name == "packed":
            self._load_packed(module, target.view(torch.uint8))
        elif isinstance(module, ExpertStack):
            self._load_stack(module, target.view(torch.uint8))
        else:
            self._load_rows(f"{self.names[module]}.{name}", num_rows, target)

    def _broadcast(self, module: nn.Module, name: str, target: Tensor) -> None:
        """Fill this rank's part of a frozen parameter with that of the first replica.

        What rests in CPU memory goes through the device, between which the fast links are.
        """
        if not self._reads:
            self._bytes_received += target.nbytes
            if isinstance(module, LoRALinear | ExpertStack) and name == "packed":  # the first replica's, which is read
                self._fingerprints[module.name] = torch.zeros((), dtype=torch.int64, device=self.ranks.device)
        if target.numel() == 0:  # more ranks than rows
            return
        buffer = target.to(self.ranks.device)
        dist.broadcast(buffer.view(-1).view(torch.uint8), group_src=0, group=self.ranks.replicate_group)
        if buffer is not target:
            target.copy_(buffer)

    def _rows(self, num_rows: int) -> tuple[int, int]:
        """Return the rows of this rank."""
        return shard_rows(num_rows, self.ranks.shard, self.ranks.num_shards)

    def _load_rows(self, name: str, num_rows: int, target: Tensor) -> None:
        start, stop = self._rows(num_rows)
        row_size = target[:1].numel() if target.numel() else 0
        if self.reader.entry(name).dtype == target.dtype:
            values = target.view(-1)
            self.reader.read_into(values.view(torch.uint8), name, start * row_size * target.itemsize)
        else:
            values = self.reader.read(name, start * row_size, stop * row_size, target.device)
            target.copy_(values.view(target.shape))
        require_finite(values, self.reader, name)

    def _load_lora(self, module: LoRALinear | ExpertLora, name: str, target: Tensor) -> None:
        key = f"{module.name}.{name}"
        if self.adapter is not None:
            full = self.adapter[key]
        elif name == "lora_A":
            # of a seed, PyTorch's CPU generator uses 32 bits
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {key}".encode()))
            full = initial_lora_A(module.adapter_shape(name), module.rank, generator, self.init)
        else:
            target.zero_()
            return
        self._load_part(full, target)

    def _load_part(self, full: Tensor, target: Tensor) -> None:
        start, stop = self._rows(full.shape[0])
        target.copy_(full[start:stop])

    def _load_packed(self, module: LoRALinear, target: Tensor) -> None:
        """Fill uint8 [shard_bytes] with this rank's bytes of the flat parameter."""
        name, layout = f"{module.name}.weight", module.layout
        shard = layout.shard_range(self.ranks.shard)
        quantized = is_quantized(self.reader.tensors, name)
        on_device = target.device == self.ranks.device
        # bytes that nothing is computed of go where they are wanted at once
        flat = target.zero_() if on_device or quantized else torch.zeros_like(target, device=self.ranks.device)
        if quantized:
            copy_quantized(self.reader, name, layout, flat, shard.start)
        elif layout.dense_dtype is not None:
            self._copy_dense(name, layout, layout.dense_dtype, shard.start, flat)
        else:
            self._quantize(name, layout, shard.start, flat)
        self._fingerprints[module.name] = fingerprint(flat.to(self.ranks.device, non_blocking=True), shard.start)
        if flat is not target:
            target.copy_(flat)

    def _load_stack(self, stack: ExpertStack, target: Tensor) -> None:
        """Fill uint8 [shard_bytes] with this rank's bytes of a stack, matrix by matrix.

        A matrix that lies across two shards is read and quantised by both ranks: small beside the stack, and no exchange.
        """
        layout, shard = stack.layout, stack.layout.shard_range(self.ranks.shard)
        total = torch.zeros((), dtype=torch.int64, device=self.ranks.device)
        target.zero_()
        for index, name in enumerate(stack.matrix_names()):
            begin, end = self._part_of_stack(layout, index)
            if begin >= end:
                continue
            first = layout.matrix_range(index).start
            piece = self._whole_matrix(name, layout)[begin - first : end - first]
            total += fingerprint(piece, begin)
            target[begin - shard.start : end - shard.start] = piece
        self._fingerprints[stack.name] = total

    def _part_of_stack(self, layout: Layout, index: int) -> tuple[int, int]:
        """Return the bytes [begin, end) of a stack that are of one of its matrices and in this rank's shard."""
        matrix, shard = layout.matrix_range(index), layout.shard_range(self.ranks.shard)
        return max(matrix.start, shard.start), min(matrix.stop, shard.stop)

    def _whole_matrix(self, name: str, layout: Layout) -> Tensor:
        """Return the bytes of a matrix, uint8 [num_bytes]."""
        flat = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=self.ranks.device)
        if is_quantized(self.reader.tensors, name):
            copy_quantized(self.reader, name, layout, flat)
            return flat
        if layout.dense_dtype is not None:
            self._copy_dense(name, layout, layout.dense_dtype, 0, flat)
            return flat
        weights = self.reader.read(name, device=self.ranks.device)
        require_finite(weights, self.reader, name)
        return quantize_matrix(weights, layout)

    def _copy_dense(self, name: str, layout: Layout, dtype: torch.dtype, start: int, flat: Tensor) -> None:
        for _, first, last in flat_sources(self.reader.tensors, name, layout, start, start + flat.numel()):
            weights = self.reader.read(name, first, last, flat.device)
            require_finite(weights, self.reader, name)
            flat[: (last - first) * dtype.itemsize] = dense_bytes(weights, dtype)

    def _quantize(self, name: str, layout: Layout, start: int, flat: Tensor) -> None:
        failure: WeightsError | None = None
        block, absmax = 0, torch.empty(0, dtype=torch.float32, device=flat.device)
        for _, first, last in flat_sources(self.reader.tensors, name, layout, start, start + flat.numel()):
            block = first // BLOCKSIZE
            try:
                weights = self.reader.read(name, first, last, flat.device)
                require_finite(weights, self.reader, name)
                codes, absmax = quantize_blocks(weights, layout.quant_type)
                place(flat, start, block * BLOCK_BYTES, codes)
            except WeightsError as error:
                failure = error
                absmax = torch.zeros(-(-(last - first) // BLOCKSIZE), dtype=torch.float32, device=flat.device)
        absmax = self._exchange_absmax(absmax, block, layout)
        place(flat, start, layout.absmax.start, pack_statistics(absmax, layout))
        if failure is not None:
            raise failure

    def _exchange_absmax(self, absmax: Tensor, first: int, layout: Layout) -> Tensor:
        """Return the scales of all blocks [num_blocks], from each rank's run that begins at block `first`."""
        if layout.num_shards == 1:
            return absmax
        # a block that straddles two shards belongs to the one that holds its first byte
        owned = [
            -(-min(layout.shard_range(s).start, layout.codes.stop) // BLOCK_BYTES) for s in range(layout.num_shards)
        ]
        owned.append(layout.num_blocks)
        owned = [min(block, layout.num_blocks) for block in owned]
        shard = self.ranks.shard
        longest = max(after - before for before, after in itertools.pairwise(owned))
        mine = torch.zeros(longest, dtype=torch.float32, device=absmax.device)
        own = absmax[owned[shard] - first : owned[shard + 1] - first]
        mine[: own.numel()] = own
        gathered = [torch.empty_like(mine) for _ in range(layout.num_shards)]
        dist.all_gather(gathered, mine, group=self.ranks.shard_group)
        return torch.cat([run[: owned[s + 1] - owned[s]] for s, run in enumerate(gathered)])

    def _sum_fingerprints(self) -> dict[str, int]:
        if not self._fingerprints:
            return {}
        total = torch.stack(list(self._fingerprints.values()))
        if self.ranks.num_shards > 1:
            dist.all_reduce(total, group=self.ranks.shard_group)
        if self._broadcasts:
            # not of what was received: verifying the gathered bytes then finds errors of the transfer too
            dist.broadcast(total, group_src=0, group=self.ranks.replicate_group)
        return dict(zip(self._fingerprints, total.tolist(), strict=True))

"""The flat parameter of a frozen matrix: where the codes and statistics of one quantised matrix lie in one run of bytes.

    [ codes: out*in/2 | absmax: 1 byte a block | nested absmax: fp32 | offset: fp32 | padding ]     double quantisation
    [ codes: out*in/2 | absmax: fp32 a block                                        | padding ]     without
    [ weights: out*in in 16 or 32 bits                                              | padding ]     not quantised

Sections begin at multiples of 16 bytes. FSDP shards, offloads, prefetches and gathers the bytes as one 1-D parameter, so
the statistics always travel with the weights they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

BLOCKSIZE = 64
"""Weights that share one scale (bitsandbytes' default)."""

NESTED_BLOCKSIZE = 256
"""Scales that share one scale under double quantisation (fixed in bitsandbytes)."""

SECTION_ALIGNMENT = 16

STORAGE_DTYPES = {
    "float32": torch.float32,
    "uint8": torch.uint8,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


DENSE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""What a matrix may be held in that is not quantised, by the `quant_type` that says so."""


def _align(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@dataclass(frozen=True)
class Section:
    """A run of bytes inside the flat parameter: [start, stop)."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """Byte layout of one quantised matrix [out_features, in_features], or of several equal ones that share a parameter.

    Equal matrices have equal layouts, so compiled code and kernels can be shared between blocks. With `num_matrices`
    (experts) one matrix follows the other, each with its statistics; sections are those of the first.
    """

    out_features: int
    in_features: int
    quant_type: str = "nf4"
    double_quant: bool = True
    storage: str = "float32"
    num_shards: int = 1
    num_matrices: int = 1

    @property
    def num_weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def dense_dtype(self) -> torch.dtype | None:
        """dtype of the weights where they are not quantised."""
        return DENSE_DTYPES.get(self.quant_type)

    @property
    def num_blocks(self) -> int:
        return -(-self.num_weights // BLOCKSIZE)

    @cached_property
    def codes(self) -> Section:
        """The 4-bit codes, or the weights themselves."""
        if self.dense_dtype is not None:
            return Section(0, self.num_weights * self.dense_dtype.itemsize)
        return Section(0, (self.num_weights + 1) // 2)

    @cached_property
    def absmax(self) -> Section:
        """uint8 codes of the scales under double quantisation, the fp32 scales themselves without."""
        start = _align(self.codes.stop, SECTION_ALIGNMENT)
        if self.dense_dtype is not None:
            return Section(start, start)
        return Section(start, start + self.num_blocks * (1 if self.double_quant else 4))

    @cached_property
    def nested_absmax(self) -> Section:
        start = _align(self.absmax.stop, SECTION_ALIGNMENT)
        num_nested = -(-self.num_blocks // NESTED_BLOCKSIZE) if self.double_quant else 0
        return Section(start, start + 4 * num_nested)

    @cached_property
    def offset(self) -> Section:
        start = _align(self.nested_absmax.stop, SECTION_ALIGNMENT)
        return Section(start, start + (4 if self.double_quant else 0))

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of a matrix that carry information: all but the padding at the end. A multiple of 16 for every layout."""
        return _align(self.offset.stop, SECTION_ALIGNMENT)

    @cached_property
    def padded_bytes(self) -> int:
        """Bytes of the whole parameter: every shard has the same size, a multiple of 16."""
        return _align(self.num_matrices * self.num_bytes, SECTION_ALIGNMENT * self.num_shards)

    @property
    def shard_bytes(self) -> int:
        return self.padded_bytes // self.num_shards

    @property
    def storage_dtype(self) -> torch.dtype:
        return STORAGE_DTYPES[self.storage]

    @property
    def numel(self) -> int:
        """Elements of the flat parameter under its storage dtype."""
        return self.padded_bytes // self.storage_dtype.itemsize

    def matrix_range(self, index: int) -> Section:
        """Bytes [start, stop) of one of the matrices."""
        return Section(index * self.num_bytes, (index + 1) * self.num_bytes)

    def shard_range(self, shard: int) -> Section:
        """Bytes [start, stop) that a shard holds."""
        return Section(shard * self.shard_bytes, (shard + 1) * self.shard_bytes)

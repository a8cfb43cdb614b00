"""Read runs of elements out of safetensors files, counting every byte."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from fsdp_qlora.errors import WeightsError
from fsdp_qlora.weights.index import TensorEntry


class Reader:
    """Reads slices of a checkpoint's tensors with plain reads, so that nothing else of the files enters memory.

    Attributes:
        bytes_read: bytes read so far.
    """

    def __init__(self, tensors: Mapping[str, TensorEntry]) -> None:
        self.tensors = tensors
        self.bytes_read = 0
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor in storage order, as a 1-D CPU tensor of its dtype.

        Raises:
            WeightsError: no such tensor, or the file cannot be read or ends early.
        """
        entry = self.entry(name)
        itemsize = entry.dtype.itemsize
        stop = entry.size_bytes // itemsize if stop is None else stop
        return self.read_bytes(name, start * itemsize, stop * itemsize).view(entry.dtype)

    def read_bytes(self, name: str, start: int, stop: int) -> Tensor:
        """Return bytes [start, stop) of a tensor as uint8, whatever its dtype."""
        entry = self.entry(name)
        data = torch.empty(max(stop - start, 0), dtype=torch.uint8)
        self._fill(entry, entry.start + start, data)
        self.bytes_read += data.numel()
        return data

    def entry(self, name: str) -> TensorEntry:
        """Return a tensor's entry; WeightsError names the tensor and a file if there is none."""
        if name not in self.tensors:
            raise WeightsError(f"{self._some_folder()}: tensor '{name}' is missing; finish or repeat the download")
        return self.tensors[name]

    def _some_folder(self) -> str:
        return str(next(iter(self.tensors.values())).file.parent) if self.tensors else "empty checkpoint"

    def _fill(self, entry: TensorEntry, position: int, data: Tensor) -> None:
        try:
            if entry.file not in self._files:
                self._files[entry.file] = os.open(entry.file, os.O_RDONLY)
            view = memoryview(data.numpy())  # type: ignore[arg-type]
            while view:
                count = os.preadv(self._files[entry.file], [view], position)
                if count <= 0:
                    raise WeightsError(f"{entry.file}: ends inside tensor '{entry.name}'; download the file again")
                view, position = view[count:], position + count
        except OSError as error:
            raise WeightsError(
                f"{entry.file}: tensor '{entry.name}' cannot be read ({error.strerror}); check the disk and the file"
            ) from error

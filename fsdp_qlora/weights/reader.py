"""Read runs of elements out of safetensors files, counting every byte."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from fsdp_qlora.errors import WeightsError
from fsdp_qlora.weights.index import TensorEntry
from fsdp_qlora.weights.read_ahead import PIECE_BYTES, ReadAhead, Run

READERS = 8
"""Threads that read one slice together: a single one leaves fast disks idle."""

STAGING_BYTES = 64 << 20
"""Each of the two pinned buffers that bytes for a GPU go through."""


class Reader:
    """Reads slices of a checkpoint's tensors with plain reads, so that nothing else of the files enters memory.

    Attributes:
        bytes_read: bytes read so far.
    """

    def __init__(self, tensors: Mapping[str, TensorEntry]) -> None:
        self.tensors = tensors
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._staging: list[tuple[Tensor, torch.cuda.Event]] = []
        self._ahead: ReadAhead | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        self._staging.clear()

    @contextmanager
    def ahead(self, runs: Iterable[Run]) -> Iterator[None]:
        """Have what will be read come into the page cache early, while this lasts."""
        with ReadAhead(runs, READERS) as self._ahead:
            yield

    def read(self, name: str, start: int = 0, stop: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Return elements [start, stop) of a tensor in storage order, 1-D in its dtype.

        Raises:
            WeightsError: no such tensor, or the file cannot be read or ends early.
        """
        entry = self.entry(name)
        itemsize = entry.dtype.itemsize
        stop = entry.size_bytes // itemsize if stop is None else stop
        data = torch.empty(max(stop - start, 0) * itemsize, dtype=torch.uint8, device=device)
        self.read_into(data, name, start * itemsize)
        return data.view(entry.dtype)

    def read_into(self, data: Tensor, name: str, start: int) -> None:
        """Fill `data`, uint8 and contiguous, with a tensor's bytes from `start` on."""
        entry = self.entry(name)
        if data.is_cuda:
            self._read_to_gpu(entry, entry.start + start, data)
        else:
            self._read(entry, entry.start + start, data)
        self.bytes_read += data.numel()
        if self._ahead is not None:
            self._ahead.loaded(data.numel())

    def _read_to_gpu(self, entry: TensorEntry, position: int, data: Tensor) -> None:
        """Read into one pinned buffer while the other is copied."""
        if not self._staging:
            for _ in range(2):
                buffer = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
                self._staging.append((buffer, torch.cuda.Event()))  # type: ignore[no-untyped-call]
        for piece in torch.split(data, STAGING_BYTES):
            buffer, copied = self._staging[0]
            self._staging.reverse()
            copied.synchronize()
            self._read(entry, position, buffer[: piece.numel()])
            piece.copy_(buffer[: piece.numel()], non_blocking=True)
            copied.record()
            position += piece.numel()

    def _read(self, entry: TensorEntry, position: int, data: Tensor) -> None:
        """Fill CPU memory from a place in the entry's file, with several threads if it is much."""
        self._open(entry)
        if data.numel() <= PIECE_BYTES:
            self._fill(entry, position, data)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(READERS)
        pieces = torch.split(data, PIECE_BYTES)
        positions = range(position, position + data.numel(), PIECE_BYTES)
        for _ in self._pool.map(self._fill, [entry] * len(pieces), positions, pieces):
            pass

    def entry(self, name: str) -> TensorEntry:
        """Return a tensor's entry; WeightsError names the tensor and a file if there is none."""
        if name not in self.tensors:
            raise WeightsError(f"{self._some_folder()}: tensor '{name}' is missing; finish or repeat the download")
        return self.tensors[name]

    def _some_folder(self) -> str:
        return str(next(iter(self.tensors.values())).file.parent) if self.tensors else "empty checkpoint"

    def _open(self, entry: TensorEntry) -> None:
        if entry.file in self._files:
            return
        try:
            self._files[entry.file] = os.open(entry.file, os.O_RDONLY)
        except OSError as error:
            raise _unreadable(entry, error) from error

    def _fill(self, entry: TensorEntry, position: int, data: Tensor) -> None:
        try:
            view = memoryview(data.numpy())  # type: ignore[arg-type]
            while view:
                count = os.preadv(self._files[entry.file], [view], position)
                if count <= 0:
                    raise WeightsError(f"{entry.file}: ends inside tensor '{entry.name}'; download the file again")
                view, position = view[count:], position + count
        except OSError as error:
            raise _unreadable(entry, error) from error


def _unreadable(entry: TensorEntry, error: OSError) -> WeightsError:
    return WeightsError(
        f"{entry.file}: tensor '{entry.name}' cannot be read ({error.strerror}); check the disk and the file"
    )

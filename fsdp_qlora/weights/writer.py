"""Write a safetensors checkpoint of any size, tensor by tensor, so that a run that is killed goes on where it stopped.

All sizes are known beforehand, so the place of each tensor in its file is fixed and its bytes are written there as they are
made: no more than what one `Part` holds is ever in memory. A file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsdp_qlora.errors import ConfigError
from fsdp_qlora.files import FileRecord, fsync_folder, record_of, write_file
from fsdp_qlora.output_files import INDEX_FILE, STATE_FILE
from fsdp_qlora.weights.index import DTYPES

MAX_TEXT_BYTES = 9_999
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Slot:
    """A tensor of the output; shape None: a text (uint8, at most MAX_TEXT_BYTES) whose length is known when it is made."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...] | None

    @property
    def size_bytes(self) -> int:
        size = self.dtype.itemsize
        for dimension in (0,) if self.shape is None else self.shape:
            size *= dimension
        return size


Sink = Callable[[str, Tensor, int], None]
"""Takes the bytes of a tensor in runs: (name, CPU tensor, first element)."""


@dataclass(frozen=True)
class Part:
    """Tensors that are made together and stay in one file; `make` gives every element of each to the sink."""

    slots: tuple[Slot, ...]
    make: Callable[[Sink], None]

    @property
    def size_bytes(self) -> int:
        return sum(slot.size_bytes for slot in self.slots)


@dataclass
class Written:
    """What writing did: files made now, files kept from an earlier run, and the size of all."""

    made: int
    kept: int
    size_bytes: int


class _ShardFile:
    """One safetensors file whose tensors arrive in any order, in runs."""

    def __init__(self, path: Path, slots: Sequence[Slot], metadata: Mapping[str, str]) -> None:
        self.metadata = {"format": "pt", **metadata}
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        # readers want each tensor at a multiple of its item size; texts come last because only they can shift
        self.slots = sorted(slots, key=lambda slot: (slot.shape is None, -slot.dtype.itemsize))
        self.offsets: dict[str, int] = {}
        position = 0
        for slot in self.slots:
            self.offsets[slot.name] = position
            position += slot.size_bytes
        self.fixed_bytes = position
        self.by_name = {slot.name: slot for slot in slots}
        self.received = dict.fromkeys(self.by_name, 0)
        self.texts: dict[str, bytes] = {}
        longest = {slot.name: MAX_TEXT_BYTES for slot in slots if slot.shape is None}
        self.header_bytes = -(-len(self._header(longest)) // 8) * 8
        self.file = self.partial.open("wb")

    def _header(self, text_bytes: Mapping[str, int]) -> bytes:
        header: dict[str, Any] = {"__metadata__": self.metadata}
        position = self.fixed_bytes
        for slot in self.slots:
            shape, start = slot.shape, self.offsets[slot.name]
            size = slot.size_bytes
            if shape is None:
                size = text_bytes[slot.name]
                shape, start, position = (size,), position, position + size
            offsets = [start, start + size]
            header[slot.name] = {"dtype": _DTYPE_NAMES[slot.dtype], "shape": list(shape), "data_offsets": offsets}
        return json.dumps(header, separators=(",", ":")).encode()

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        slot = self.by_name[name]
        assert data.dtype == slot.dtype, f"{name}: {data.dtype} for {slot.dtype}"
        raw = data.contiguous().view(-1).view(torch.uint8).numpy()
        self.received[name] += raw.nbytes
        if slot.shape is None:
            self.texts[name] = raw.tobytes()
            return
        self.file.seek(8 + self.header_bytes + self.offsets[name] + start * slot.dtype.itemsize)
        self.file.write(memoryview(raw))  # type: ignore[arg-type]

    def finish(self) -> FileRecord:
        """Write texts and header, give the file its name; return what it holds."""
        for slot in self.slots:
            assert slot.shape is None or self.received[slot.name] == slot.size_bytes, f"{slot.name} is incomplete"
        self.file.seek(8 + self.header_bytes + self.fixed_bytes)
        self.file.writelines(self.texts[slot.name] for slot in self.slots if slot.shape is None)
        self.file.seek(0)
        header = self._header({name: len(text) for name, text in self.texts.items()})
        # the format allows spaces after the header
        self.file.write(self.header_bytes.to_bytes(8, "little") + header.ljust(self.header_bytes))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        result = record_of(self.partial)
        self.partial.replace(self.path)
        fsync_folder(self.path.parent)
        return result


def split(parts: Sequence[Part], shard_bytes: int) -> list[list[Part]]:
    """Return the parts by file, in their order; a part larger than a file gets its own."""
    shards: list[list[Part]] = []
    room = 0
    for part in parts:
        if not shards or part.size_bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(part)
        room -= part.size_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """Return the names that transformers gives the files of a checkpoint."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return what an earlier run noted in an unfinished checkpoint, {} if that is damaged; None if there is none."""
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text())
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def begin(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> int:
    """Create the folder of a checkpoint, or take up one that an earlier run of the same identity left.

    Returns:
        Bytes of its finished files.

    Raises:
        ConfigError: it holds anything else, and `overwrite` is false.
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = read_state(folder)
    if state is not None and state.get("identity") == identity and not overwrite:
        return sum((folder / name).stat().st_size for name in state["finished"] if (folder / name).exists())
    if any(folder.iterdir()) and not overwrite:
        found = "is not empty" if state is None else "holds an unfinished checkpoint of other inputs or settings"
        raise ConfigError(f"--output_dir={folder} {found}; choose another, or replace its content with --overwrite")
    for pattern in ("config.json", "*.safetensors", "*.safetensors.partial", INDEX_FILE):
        for path in folder.glob(pattern):
            path.unlink()
    write_file(folder / STATE_FILE, json.dumps({"identity": identity, "finished": {}}).encode())
    return 0


def write_shards(
    folder: Path,
    parts: Sequence[Part],
    shard_bytes: int,
    identity: Mapping[str, Any],
    say: Callable[[str], None],
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write the weight files and their index, keeping those that an earlier run of the same identity completed.

    Args:
        folder: made by `begin` with the same identity.
        parts: what to write.
        shard_bytes: size at which a new file is begun.
        identity: what the content depends on; JSON.
        say: receives lines of progress.
        metadata: noted in the header of every file.

    Raises:
        OSError: the folder cannot be written.
    """
    shards = split(parts, shard_bytes)
    names = shard_names(len(shards))
    finished: dict[str, Any] = (read_state(folder) or {}).get("finished", {})
    total, done, started, shown = sum(part.size_bytes for part in parts), 0, time.monotonic(), time.monotonic()
    made = kept = size = 0
    for name, shard in zip(names, shards, strict=True):
        path = folder / name
        if path.exists() and asdict(record_of(path)) == finished.get(name):
            say(f"{name}: complete and verified, kept")
            done, kept, size = done + sum(part.size_bytes for part in shard), kept + 1, size + path.stat().st_size
            continue
        file = _ShardFile(path, [slot for part in shard for slot in part.slots], metadata or {})
        for part in shard:
            part.make(file.write)
            done += part.size_bytes
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                say(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {shown - started:.0f} s")
        finished[name] = asdict(file.finish())
        size, made = size + finished[name]["size"], made + 1
        write_file(folder / STATE_FILE, json.dumps({"identity": identity, "finished": finished}).encode())
        say(f"{name}: written ({made + kept} of {len(names)})")
    if len(names) > 1:
        files = {slot.name: name for name, shard in zip(names, shards, strict=True) for p in shard for slot in p.slots}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        write_file(folder / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
    return Written(made, kept, size)


def complete(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, without which nothing loads the folder, as the last file of a checkpoint."""
    write_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    fsync_folder(folder)
    (folder / STATE_FILE).unlink()

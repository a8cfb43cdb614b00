"""Checkpoint folders: which are taken for complete, and that no damage goes unnoticed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fsdp_qlora.checkpoint import (
    FOLDER,
    MANIFEST,
    Manifest,
    Position,
    _text,
    checkpoint_folders,
    name_of,
    prune,
    publish,
    put_aside_later,
    read_manifest,
    remove_leftovers,
    verify,
)
from fsdp_qlora.distributed import Ranks, process_group
from fsdp_qlora.errors import CheckpointError
from fsdp_qlora.files import FileRecord, record_of, write_file, write_tensors
from fsdp_qlora.resume import find_checkpoint

NUM_EDITS = 10_000


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with process_group("full", timeout_s=60, device="cpu") as joined:
        yield joined


def make(run: Path, step: int) -> Path:
    """Write a small checkpoint of two ranks."""
    partial = run / FOLDER / f"{name_of(step)}.partial-x"
    (partial / "adapter").mkdir(parents=True)
    generator = torch.Generator().manual_seed(step)
    files: dict[str, FileRecord] = {}
    for name in ("rank-00000.safetensors", "rank-00001.safetensors", "adapter/adapter_model.safetensors"):
        tensors = {f"t{i}": torch.randn(3, 5, generator=generator) for i in range(3)}
        files[name] = write_tensors(partial / name, tensors, {"format": "pt"})
    manifest = Manifest(Position(step, 1, 8, 100, 1.5), 2, 2, {"base": "b"}, {"lr": 0.1}, {"torch": "2"}, files)
    return publish(partial, manifest, "x")


def load(folder: Path) -> Manifest:
    """Do what resuming does before it uses anything."""
    manifest = read_manifest(folder)
    verify(folder, manifest)
    return manifest


def test_tensors_are_readable_by_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randint(0, 255, (7,), dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "c": torch.arange(3),
    }
    before = os.umask(0o027)
    try:
        record = write_tensors(tmp_path / "x.safetensors", tensors, {"k": "v"})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640
    assert record == record_of(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_a_published_checkpoint_is_read_back(tmp_path: Path) -> None:
    folder = make(tmp_path, 120)
    assert folder.name == "step-000120"
    manifest = load(folder)
    assert manifest.position == Position(120, 1, 8, 100, 1.5)
    assert manifest.identity == {"base": "b"}
    assert [path.name for path in folder.parent.iterdir()] == ["step-000120"]


def random_edit(data: bytes, dice: random.Random) -> bytes:
    """Return the bytes with a bit flipped, a piece cut, inserted, overwritten or moved, or the end cut off."""
    place = dice.randrange(len(data))
    length = dice.randint(1, 16)
    junk = dice.randbytes(length)
    kind = dice.randrange(6)
    if kind == 0:
        return data[:place] + bytes([data[place] ^ (1 << dice.randrange(8))]) + data[place + 1 :]
    if kind == 1:
        return data[:place] + data[place + length :]
    if kind == 2:
        return data[:place] + junk + data[place:]
    if kind == 3:
        return data[:place] + junk + data[place + length :]
    if kind == 4:
        return data[:place]
    return data[place:] + data[:place]


def silent_loads(folder: Path, num_edits: int, seed: int = 0) -> int:
    """Return how many of so many random edits of a checkpoint's files are loaded without an error."""
    dice, silent = random.Random(seed), 0
    names = [MANIFEST, *read_manifest(folder).files]
    originals = {name: (folder / name).read_bytes() for name in names}
    for _ in range(num_edits):
        name = dice.choice(names)
        edited = random_edit(originals[name], dice)
        if edited == originals[name]:
            continue
        (folder / name).write_bytes(edited)
        with contextlib.suppress(CheckpointError):
            load(folder)
            silent += 1
        (folder / name).write_bytes(originals[name])
    load(folder)
    return silent


def test_no_random_edit_is_loaded_silently(tmp_path: Path) -> None:
    in_memory = Path("/dev/shm")  # writing 20,000 files takes a minute on some disks
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else tmp_path) as folder:
        assert silent_loads(make(Path(folder), 1), NUM_EDITS) == 0


def truncated(size: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        os.truncate(path, size(path.stat().st_size))

    return damage


def flip(place: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place(len(data))] ^= 1
        path.write_bytes(data)

    return damage


def swapped(path: Path) -> None:
    other = path.with_name(
        "rank-00001.safetensors" if path.name == "rank-00000.safetensors" else "rank-00000.safetensors"
    )
    if not other.exists():
        other = path.parent.parent / "rank-00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


def linked(path: Path) -> None:
    copy = path.parent.parent.parent / f"copy-{path.name}"
    shutil.copy(path, copy)
    path.unlink()
    path.symlink_to(copy)


def folder_linked(path: Path) -> None:
    folder = path.parent
    folder.rename(folder.with_name("moved"))
    folder.symlink_to(folder.with_name("moved"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": truncated(lambda size: 0),
    "8 bytes": truncated(lambda size: 8),
    "header only": truncated(lambda size: min(size - 1, 200)),
    "half": truncated(lambda size: size // 2),
    "without the last byte": truncated(lambda size: size - 1),
    "bit flipped at the start": flip(lambda size: 0),
    "bit flipped in the middle": flip(lambda size: size // 2),
    "bit flipped at the end": flip(lambda size: size - 1),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "deleted": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "swapped with another": swapped,
    "replaced by a link": linked,
    "its folder replaced by a link": folder_linked,
}
FILES = (MANIFEST, "rank-00000.safetensors", "rank-00001.safetensors", "adapter/adapter_model.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_one_before_is_taken(ranks: Ranks, tmp_path: Path, name: str) -> None:
    for number, (kind, damage) in enumerate(DAMAGE.items()):
        run = tmp_path / str(number)
        older, newer = make(run, 1), make(run, 2)
        said: list[str] = []
        damage(newer / name)
        found = find_checkpoint("auto", run, ranks, said.append)
        assert found is not None, kind
        assert found.folder == older, kind
        assert any(str(newer) in line for line in said), kind
        with pytest.raises(CheckpointError, match="step-000002"):
            find_checkpoint(str(newer), run, ranks, said.append)


def test_a_swap_of_whole_checkpoints_is_noticed(ranks: Ranks, tmp_path: Path) -> None:
    older, newer = make(tmp_path, 1), make(tmp_path, 2)
    shutil.rmtree(newer)
    older.rename(newer)
    with pytest.raises(CheckpointError, match="holds step 1: the folder was renamed or swapped"):
        find_checkpoint("auto", tmp_path, ranks, print)


def signed(manifest: Manifest, **changes: Any) -> bytes:
    """Return a manifest whose sha256 is right, as someone who means harm would write it."""
    content = {"format": 1, **dataclasses.asdict(manifest), **changes}
    return _text({"sha256": hashlib.sha256(_text(content)).hexdigest(), **content})


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"../../secret": {"size": 1, "sha256": "0"}}},
        {"files": {"/etc/hostname": {"size": 1, "sha256": "0"}}},
        {"files": {"adapter/../../x": {"size": 1, "sha256": "0"}}},
        {"files": {"x": 5}},
        {"files": []},
        {"position": None},
        {"position": {"step": "1"}},
        {"more": 1},
        {"format": 2},
    ],
)
def test_manifests_that_lead_astray_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = make(tmp_path, 1)
    (folder / MANIFEST).write_bytes(signed(read_manifest(folder), **changes))
    with pytest.raises(CheckpointError, match=MANIFEST if "step" not in str(changes) else "step-000001"):
        load(folder)


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(ranks: Ranks, tmp_path: Path) -> None:
    folder, canary = make(tmp_path, 1), tmp_path / "ran"
    manifest = read_manifest(folder)
    for name in manifest.files:
        write_file(folder / name, pickle.dumps(Canary(canary)))
        manifest.files[name] = record_of(folder / name)
    for extra in ("optimizer.pt", "adapter/adapter_model.bin", "training_args.bin"):
        (folder / extra).write_bytes(pickle.dumps(Canary(canary)))
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    found = find_checkpoint("auto", tmp_path, ranks, print)
    assert found is not None
    with pytest.raises(CheckpointError):
        found.adapter()
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "the canary works"


def test_the_oldest_are_deleted_and_damaged_ones_neither_count_nor_go(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        make(tmp_path, step)
    (tmp_path / FOLDER / "step-000004" / "rank-00001.safetensors").unlink()
    assert prune(tmp_path, 2, "x") == ["step-000002", "step-000001"]
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-000005", "step-000004", "step-000003"]
    assert len(list((tmp_path / FOLDER).iterdir())) == 3


def test_damage_that_only_reading_shows_does_not_cost_an_intact_checkpoint(tmp_path: Path, ranks: Ranks) -> None:
    for step in (6, 8):
        make(tmp_path, step)
    file = tmp_path / FOLDER / "step-000008" / "rank-00001.safetensors"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    found = find_checkpoint("auto", tmp_path, ranks, print)
    assert found is not None
    assert put_aside_later(tmp_path, found.manifest.position.step, "x") == ["step-000008.damaged-x"]
    make(tmp_path, 7)
    assert prune(tmp_path, 2, "x") == []
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-000007", "step-000006"]
    assert (tmp_path / FOLDER / "step-000008.damaged-x").is_dir()


def test_a_damaged_folder_of_the_same_name_is_put_aside(tmp_path: Path) -> None:
    (make(tmp_path, 2) / MANIFEST).unlink()
    make(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["step-000002", "step-000002.damaged-x"]


def test_leftovers_go_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    make(tmp_path, 1)
    ours = {"step-000002.partial-ab", "step-000001.removed-cd"}
    others = {"step-2.partial-x", "notes", "step-000003.damaged-x"}
    for name in ours | others:
        (tmp_path / FOLDER / name / "adapter").mkdir(parents=True)
    (tmp_path / FOLDER / "step-000009.partial-ln").symlink_to(tmp_path)
    assert set(remove_leftovers(tmp_path)) == ours
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == {*others, "step-000001", "step-000009.partial-ln"}


def test_manifest_texts_are_json(tmp_path: Path) -> None:
    content = json.loads((make(tmp_path, 7) / MANIFEST).read_text())
    assert content["position"]["step"] == 7
    assert content["world_size"] == 2

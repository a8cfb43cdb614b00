"""Checkpoint folders on disk: which are complete, which are damaged, which are kept.

A checkpoint is a folder `step-000120` under `<output_dir>/checkpoints`. It is written as `step-000120.partial-<run id>`, its
manifest last, and renamed once everything is on the disk; so a folder of that exact name is complete unless it was damaged
later. What is inside it means is the business of resume.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import CheckpointError
from fsdp_qlora.files import FileRecord, fsync_folder, record_of, write_new

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
FORMAT = 1

_NAME = re.compile(r"step-(\d{6,})")
_FILE = re.compile(r"(adapter/)?\w[\w.-]*")
_LEFTOVER = re.compile(r"step-\d{6,}\.(partial|removed)-\w+")


@dataclass(frozen=True)
class Position:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        epoch: which pass over the data comes next.
        sequences: sequences already taken from that pass, over all ranks: the same place for every world size.
        tokens, seconds: spent so far, in all sessions of the run.
    """

    step: int = 0
    epoch: int = 0
    sequences: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds and what it belongs to.

    Attributes:
        world_size, num_shards: ranks of the run, and of them those that shared out each matrix.
        identity: what a run must have in common with the checkpoint to go on from it.
        config: all settings of the run.
        files: what each file must hold, by its name in the folder.
    """

    position: Position
    world_size: int
    num_shards: int
    identity: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileRecord]

    def to_bytes(self) -> bytes:
        """Return the manifest's text, which carries its own sha256."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        return _text({"sha256": hashlib.sha256(_text(content)).hexdigest(), **content})


def _text(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def name_of(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:06d}"


def step_of(folder: Path) -> int | None:
    """Return the step of a checkpoint folder's name; None for other names."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint folder after checking that it is whole and that all files are there.

    Contents of the other files are checked by `verify`.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    path = folder / MANIFEST
    if folder.is_symlink() or not folder.is_dir() or step_of(folder) is None:
        raise CheckpointError(f"{folder}: is no checkpoint folder (step-<number>)")
    try:
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a symbolic link")
        data = path.read_bytes()
        content = json.loads(data)
        sha256, version = content.pop("sha256"), content.pop("format")
        # byte for byte what this program writes: no edit goes unnoticed
        intact = _text({"sha256": sha256, "format": version, **content}) == data
        intact = intact and hashlib.sha256(_text({"format": version, **content})).hexdigest() == sha256
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing: the checkpoint is incomplete") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({type(error).__name__})") from error
    if not intact:
        raise CheckpointError(f"{path}: is damaged: its sha256 is not the one it states")
    if version != FORMAT:
        raise CheckpointError(f"{path}: is of format {version}; this version of fsdp_qlora reads format {FORMAT}")
    try:
        content["position"] = Position(**content["position"])
        content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
        manifest = Manifest(**content)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: lacks what a manifest must say ({error})") from error
    outside = [name for name in manifest.files if not _FILE.fullmatch(name)]
    if outside:
        raise CheckpointError(f"{path}: names the file {outside[0]!r}, which is no part of a checkpoint")
    if manifest.position.step != step_of(folder):
        raise CheckpointError(f"{folder}: holds step {manifest.position.step}: the folder was renamed or swapped")
    check_sizes(folder, manifest.files)
    return manifest


def check_sizes(folder: Path, files: dict[str, FileRecord]) -> None:
    """Raise CheckpointError unless every file is there, is a file and has its size."""
    for name, record in files.items():
        path = folder / name
        if path.is_symlink() or path.parent.is_symlink():
            raise CheckpointError(f"{path}: is or lies behind a symbolic link; checkpoints hold files only")
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing (must be on a file system that all ranks share)")
        if path.stat().st_size != record.size:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, and the manifest says {record.size}")


def verify(folder: Path, manifest: Manifest, share: int = 0, num_shares: int = 1) -> None:
    """Compare the sha256 of files with the manifest; each rank may take a share of the files.

    Raises:
        CheckpointError: naming the first file that differs.
    """
    for name in sorted(manifest.files)[share::num_shares]:
        try:
            found = record_of(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror})") from error
        if found != manifest.files[name]:
            raise CheckpointError(f"{folder / name}: its sha256 is not the one in the manifest: the file is damaged")


def checkpoint_folders(run: Path) -> list[Path]:
    """Return what bears the name of a checkpoint in a run folder, complete or not, the newest first."""
    folders = [path for path in _children(run / FOLDER) if step_of(path) is not None]
    return sorted(folders, key=lambda path: step_of(path) or 0, reverse=True)


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def remove_leftovers(run: Path) -> list[str]:
    """Delete what interrupted saves and deletions of earlier processes left; return the names."""
    leftovers = [path for path in _children(run / FOLDER) if _LEFTOVER.fullmatch(path.name) and not path.is_symlink()]
    for path in leftovers:
        shutil.rmtree(path)
    return [path.name for path in leftovers]


def publish(partial: Path, manifest: Manifest, run_id: str) -> Path:
    """Make a written folder a checkpoint: manifest, folder to disk, exact name. Returns the folder.

    A damaged folder of that name (a complete one would have been resumed from) is put aside, not deleted.

    Raises:
        CheckpointError: a file of another rank is not to be seen here.
        OSError: the disk refuses.
    """
    check_sizes(partial, manifest.files)
    write_new(partial / MANIFEST, [manifest.to_bytes()])
    fsync_folder(partial)
    folder = partial.with_name(name_of(manifest.position.step))
    if folder.exists() or folder.is_symlink():
        _put_aside(folder, run_id)
    partial.rename(folder)
    fsync_folder(folder.parent)
    return folder


def put_aside_later(run: Path, step: int, run_id: str) -> list[str]:
    """Rename the checkpoints after a step, which were damaged, as the run goes on from before them; return their names.

    Otherwise `prune`, which does not read whole files, would take them for the newest.
    """
    later = [folder for folder in checkpoint_folders(run) if (step_of(folder) or 0) > step]
    return [_put_aside(folder, run_id).name for folder in later]


def _put_aside(folder: Path, run_id: str) -> Path:
    return folder.rename(folder.with_name(f"{folder.name}.damaged-{run_id}"))


def prune(run: Path, keep: int, run_id: str) -> list[str]:
    """Delete all but the newest `keep` complete checkpoints (damaged ones are left alone); return their names.

    Each loses its name first, so that none that is half deleted is ever taken for a checkpoint.
    """
    complete = []
    for folder in checkpoint_folders(run):
        try:
            read_manifest(folder)
        except CheckpointError:
            continue
        complete.append(folder)
    for folder in complete[keep:]:
        doomed = folder.rename(folder.with_name(f"{folder.name}.removed-{run_id}"))
        shutil.rmtree(doomed)
    return [folder.name for folder in complete[keep:]]

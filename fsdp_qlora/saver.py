"""Checkpoints written while training goes on: copied to host memory between two steps, stored by a thread, published later.

All ranks call the same methods at the same steps; the thread takes no part in any exchange between ranks.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fsdp_qlora.adapters import adapter_matrices, write_adapter
from fsdp_qlora.checkpoint import FOLDER, Manifest, Position, name_of, prune, publish
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks, agree_on_errors, from_main
from fsdp_qlora.errors import CheckpointError, FsdpQloraError
from fsdp_qlora.files import FileRecord, fsync_folder, record_of, write_tensors
from fsdp_qlora.models.vocabulary import trained_vocabularies
from fsdp_qlora.optim import ShardedAdamW, local
from fsdp_qlora.parallel import LossModel
from fsdp_qlora.resume import MOMENTS, random_state, rank_file, trainable
from fsdp_qlora.run_folder import Progress

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: the value and AdamW's two moments, all float32."""

RESULT_BYTES = 32 * 2**20
"""Of an adapter or model beside its weights: the tokenizer."""


@dataclass
class Writing:
    """A checkpoint on its way to the disk, as this rank sees it."""

    position: Position
    folder: Path
    thread: threading.Thread
    files: dict[str, FileRecord] = field(default_factory=dict)
    error: OSError | None = field(default_factory=lambda: OSError(0, "the thread that writes ended early"))


@dataclass
class SaveReport:
    """What saving cost: checkpoints written, bytes of the latest, seconds that training stood still for all of them."""

    count: int = 0
    size_bytes: int = 0
    stall_seconds: float = 0.0


class Saver:
    """Saves a run's state into its output folder.

    Args:
        root, optimizer, adapter_config: what is saved, and what PEFT has to know of it (None: it is no adapter).
        contents: the part of the manifest that stays the same: identity, config, versions.
        progress: where the step of the newest checkpoint is noted.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        root: LossModel,
        optimizer: ShardedAdamW,
        adapter_config: dict[str, Any] | None,
        contents: dict[str, Any],
        progress: Progress,
    ) -> None:
        self.run, self.keep, self.keeps_best = Path(config.output_dir), config.save_total_limit, config.keep_best
        self.run_id = from_main(uuid.uuid4().hex[:12])
        self.ranks, self.root, self.optimizer = ranks, root, optimizer
        self.adapter_config, self.contents, self.progress = adapter_config, contents, progress
        self.report = SaveReport()
        self._writing: Writing | None = None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread still works on a checkpoint."""
        return self._writing is not None and self._writing.thread.is_alive()

    def require_space(self) -> None:
        """Raise CheckpointError, on every rank, if the disk has no room for a checkpoint and what the run leaves.

        Before training, not after it.
        """
        with agree_on_errors(self.ranks, "looking for room for a checkpoint"):
            if self.ranks.is_main:
                size = self._size()
                results = (2 if self.keeps_best else 1) * (size // 3 + RESULT_BYTES)
                what, remedy = "a checkpoint and the results take", "free space, or choose another --output_dir"
                self._require_space(self.run, what, size + results, remedy)

    def start(self, position: Position) -> None:
        """Copy the state and begin to write it.

        Raises:
            CheckpointError, on every rank: no space, a folder that cannot be written, or a matrix that is not whole.
        """
        self.finish()
        started = time.monotonic()
        self.optimizer.finish()
        self.progress.beat("saving")
        partial = self.run / FOLDER / f"{name_of(position.step)}.partial-{self.run_id}"
        with agree_on_errors(self.ranks, f"saving step {position.step}"):
            if self.ranks.is_main:
                self._prepare(partial)
        matrices = adapter_matrices(self.root, self.ranks) if self.adapter_config is not None else ()
        adapter = {name: value for name, value in matrices if self.ranks.is_main}
        own, python_random = self._copy_own()
        thread = threading.Thread(target=self._write, args=(adapter, own, python_random), daemon=True, name="saver")
        self._writing = Writing(position, partial, thread)
        thread.start()
        self.progress.beat("training")
        self.report.stall_seconds += time.monotonic() - started

    def poll(self, num_writing: float) -> None:
        """Publish the checkpoint once no rank writes any more."""
        if not num_writing:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and make it one that a run can resume from.

        Raises:
            CheckpointError, on every rank: any rank could not write its part; the older checkpoints are as they were.
        """
        if self._writing is None:
            return
        started, writing = time.monotonic(), self._writing
        self.progress.beat("saving")
        writing.thread.join()
        self._writing = None
        try:
            files = self._publish(writing)
        except FsdpQloraError:
            if self.ranks.is_main:
                shutil.rmtree(writing.folder, ignore_errors=True)
            raise
        self.progress.saved_step = writing.position.step
        self.progress.beat("training")
        self.report.count += 1
        self.report.size_bytes = sum(record.size for record in files.values())
        self.report.stall_seconds += time.monotonic() - started

    def _prepare(self, partial: Path) -> None:
        """Check the space and make the folder."""
        try:
            partial.parent.mkdir(exist_ok=True)
            remedy = "free space and start again: the run goes on from its last checkpoint"
            self._require_space(partial.parent, "a checkpoint takes", self._size(), remedy)
            (partial if self.adapter_config is None else partial / "adapter").mkdir(parents=True)
        except OSError as error:
            raise self._failure(partial, error) from error

    def _size(self) -> int:
        """Return the bytes of a checkpoint."""
        size = sum(parameter.numel() for _, parameter in trainable(self.root)) * BYTES_PER_PARAMETER + (1 << 20)
        if self.root.tied and self.adapter_config is not None:
            # adapters.adapter_matrices stores the one matrix for embedding and head
            size += sum(4 * module.weight.numel() for _, module in trained_vocabularies(self.root.model))
        return size

    def _require_space(self, folder: Path, what: str, needed: int, remedy: str) -> None:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CheckpointError(f"{folder}: {what} {needed / 1e9:.3f} GB and {free / 1e9:.3f} GB are free; {remedy}")

    def _copy_own(self) -> tuple[dict[str, Tensor], str]:
        """Return host copies of what only this rank has."""
        states, python_random = random_state(self.ranks.device)
        if self.ranks.rank < self.ranks.num_shards:  # the others hold replicas
            for name, parameter in trainable(self.root):
                state = self.optimizer.state[self.optimizer.shards[parameter]]
                parts = {f"{name}.{moment}": state[moment] for moment in MOMENTS}
                if self.adapter_config is None:
                    parts[name] = local(parameter)
                for part, value in parts.items():
                    states[part] = value.detach().to("cpu", copy=True).contiguous()
        return states, python_random

    def _write(self, adapter: dict[str, Tensor], own: dict[str, Tensor], python_random: str) -> None:
        """Store this rank's files and read them back; runs in the thread."""
        writing = self._writing
        assert writing is not None
        try:
            name = rank_file(self.ranks.rank)
            files = {name: write_tensors(writing.folder / name, own, {"python_random": python_random})}
            if self.ranks.is_main and self.adapter_config is not None:
                records = write_adapter(writing.folder / "adapter", adapter, self.adapter_config)
                fsync_folder(writing.folder / "adapter")
                files |= {f"adapter/{name}": record for name, record in records.items()}
            for name, record in files.items():
                if record_of(writing.folder / name) != record:
                    raise OSError(0, f"{name} does not hold what was written to it")
            writing.files, writing.error = files, None
        except OSError as error:
            writing.error = error

    def _publish(self, writing: Writing) -> dict[str, FileRecord]:
        """Turn the written folder into a checkpoint and delete the oldest; return its files."""
        doing = f"saving step {writing.position.step}"
        with agree_on_errors(self.ranks, doing):
            if writing.error is not None:
                raise self._failure(writing.folder, writing.error)
        parts: list[dict[str, FileRecord]] = [{} for _ in range(self.ranks.world_size)]
        dist.all_gather_object(parts, writing.files)
        files = {name: record for part in parts for name, record in part.items()}
        with agree_on_errors(self.ranks, doing):
            if self.ranks.is_main:
                manifest = Manifest(
                    writing.position, self.ranks.world_size, self.ranks.num_shards, files=files, **self.contents
                )
                try:
                    publish(writing.folder, manifest, self.run_id)
                except OSError as error:
                    raise self._failure(writing.folder, error) from error
                self._prune()
        return files

    def _prune(self) -> None:
        try:
            prune(self.run, self.keep, self.run_id)
        except OSError as error:  # costs space, loses nothing
            print(f"warning: an old checkpoint cannot be deleted: {error}", flush=True)

    def _failure(self, folder: Path, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{folder}: cannot be written by rank {self.ranks.rank} ({error.strerror}); the last complete checkpoint is"
            f" that of step {self.progress.saved_step}. Free space or mend the folder, and start again"
        )

"""The model of full fine-tuning as a checkpoint that stands on its own: gathered and written one parameter at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.adapters import STEP, gather
from fsdp_qlora.build import save_tokenizer
from fsdp_qlora.distributed import Ranks, agree_on_errors
from fsdp_qlora.errors import CheckpointError
from fsdp_qlora.export.standalone import Source, Target, copy, in_file_order, open_source, side_files, write_checkpoint
from fsdp_qlora.parallel import LossModel
from fsdp_qlora.quant.lora import VOCABULARY
from fsdp_qlora.resume import trainable
from fsdp_qlora.weights.writer import Part, Sink, Slot

SHARD_SIZE = "5GB"
"""Size at which a new weight file is begun, as transformers does."""

Gathered = Iterator[tuple[str, Tensor]]
"""Names in transformers' model and whole values, of which each is a collective of all ranks."""


def save_model(
    root: LossModel,
    base: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    ranks: Ranks,
    beat: Callable[[], None],
    step: int | None = None,
) -> None:
    """Write the trained model with the names, dtypes and other files of the checkpoint that it was loaded from.

    Every rank must call this; rank 0 writes, and no rank ever holds more than one whole parameter.

    Args:
        base: that checkpoint.
        folder: replaced once everything is on the disk.
        beat: called after every parameter.
        step: noted in the files, for `adapters.trained_step`.

    Raises:
        CheckpointError, on every rank: the folder cannot be written, or a parameter is not finite.
    """
    gathered = _gather_all(root, ranks, beat)
    with agree_on_errors(ranks, "saving the model"):
        try:
            if ranks.is_main:
                _write(gathered, [name for name, _ in trainable(root)], base, folder, tokenizer, step)
        finally:
            for _ in gathered:  # the other ranks' part in it; after an error also rank 0's, for which they wait
                pass


def _gather_all(root: LossModel, ranks: Ranks, beat: Callable[[], None]) -> Gathered:
    for name, parameter in trainable(root):
        value = gather(parameter, ranks.device)
        beat()
        yield name, value


def _write(
    gathered: Gathered,
    names: list[str],
    base: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    step: int | None,
) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    metadata = {} if step is None else {STEP: str(step)}
    config = json.loads((base / "config.json").read_text())
    with open_source(base) as source:
        target = Target(partial, {}, SHARD_SIZE, overwrite=True, metadata=metadata)
        write_checkpoint(target, _parts(source, names, gathered), config, side_files(base), lambda line: None)
    save_tokenizer(tokenizer, partial)
    try:
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)  # deleted in place it could be cut off and be taken for a model
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: the model cannot be written ({error.strerror}); free space or choose another --output_dir"
        ) from error


def _parts(source: Source, names: list[str], gathered: Gathered) -> list[Part]:
    """Return what is to be written: the parameters in the order of gathering, then what else the checkpoint holds."""
    embedding, head = (f"{name}.weight" for name in VOCABULARY.values())
    parts = []
    for name in names:
        has_copy = name == embedding and source.skeleton.tied and head in source.named.tensors
        parts.append(_trained(source, name, [name, head] if has_copy else [name], gathered))
    written = {slot.name for part in parts for slot in part.slots}
    rest = (entry for entry in in_file_order(source.raw.tensors) if entry.name not in written)
    return [*parts, *(copy(source, entry) for entry in rest)]


def _trained(source: Source, name: str, copies: list[str], gathered: Gathered) -> Part:
    """Return the part that writes the next gathered parameter, `name`, under the checkpoint's names for it."""
    entries = [source.named.entry(copied) for copied in copies]

    def make(sink: Sink) -> None:
        found, value = next(gathered)
        assert found == name, f"{found} for {name}"
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"'{name}' is not finite: the model is not saved; go on from an older checkpoint")
        for entry in entries:
            # a copy, as FSDP cannot free memory that numpy has seen
            sink(entry.name, value.to("cpu", entry.dtype, copy=True), 0)

    return Part(tuple(Slot(entry.name, entry.dtype, entry.shape) for entry in entries), make)

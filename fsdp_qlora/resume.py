"""Going on from a checkpoint: which one, whether it belongs to this run, and its state back into the optimizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fsdp_qlora import data
from fsdp_qlora.adapters import read_adapter
from fsdp_qlora.checkpoint import FOLDER, Manifest, checkpoint_folders, read_manifest, step_of, verify
from fsdp_qlora.config import TrainConfig, to_dict
from fsdp_qlora.config.lora import METHOD_SETTINGS
from fsdp_qlora.distributed import Ranks, agree_on_errors, from_main, shard_rows
from fsdp_qlora.errors import CheckpointError, ConfigError
from fsdp_qlora.models.vocabulary import trained_vocabularies
from fsdp_qlora.optim import ShardedAdamW, local
from fsdp_qlora.parallel import LossModel
from fsdp_qlora.quant.adapt import lora_layers
from fsdp_qlora.settings import show

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a matrix, besides the number of its steps."""

FIXED = (*METHOD_SETTINGS, "context_length", "packing", "train_on", "seed")
"""Settings that cannot change in the middle of a run: its matrices or its samples would be others."""

HASHED = {"tokenizer", "data", "base"}
"""What is compared by its contents."""

LOGGING = ("output_dir", "overwrite", "resume", "debug", "log_to", "run_name", "logging_steps")
FREE = ("model", "dataset", *LOGGING)
"""Settings whose change is not worth a word; that base and data are the same is checked by their contents."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint to go on from."""

    folder: Path
    manifest: Manifest

    def adapter(self) -> dict[str, Tensor] | None:
        """Return the trained matrices, as the loader of weights takes them; None in full fine-tuning."""
        return read_adapter(self.folder / "adapter")[1] if (self.folder / "adapter").is_dir() else None


def rank_file(rank: int) -> str:
    """Return the name of a rank's own file in a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


def trainable(root: LossModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of all that is trained, in the same order on every rank."""
    if root.masters:
        yield from ((name, getattr(module, own)) for name, module, own in root.masters)
        return
    for layer in lora_layers(root):
        for part, parameter in layer.adapter():
            yield f"{layer.name}.{part}", parameter
    for name, module in trained_vocabularies(root.model):
        yield name, module.weight


def identity_of(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, train: data.Loader) -> dict[str, Any]:
    """Return what must be the same before and after a resume, except for the base, which is added once it is loaded."""
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    tokenizer_hash = hashlib.sha256(json.dumps(words, default=str).encode()).hexdigest()[:16]
    settings = to_dict(config)
    return {**{name: settings[name] for name in FIXED}, "tokenizer": tokenizer_hash, "data": train.digest()}


def check_identity(checkpoint: Checkpoint, config: TrainConfig, now: dict[str, Any]) -> None:
    """Raise CheckpointError with both values of everything in `now` that was not so when the checkpoint was written."""
    then = checkpoint.manifest.identity
    changed = [name for name, value in now.items() if value != then.get(name)]
    if not changed:
        return
    values = "; ".join(f"{name} is {show(now[name])} and was {show(then.get(name))}" for name in changed)
    why = ""
    if HASHED.intersection(changed):  # which say that something is another, not what
        settings = changed_settings(config, checkpoint.manifest, but=LOGGING)
        why = f" (changed settings: {', '.join(settings)})" if settings else " (no setting has changed: the files have)"
    raise CheckpointError(
        f"{checkpoint.folder}: belongs to another run: {values}{why}; set it back, or start afresh in another --output_dir"
    )


def changed_settings(config: TrainConfig, manifest: Manifest, but: Collection[str]) -> list[str]:
    """Return lines on the settings that differ from the checkpoint's, but for some."""
    now = to_dict(config)
    return [
        f"{name} {show(manifest.config[name])} -> {show(value)}"
        for name, value in now.items()
        if name not in but and name in manifest.config and manifest.config[name] != value
    ]


def find_checkpoint(resume: str, output: Path, ranks: Ranks, say: Say) -> Checkpoint | None:
    """Return the checkpoint to go on from, all its files verified; None to start from the beginning.

    Args:
        resume: 'auto' (the newest intact one of the output folder), 'none', or the path of a checkpoint or a run folder.
        say: shows a warning.

    Raises:
        CheckpointError: there are checkpoints, and none is intact; or the one asked for is not.
        ConfigError: a path that leads to no checkpoint, or to one that is not the newest of the output folder.
    """
    if resume == "none":
        return None
    wanted = output if resume == "auto" else Path(resume)
    with agree_on_errors(ranks, "looking for checkpoints"):
        named = step_of(wanted) is not None and not (wanted / FOLDER).exists()
        folders = [wanted] if named else checkpoint_folders(wanted)
        if resume != "auto" and not (wanted.is_dir() and folders):
            raise ConfigError(f"--resume={resume}: holds no checkpoint; name a step-<number> folder or a run's folder")
        newer = [path for path in checkpoint_folders(output) if named and (step_of(path) or 0) > (step_of(wanted) or 0)]
        if newer and wanted.resolve().parent.parent == output.resolve():
            raise ConfigError(
                f"--resume={resume}: {output} holds later checkpoints ({newer[0].name}); delete them, or choose another"
                " --output_dir"
            )
    problem: str | None = None
    for folder in from_main(folders):
        manifest, problem = _checked(folder, ranks)
        if manifest is not None:
            say(f"going on from {folder}")
            return Checkpoint(folder, manifest)
        say(f"warning: a checkpoint is passed over: {problem}")
    if problem is not None:
        raise CheckpointError(
            f"{problem}; {'it is the one asked for' if named else 'no older checkpoint is intact either'}."
            " Restore a copy of it, or start afresh with --overwrite or in another --output_dir"
        )
    return None


def _checked(folder: Path, ranks: Ranks) -> tuple[Manifest | None, str | None]:
    """Read a manifest and verify the files, shared out among the ranks; the problem is the same on all of them."""
    manifest, problem = None, None
    try:
        manifest = read_manifest(folder)
        verify(folder, manifest, ranks.rank, ranks.world_size)
    except CheckpointError as error:
        problem = str(error)
    problems: list[str | None] = [None] * ranks.world_size
    dist.all_gather_object(problems, problem)
    first = next((text for text in problems if text is not None), None)
    return (manifest if first is None else None), first


def check_fit(
    checkpoint: Checkpoint, config: TrainConfig, identity: dict[str, Any], train: data.Loader, say: Say
) -> None:
    """Check that the run can go on from the checkpoint, as far as can be told before the base is loaded.

    Raises:
        CheckpointError: it belongs to another run.
        ConfigError: a step would begin in the middle of one that was already done.
    """
    check_identity(checkpoint, config, identity)
    done, size = checkpoint.manifest.position.sequences, train.sequences_per_step
    if done % size:
        world = train.world_size
        fitting = ", ".join(str(number) for number in range(world, done + 1, world) if done % number == 0)
        remedy = (
            f"choose them so that their product is one of {fitting}"
            if fitting
            else (f"with {world} ranks it cannot be one: go on with a number of ranks that divides {done}")
        )
        raise ConfigError(
            f"{checkpoint.folder}: {done} sequences of the epoch are done, which is no multiple of batch_size"
            f" {config.batch_size} x gradient_accumulation_steps {config.gradient_accumulation_steps} x {world}"
            f" ranks = {size}; {remedy}"
        )
    changed = changed_settings(config, checkpoint.manifest, but=FREE)
    if changed:
        say(f"settings changed since the checkpoint: {', '.join(changed)}")


def restore(
    checkpoint: Checkpoint,
    identity: dict[str, Any],
    optimizer: ShardedAdamW,
    root: LossModel,
    config: TrainConfig,
    ranks: Ranks,
    say: Say,
) -> None:
    """Put the checkpoint's optimizer state and random numbers in place; an adapter was loaded with the model.

    Raises:
        CheckpointError, on every rank: it is of another base, or holds other matrices.
    """
    with agree_on_errors(ranks, "restoring the checkpoint"):
        check_identity(checkpoint, config, identity)
        restore_optimizer(optimizer, root, checkpoint, ranks)
        restore_random_state(checkpoint, config, ranks, say)


def restore_optimizer(optimizer: ShardedAdamW, root: LossModel, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Fill AdamW's state with the rows of this rank, from the files of however many ranks there were.

    In full fine-tuning the parameters themselves, too.

    Raises:
        CheckpointError: the files hold other matrices.
    """
    folder, manifest = checkpoint.folder, checkpoint.manifest
    with contextlib.ExitStack() as stack:
        files: dict[int, Any] = {}

        def rows(shard: int, name: str, start: int, stop: int) -> Tensor:
            if shard not in files:
                files[shard] = stack.enter_context(safe_open(folder / rank_file(shard), framework="pt"))
            rows: Tensor = files[shard].get_slice(name)[start:stop]
            return rows

        for name, parameter in trainable(root):
            shard = optimizer.shards[parameter]
            # fused AdamW counts its steps beside the parameter
            state = {"step": torch.tensor(float(manifest.position.step), device=shard.device)}
            state |= {moment: torch.zeros_like(shard) for moment in MOMENTS}
            wanted = {f"{name}.{moment}": state[moment] for moment in MOMENTS}
            for part, target in (wanted | ({name: local(parameter.detach())} if root.masters else {})).items():
                try:
                    _fill(target, part, parameter.shape, manifest.num_shards, ranks, rows)
                except (SafetensorError, OSError, RuntimeError) as error:
                    raise CheckpointError(f"{folder}: does not hold '{part}' as this run needs it") from error
            optimizer.state[shard] = state


def _fill(
    target: Tensor,
    name: str,
    shape: torch.Size,
    num_shards: int,
    ranks: Ranks,
    rows: Callable[[int, str, int, int], Tensor],
) -> None:
    """Copy this rank's rows of a matrix together from the shards that hold them."""
    first, last = shard_rows(shape[0], ranks.shard, ranks.num_shards)
    for shard in range(num_shards):
        begin, end = shard_rows(shape[0], shard, num_shards)
        start, stop = max(first, begin), min(last, end)
        if start < stop:
            target[start - first : stop - first].copy_(rows(shard, name, start - begin, stop - begin))


def random_state(device: torch.device) -> tuple[dict[str, Tensor], str]:
    """Return the states of torch's random generators, and Python's as text."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    return states, json.dumps(random.getstate())


def restore_random_state(checkpoint: Checkpoint, config: TrainConfig, ranks: Ranks, say: Say) -> None:
    """Continue this rank's random numbers; with another number of ranks, or on another device, start new ones."""
    folder, manifest = checkpoint.folder, checkpoint.manifest
    with safe_open(folder / rank_file(min(ranks.rank, manifest.world_size - 1)), framework="pt") as file:
        names, text = set(file.keys()), file.metadata()["python_random"]
        if manifest.world_size != ranks.world_size or ("random.cuda" in names) != (ranks.device.type == "cuda"):
            seed = zlib.crc32(f"{config.seed} {manifest.position.step} {ranks.rank}".encode())
            torch.manual_seed(seed)
            random.seed(seed)
            say(
                f"warning: the checkpoint is of {manifest.world_size} ranks and the run has {ranks.world_size} on"
                f" {ranks.device.type}: random numbers (dropout) start anew from the seed"
            )
            return
        torch.set_rng_state(file.get_tensor("random.cpu"))
        if ranks.device.type == "cuda":
            torch.cuda.set_rng_state(file.get_tensor("random.cuda"), ranks.device)
    version, internal, gauss = json.loads(text)
    random.setstate((version, tuple(internal), gauss))

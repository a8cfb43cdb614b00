"""The command `train`, from settings to summary; the algorithm itself is in trainer.py."""

from __future__ import annotations

import dataclasses
import functools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fsdp_qlora import data
from fsdp_qlora.adapters import adapter_config, open_adapter, save_adapter
from fsdp_qlora.balance import balance_routers
from fsdp_qlora.best import BestFolder
from fsdp_qlora.build import BuiltModel, build_model, load_tokenizer, save_tokenizer, verify_weights
from fsdp_qlora.checkpoint import Position
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.config.lora import lora_settings
from fsdp_qlora.data.templates import use_template
from fsdp_qlora.decode import read_stop_ids
from fsdp_qlora.distributed import Ranks, agree_on_errors, compute_dtype, from_main
from fsdp_qlora.errors import CheckpointError
from fsdp_qlora.export.full_model import save_model
from fsdp_qlora.fetch import fetch_once
from fsdp_qlora.metrics import Metrics, memory_gib
from fsdp_qlora.models.aliases import ALIASES
from fsdp_qlora.models.hub import commit_of, download_cache, resolve, resolve_config
from fsdp_qlora.models.skeleton import check_context, read_config
from fsdp_qlora.models.vocabulary import trained_vocabularies
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.plan.model_shape import ModelShape, model_shape
from fsdp_qlora.plan.training import memory_settings
from fsdp_qlora.profiling import profiling
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from fsdp_qlora.record import describe, write_record
from fsdp_qlora.resume import check_fit, find_checkpoint, identity_of, restore
from fsdp_qlora.run_folder import (
    ADAPTER,
    BEST,
    MODEL,
    go_on_in,
    start_over,
    starts_over,
    where_to_start,
)
from fsdp_qlora.samples import Sampler, read_prompts
from fsdp_qlora.saver import Saver
from fsdp_qlora.session import Session, run_session
from fsdp_qlora.trainer import Trainer
from fsdp_qlora.watchdog import GRACE_S

LARGE_LR = 5e-5
"""Learning rate of full fine-tuning that is seldom exceeded."""


def run(config: TrainConfig) -> None:
    """Fine-tune as `config` says; the command line's `train`."""
    run_session(config, _train)


def _say(ranks: Ranks, text: str) -> None:
    if ranks.is_main:
        print(text, flush=True)


def _train(session: Session) -> bool:
    """Do the whole run; return False if a signal ended it early."""
    config, ranks, progress, output = session.config, session.ranks, session.progress, session.output
    torch.manual_seed(config.seed + ranks.rank)
    random.seed(config.seed + ranks.rank)
    if config.overwrite and not from_main(starts_over(config)):
        session.say("--overwrite: done at the first start of this job; this restart goes on")
    found = find_checkpoint(from_main(where_to_start(config)), output, ranks, session.say)
    folder = _resolve_config(session)
    lora, initial = _lora(config, ranks, folder)
    memory = _memory_settings(config, ranks, folder, lora)
    _cap_gpu_memory(config, ranks)
    tokenizer, train, evaluation = _load_data(session, folder)
    with agree_on_errors(ranks, "reading the sample prompts"):
        prompts = read_prompts(config, tokenizer)
    identity = identity_of(config, tokenizer, train)
    if found is not None:
        with agree_on_errors(ranks, "comparing the run with its checkpoint"):
            check_fit(found, config, identity, train, session.say)
            progress.step = progress.saved_step = found.manifest.position.step
    folder = _fetch(session, functools.partial(resolve, config.model, commit_of(config.model, config.revision, folder)))
    built = _load_model(session, folder, lora, memory, found.adapter() if found else initial)
    identity["base"] = built.fingerprint
    sampler = Sampler(built.root, ranks, tokenizer, prompts, read_stop_ids(folder, tokenizer), config.max_new_tokens)
    start = found.manifest.position if found else Position()
    if lora is None:
        keep = functools.partial(_save_model, session, built, folder, tokenizer)
    else:
        keep = functools.partial(_save_adapter, built, lora, _base_name(config, folder), tokenizer, ranks)
    best = BestFolder(output / BEST, keep) if config.keep_best else None
    trainer = Trainer(config, ranks, built, train, evaluation, start, sampler if prompts else None, best, progress)
    progress.num_steps = trainer.num_steps
    if found is not None:
        restore(found, identity, trainer.optimizer, built.root, config, ranks, session.say)
    _say_arithmetic(config, ranks, trainer)
    record = describe(config, ranks)
    record["base"] = {"folder": folder.name, "fingerprint": built.fingerprint, **dataclasses.asdict(built.quant)}
    peft_config = None if lora is None else adapter_config(built.root, lora, _base_name(config, folder))
    contents = {"identity": identity, "config": record["config"], "versions": record["versions"]}
    saver = Saver(config, ranks, built.root, trainer.optimizer, peft_config, contents, progress)
    recorded = _prepare_folder(session, record, saver.run_id, resumed=found is not None)
    saver.require_space()
    session.begin_training()
    with (
        Metrics(config, record, trainer.num_steps, ranks.is_main, resumed=found is not None) as metrics,
        profiling(config, ranks, trainer.optimizer),
    ):
        summary = trainer.fit(metrics, saver, session.stop, recorded)
    if summary is None:
        return False
    summary["ranks"] = _rank_reports(ranks, built)
    summary["checkpoints"] = dataclasses.asdict(saver.report)
    result = output / (MODEL if lora is None else ADAPTER)
    keep(result)
    if ranks.is_main:
        record["result"] = summary
        write_record(output, record)
        if lora is None:  # a model that stands on its own takes its record along
            write_record(result, record)
        _say_summary(config, summary, result)
    return True


def _prepare_folder(session: Session, record: dict[str, Any], run_id: str, resumed: bool) -> list[dict[str, Any]]:
    """Leave in the output folder what belongs to this run so far, and its record; return the metrics so far.

    Raises:
        CheckpointError, on every rank: the folder cannot be changed.
    """
    output, recorded = session.output, list[dict[str, Any]]()
    with agree_on_errors(session.ranks, "preparing the output folder"):
        try:
            if session.ranks.is_main:
                if resumed:
                    recorded = go_on_in(output, session.progress.step, run_id, session.say)
                else:
                    start_over(output)
                write_record(output, record)
        except OSError as error:
            raise CheckpointError(
                f"{output}: cannot be written ({error.strerror}); free space, mend the folder or choose another --output_dir"
            ) from error
    return from_main(recorded)


def _save_adapter(
    built: BuiltModel,
    lora: LoraSettings,
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    ranks: Ranks,
    folder: Path,
    step: int | None = None,
) -> None:
    """Write adapter and tokenizer; every rank must call this."""
    save_adapter(built.root, lora, base, folder, ranks, step)
    with agree_on_errors(ranks, "saving the tokenizer"):
        if ranks.is_main:
            save_tokenizer(tokenizer, folder)


def _save_model(
    session: Session,
    built: BuiltModel,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    step: int | None = None,
) -> None:
    """Write the whole model and the tokenizer; every rank must call this."""
    save_model(built.root, base, folder, tokenizer, session.ranks, session.progress.beat, step)


def _cap_gpu_memory(config: TrainConfig, ranks: Ranks) -> None:
    """Hold this rank to --gpu_memory, so that a large card behaves like the small one that was planned for."""
    if config.gpu_memory is None or ranks.device.type != "cuda":
        return
    sizes = [float(size) for size in config.gpu_memory.split(",")]
    wanted = sizes[ranks.rank] if len(sizes) > 1 else sizes[0]
    total = torch.cuda.get_device_properties(ranks.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, wanted * 2**30 / total), ranks.device)


def _fetch(session: Session, find: Callable[[], Path]) -> Path:
    """Return the model's folder that `find` returns, which few of the ranks fill by a download."""
    config, ranks, progress = session.config, session.ranks, session.progress
    cache, limit_s = download_cache(config.model), config.download_timeout_s
    progress.limit_s = limit_s
    progress.beat("fetching the model")
    fetch_once(find, cache, ranks, limit_s + GRACE_S)
    progress.limit_s = config.timeout_s
    progress.beat("start-up")
    with agree_on_errors(ranks, "looking for the model"):
        return find()


def _resolve_config(session: Session) -> Path:
    """Return the model's folder, of a hub model without weights: settings and data are checked before these are fetched."""
    config, ranks = session.config, session.ranks
    folder = _fetch(session, functools.partial(resolve_config, config.model, config.revision, tokenizer=True))
    with agree_on_errors(ranks, "checking the settings"):
        model_config, _ = read_config(folder)
        check_context(config.context_length, getattr(model_config, "max_position_embeddings", None))
    return folder


def _load_data(session: Session, folder: Path) -> tuple[PreTrainedTokenizerBase, data.Loader, dict[str, data.Loader]]:
    config, ranks = session.config, session.ranks
    with agree_on_errors(ranks, "loading the data"), session.progress.alone("loading the data"):
        tokenizer = load_tokenizer(folder)
        use_template(tokenizer, config.chat_template)
        splits = data.load_splits(config, tokenizer)
        vocab_size = read_config(folder)[0].vocab_size
        for store in (*splits.train.stores, *splits.evaluation.values()):
            data.check_vocabulary(store, vocab_size)
        own: dict[str, Any] = {"rank": ranks.rank, "world_size": ranks.world_size, "vocab_size": vocab_size}
        accumulation = config.gradient_accumulation_steps
        train_loader = data.make_loader(splits.train, config, tokenizer, accumulation=accumulation, **own)
        loaders = {
            name: data.make_loader(data.Mixture([store]), config, tokenizer, accumulation=None, **own)
            for name, store in splits.evaluation.items()
        }
    _say(ranks, "\n".join(splits.report.lines()))
    return tokenizer, train_loader, loaders


def _lora(config: TrainConfig, ranks: Ranks, folder: Path) -> tuple[LoraSettings | None, dict[str, Tensor] | None]:
    """Return what is trained (None: the model itself), and the matrices to start from if they are not new ones."""
    if config.train_type == "full":
        if config.lr > LARGE_LR:
            _say(ranks, f"warning: --lr={config.lr} suits LoRA; full fine-tuning mostly takes 1e-6 to {LARGE_LR}")
        return None, None
    if config.adapter is None:
        return lora_settings(config), None
    with agree_on_errors(ranks, "reading the adapter"):
        adapter = open_adapter(Path(config.adapter), config.model)
    lora = dataclasses.replace(adapter.lora, dropout=config.lora_dropout)
    _say(
        ranks,
        f"starting from {adapter.folder}: rank {lora.rank}, alpha {lora.alpha:g}, {len(adapter.matrices)} matrices",
    )
    if adapter.named_base not in (None, _base_name(config, folder)):
        _say(ranks, f"warning: it names another base, {adapter.named_base}; its matrices are meant for that one")
    return lora, adapter.matrices


def _load_model(
    session: Session, folder: Path, lora: LoraSettings | None, memory: MemorySettings, adapter: dict[str, Tensor] | None
) -> BuiltModel:
    config, ranks = session.config, session.ranks
    quant = _quant_settings(config, ranks)
    started = time.monotonic()
    shown = [0.0]

    def progress(done: int, total: int) -> None:
        session.progress.beat("loading weights")
        if ranks.is_main and (done == total or time.monotonic() - shown[0] > 5):
            shown[0] = time.monotonic()
            print(f"loading weights: {done}/{total} layers, {time.monotonic() - started:.0f} s", flush=True)

    built = build_model(
        folder,
        ranks,
        quant,
        lora,
        compute_dtype(config.precision, ranks.device),
        memory=memory,
        seed=config.seed,
        adapter=adapter,
        progress=progress,
        compiled=_compiles(config, ranks),
        broadcast=config.loading == "broadcast",
        full=lora is None,
    )
    built.root.balance = balance_routers(built.skeleton.model, built.skeleton.config, config.router_aux_loss_coef)
    verified = config.verify_weights and lora is not None
    if verified:
        verify_weights(built, ranks)
    checked = f", gathered bytes verified (base {built.fingerprint})" if verified else ""
    copies = f" for {ranks.num_replicas} copies" if config.loading == "broadcast" else ""
    _say(
        ranks,
        f"{'model' if lora is None else 'base'}: {built.quant.quant_type}, {built.report.bytes_read / 2**20:.0f} MiB read"
        f" by this rank{copies} in {built.report.seconds:.1f} s{checked}",
    )
    return built


def _compiles(config: TrainConfig, ranks: Ranks) -> bool:
    return config.compile == "auto" and ranks.device.type == "cuda"


def _quant_settings(config: TrainConfig, ranks: Ranks) -> QuantSettings:
    fp8 = config.compute_dtype == "fp8"
    return QuantSettings(config.base_form, config.double_quant, config.quant_storage, ranks.num_shards, fp8)


def _memory_settings(config: TrainConfig, ranks: Ranks, folder: Path, lora: LoraSettings | None) -> MemorySettings:
    """Resolve the autos, equally on all ranks; ConfigError for a run that cannot fit."""

    def shape_of(num_shards: int) -> ModelShape:
        quant = dataclasses.replace(_quant_settings(config, ranks), num_shards=num_shards)
        return model_shape(folder, quant, lora, compute_dtype(config.precision, ranks.device))

    return memory_settings(config, ranks, shape_of, _compiles(config, ranks), functools.partial(_say, ranks))


def _say_arithmetic(config: TrainConfig, ranks: Ranks, trainer: Trainer) -> None:
    stats = trainer.train_loader.stats()
    sequences = config.batch_size * config.gradient_accumulation_steps * ranks.world_size
    trainable = sum(parameter.numel() for parameter in trainer.root.parameters() if parameter.requires_grad)
    whole = [name.rpartition(".")[2] for name, _ in trained_vocabularies(trainer.root.model)]
    trained = "full fine-tuning" if trainer.root.masters else " + ".join(["LoRA", *whole])
    dtype = str(compute_dtype(config.precision, ranks.device)).removeprefix("torch.")
    over = (
        f"; --max_steps {config.max_steps} is less than what is done"
        if 0 <= config.max_steps < trainer.num_steps
        else ""
    )
    _say(
        ranks,
        f"{trained}: {trainable:,} trainable parameters, {ranks.world_size} x {ranks.device.type},"
        f" {dtype}{', base in fp8' * (config.compute_dtype == 'fp8')}, sharding {config.sharding}\n"
        f"step: {config.batch_size} sequences x {config.gradient_accumulation_steps} micro-batches x {ranks.world_size}"
        f" ranks = {sequences} sequences of up to {config.context_length} tokens ="
        f" {sequences * config.context_length:,} tokens\n"
        f"run: {trainer.num_steps} steps over {stats.num_sequences} sequences an epoch"
        f" ({100 * stats.efficiency:.0f} % filled){over}",
    )


def _rank_reports(ranks: Ranks, built: BuiltModel) -> list[dict[str, float]]:
    """Return what each rank read and used."""
    own = {
        "bytes_read": built.report.bytes_read,
        "bytes_received": built.report.bytes_received,
        "load_seconds": round(built.report.seconds, 2),
        "peak_gpu_gib": round(memory_gib(ranks.device), 2),
    }
    reports: list[dict[str, float]] = [{} for _ in range(ranks.world_size)]
    dist.all_gather_object(reports, own)
    return reports


def _base_name(config: TrainConfig, folder: Path) -> str:
    """Return what PEFT can load the base by: a hub id, or the absolute path of a folder."""
    if Path(config.model).is_dir():
        return str(folder.resolve())
    alias = ALIASES.get(config.model)
    return config.model if alias is None else (alias.repo or config.model)


def _say_summary(config: TrainConfig, summary: dict[str, Any], result: Path) -> None:
    # of a run that went on from another folder, or had no step left to do, not all of these are known
    train_loss, *evaluations = (summary[name] for name in ("train_loss", "eval_loss_before", "eval_loss_after"))
    known = [f"{loss:.4f}" for loss in evaluations if loss is not None]
    best = summary["best_step"] if config.keep_best else None
    print(
        f"done: {summary['steps']} steps, {summary['tokens']:,} tokens in {summary['seconds']:.0f} s"
        f" ({summary['tokens_per_second']:.0f} tok/s)"
        + ("" if train_loss is None else f", train loss {train_loss:.4f}")
        + (f", eval loss {' -> '.join(known)}" if known else "")
        + f"\n{result.name}: {result}\n"
        + ("" if best is None else f"best: {result.with_name(BEST)}, of step {best}\n")
        + f'try it: fsdp-qlora generate --{result.name} {result} --prompt "..."',
        flush=True,
    )

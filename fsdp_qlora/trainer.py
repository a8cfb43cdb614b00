"""Fine-tuning from start to end. The algorithm is `Trainer.train_step`; `run` is what the command line calls."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from fsdp_qlora import data
from fsdp_qlora.adapters import save_adapter
from fsdp_qlora.build import BuiltModel, build_model, load_tokenizer, verify_weights
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks, agree_on_errors, compute_dtype, process_group, sum_over_ranks
from fsdp_qlora.errors import ConfigError, DataError, TrainingError
from fsdp_qlora.loss import IGNORE
from fsdp_qlora.memory import GIB
from fsdp_qlora.metrics import Metrics, memory_gib
from fsdp_qlora.models.aliases import ALIASES
from fsdp_qlora.models.hub import resolve
from fsdp_qlora.models.skeleton import read_config
from fsdp_qlora.optim import build_optimizer, clip_gradients, learning_rate
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.plan_report import Request, budget_of, choose, choose_on_cpu, in_words
from fsdp_qlora.planner import Run, model_shape
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from fsdp_qlora.record import describe, prepare_output_dir, write_record


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks: mean loss per target token, gradient norm before clipping."""

    loss: float
    grad_norm: float
    num_targets: int
    num_tokens: int


class Trainer:
    """A model, its optimizer and its data.

    Args:
        built: the loaded model.
        train, evaluation: loaders of the two splits; evaluation may be None.
    """

    def __init__(
        self, config: TrainConfig, ranks: Ranks, built: BuiltModel, train: data.Loader, evaluation: data.Loader | None
    ) -> None:
        self.config, self.ranks, self.root = config, ranks, built.root
        self.train_loader, self.eval_loader = train, evaluation
        self.optimizer = build_optimizer(built.root, config)
        self.num_steps = config.max_steps
        if config.max_steps < 0:
            self.num_steps = sum(train.num_steps(epoch) for epoch in range(config.num_epochs))

    def loss(self, batch: data.Batch) -> torch.Tensor:
        """Return the sum of the token losses of a micro-batch, on this rank."""
        labels = batch.labels.flatten()
        positions = (labels != IGNORE).nonzero().flatten()
        tensors = (batch.input_ids, batch.position_ids, _padded(batch.cu_seqlens), positions, labels[positions])
        input_ids, position_ids, cu_seqlens, positions, ids = (tensor.to(self.ranks.device) for tensor in tensors)
        loss: torch.Tensor = self.root(input_ids, position_ids, cu_seqlens, input_ids.shape[1], positions, ids)["loss"]
        return loss

    def train_step(self, batches: list[data.Batch], step: int) -> StepResult:
        """Do one optimizer step on this rank's micro-batches.

        Raises:
            TrainingError: on every rank and before the update, if loss or gradient norm is not finite on any.
        """
        self.root.train()
        # Divide by the targets of the whole step, not of a micro-batch or rank, so that the result does not depend on how
        # the step is split.
        num_targets = sum_over_ranks(sum(batch.num_targets for batch in batches))
        total = torch.zeros((), device=self.ranks.device)
        for batch in batches:
            loss = self.loss(batch) / num_targets
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        grad_norm = clip_gradients(self.root, self.config.max_grad_norm)
        dist.all_reduce(total)
        mean_loss = float(total.item())
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            raise TrainingError(
                f"step {step + 1}: loss {mean_loss}, gradient norm {grad_norm}; stopped before the update."
                " Lower --lr, or look for broken rows in this step's data"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step, self.num_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        num_tokens = sum(batch.input_ids.numel() for batch in batches) * self.ranks.world_size
        return StepResult(mean_loss, grad_norm, int(num_targets), num_tokens)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return mean loss per target token and perplexity on the evaluation split ({} without one)."""
        if self.eval_loader is None:
            return {}
        self.root.eval()
        total, num_targets = torch.zeros((), dtype=torch.float64, device=self.ranks.device), 0
        for index in range(self.eval_loader.num_steps(0)):
            for batch in self.eval_loader.step(0, index):
                total += self.loss(batch)
                num_targets += batch.num_targets
        loss = sum_over_ranks(float(total.item())) / sum_over_ranks(num_targets)
        return {"eval_loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def fit(self, metrics: Metrics) -> dict[str, Any]:
        """Train to the end, evaluating before, after and every `eval_steps`; return the summary of the run."""
        first_eval = self._evaluate_and_log(metrics, 0)
        started, tokens, result, evaluation = time.monotonic(), 0, None, first_eval
        epoch, index = 0, 0
        for step in range(self.num_steps):
            if index == self.train_loader.num_steps(epoch):
                epoch, index = epoch + 1, 0
            step_started = time.monotonic()
            result = self.train_step(self.train_loader.step(epoch, index), step)
            index, tokens = index + 1, tokens + result.num_tokens
            self._log_step(metrics, result, step, epoch, time.monotonic() - step_started, started)
            is_last = step + 1 == self.num_steps
            if is_last or (self.config.eval_steps and (step + 1) % self.config.eval_steps == 0):
                evaluation = self._evaluate_and_log(metrics, step + 1)
        seconds = time.monotonic() - started
        return {
            "steps": self.num_steps,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1),
            "train_loss": result.loss if result else None,
            "eval_loss_before": first_eval.get("eval_loss"),
            "eval_loss_after": evaluation.get("eval_loss"),
            "peak_gpu_gib": round(memory_gib(self.ranks.device), 2),
        }

    def _evaluate_and_log(self, metrics: Metrics, step: int) -> dict[str, float]:
        values = self.evaluate()
        if values:
            metrics.log(values, step)
            metrics.show(
                f"step {step}: eval loss {values['eval_loss']:.4f}, perplexity {values['perplexity']:.2f}", step
            )
        return values

    def _log_step(
        self, metrics: Metrics, result: StepResult, step: int, epoch: int, seconds: float, started: float
    ) -> None:
        if (step + 1) % self.config.logging_steps and step + 1 != self.num_steps:
            return
        rate = result.num_tokens / seconds
        lr = learning_rate(self.config, step, self.num_steps)
        memory = memory_gib(self.ranks.device)
        record = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "epoch": epoch,
            "tokens_per_second": round(rate, 1),
            "target_tokens": result.num_targets,
            "step_seconds": round(seconds, 3),
            "peak_gpu_gib": round(memory, 2),
        }
        metrics.log(record, step + 1)
        remaining = (time.monotonic() - started) / (step + 1) * (self.num_steps - step - 1)
        gpu = f"  {memory:.1f} GiB" if memory else ""
        metrics.show(
            f"step {step + 1}/{self.num_steps}  loss {result.loss:.4f}  grad norm {result.grad_norm:.2f}"
            f"  lr {lr:.2e}  {rate:.0f} tok/s{gpu}  {remaining / 60:.1f} min left",
            step + 1,
        )


def _padded(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Return document boundaries with empty documents at the end, up to a power of two: few shapes, few compilations."""
    length = max(64, 1 << (len(cu_seqlens) - 1).bit_length())
    return torch.nn.functional.pad(cu_seqlens, (0, length - len(cu_seqlens)), value=int(cu_seqlens[-1]))


def run(config: TrainConfig) -> None:
    """Fine-tune as `config` says; the command line's `train`."""
    with process_group(config.sharding, config.timeout_s) as ranks:
        with agree_on_errors(ranks, "preparing the output folder"):
            if ranks.is_main:
                prepare_output_dir(config)
        _train(config, ranks)


def _say(ranks: Ranks, text: str) -> None:
    if ranks.is_main:
        print(text, flush=True)


def _train(config: TrainConfig, ranks: Ranks) -> None:
    torch.manual_seed(config.seed + ranks.rank)
    _cap_gpu_memory(config, ranks)
    folder = _resolve_model(config, ranks)
    lora = LoraSettings(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_target_modules)
    memory = _memory_settings(config, ranks, folder, lora)
    tokenizer, train, evaluation = _load_data(config, ranks, folder)
    built = _load_model(config, ranks, folder, lora, memory)
    trainer = Trainer(config, ranks, built, train, evaluation)
    _say_arithmetic(config, ranks, trainer)
    record = describe(config, ranks)
    record["base"] = {"folder": folder.name, "fingerprint": built.fingerprint, **dataclasses.asdict(built.quant)}
    output = Path(config.output_dir)
    if ranks.is_main:
        write_record(output, record)
    with Metrics(config, record, trainer.num_steps, ranks.is_main) as metrics:
        summary = trainer.fit(metrics)
    summary["ranks"] = _rank_reports(ranks, built)
    save_adapter(built.root, lora, _base_name(config, folder), output / "adapter", ranks)
    if ranks.is_main:
        tokenizer.save_pretrained(output / "adapter")
        write_record(output, {**record, "result": summary})
        _say_summary(config, summary, output)


def _cap_gpu_memory(config: TrainConfig, ranks: Ranks) -> None:
    """Hold this rank to --gpu_memory, so that a large card behaves like the small one that was planned for."""
    if config.gpu_memory is None or ranks.device.type != "cuda":
        return
    sizes = [float(size) for size in config.gpu_memory.split(",")]
    wanted = sizes[ranks.rank] if len(sizes) > 1 else sizes[0]
    total = torch.cuda.get_device_properties(ranks.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, wanted * 2**30 / total), ranks.device)


def _resolve_model(config: TrainConfig, ranks: Ranks) -> Path:
    """Return the model's folder; one process of each node downloads, the others wait for it."""
    with agree_on_errors(ranks, "fetching the model"):
        if ranks.local_rank == 0:
            resolve(config.model, config.revision)
    with agree_on_errors(ranks, "checking the settings"):
        folder = resolve(config.model, config.revision)
        model_config, _ = read_config(folder)
        longest = getattr(model_config, "max_position_embeddings", None)
        if longest is not None and config.context_length > longest:
            raise ConfigError(
                f"context_length {config.context_length} is longer than the model's {longest} positions;"
                f" use at most {longest}"
            )
    return folder


def _load_data(
    config: TrainConfig, ranks: Ranks, folder: Path
) -> tuple[PreTrainedTokenizerBase, data.Loader, data.Loader | None]:
    with agree_on_errors(ranks, "loading the data"):
        tokenizer = load_tokenizer(folder)
        train, evaluation, report = data.load_splits(config, tokenizer)
        _check_vocabulary([*train, *evaluation], read_config(folder)[0].vocab_size)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
        common: dict[str, Any] = {
            "batch_size": config.batch_size,
            "context_length": config.context_length,
            "packing": config.packing,
            "rank": ranks.rank,
            "world_size": ranks.world_size,
            "seed": config.seed,
            "pad_token_id": pad,
        }
        accumulation = config.gradient_accumulation_steps
        train_loader = data.Loader(train, gradient_accumulation_steps=accumulation, shuffle=True, **common)
        eval_loader = None
        if evaluation:
            eval_loader = data.Loader(evaluation, gradient_accumulation_steps=1, shuffle=False, **common)
    _say(ranks, "\n".join(report.lines()))
    return tokenizer, train_loader, eval_loader


def _check_vocabulary(examples: list[data.Example], vocab_size: int) -> None:
    """Raise DataError if a token has no row in the embedding; looking it up would fail late, or give zeros."""
    largest = max(max(example.input_ids) for example in examples)
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer makes token {largest} of this data, and the model has {vocab_size} tokens;"
            " tokenizer files and config.json do not belong together: download the model again"
        )


def _load_model(
    config: TrainConfig, ranks: Ranks, folder: Path, lora: LoraSettings, memory: MemorySettings
) -> BuiltModel:
    quant = _quant_settings(config, ranks)
    started = time.monotonic()
    shown = [0.0]

    def progress(done: int, total: int) -> None:
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
        progress=progress,
        compiled=config.compile == "auto" and ranks.device.type == "cuda",
    )
    if config.verify_weights:
        verify_weights(built, ranks)
    checked = f", gathered bytes verified (base {built.fingerprint})" if config.verify_weights else ""
    _say(
        ranks,
        f"base: {built.quant.quant_type}, {built.report.bytes_read / 2**20:.0f} MiB read by this rank in"
        f" {built.report.seconds:.1f} s{checked}",
    )
    return built


def _quant_settings(config: TrainConfig, ranks: Ranks) -> QuantSettings:
    return QuantSettings(config.quant_type, config.double_quant, config.quant_storage, ranks.num_shards)


def _memory_settings(config: TrainConfig, ranks: Ranks, folder: Path, lora: LoraSettings) -> MemorySettings:
    """Resolve the autos, equally on all ranks; ConfigError for a run that cannot fit."""
    with agree_on_errors(ranks, "planning the memory"):
        dtype = compute_dtype(config.precision, ranks.device)
        shape = model_shape(folder, _quant_settings(config, ranks), lora, dtype)
    budget, local_ranks = budget_of(ranks, config.gpu_memory, config.cpu_memory)
    request = Request(
        Run(
            config.batch_size,
            config.context_length,
            local_ranks=local_ranks,
            accumulates=config.gradient_accumulation_steps > 1,
            has_dropout=config.lora_dropout > 0,
        ),
        config.cpu_offload,
        config.activation_checkpointing,
        config.activation_offload,
        sharded=config.sharding == "full",
    )
    if ranks.device.type == "cpu":
        memory = choose_on_cpu(shape, budget, request)
        _say(ranks, f"memory: {in_words(shape, memory)}")
        return memory
    choice = choose(shape, budget, request)
    wanted = choice.estimate
    _say(
        ranks,
        f"memory: {in_words(shape, choice.memory)}; about {wanted.gpu_bytes / GIB:.1f} of {budget.gpu / GIB:.1f}"
        f" GiB a GPU and {wanted.host_bytes / GIB:.1f} of {budget.host / GIB:.1f} GiB of host memory"
        + ("" if choice.fits else ": expected to run out of memory"),
    )
    return choice.memory


def _say_arithmetic(config: TrainConfig, ranks: Ranks, trainer: Trainer) -> None:
    stats = trainer.train_loader.stats()
    sequences = config.batch_size * config.gradient_accumulation_steps * ranks.world_size
    trainable = sum(parameter.numel() for parameter in trainer.root.parameters() if parameter.requires_grad)
    _say(
        ranks,
        f"LoRA: {trainable:,} trainable parameters, {ranks.world_size} x {ranks.device.type},"
        f" {config.precision}, sharding {config.sharding}\n"
        f"step: {config.batch_size} sequences x {config.gradient_accumulation_steps} micro-batches x {ranks.world_size}"
        f" ranks = {sequences} sequences of up to {config.context_length} tokens ="
        f" {sequences * config.context_length:,} tokens\n"
        f"run: {trainer.num_steps} steps over {stats.num_sequences} sequences an epoch"
        f" ({100 * stats.efficiency:.0f} % filled)",
    )


def _rank_reports(ranks: Ranks, built: BuiltModel) -> list[dict[str, float]]:
    """Return what each rank read and used."""
    own = {
        "bytes_read": built.report.bytes_read,
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


def _say_summary(config: TrainConfig, summary: dict[str, Any], output: Path) -> None:
    evaluation = ""
    if summary["eval_loss_before"] is not None:
        evaluation = f", eval loss {summary['eval_loss_before']:.4f} -> {summary['eval_loss_after']:.4f}"
    print(
        f"done: {summary['steps']} steps, {summary['tokens']:,} tokens in {summary['seconds']:.0f} s"
        f" ({summary['tokens_per_second']:.0f} tok/s), train loss {summary['train_loss']:.4f}{evaluation}\n"
        f"adapter: {output / 'adapter'}\n"
        f'try it: fsdp-qlora generate --adapter {output / "adapter"} --prompt "..."',
        flush=True,
    )

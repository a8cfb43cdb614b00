"""Fine-tuning from start to end. The algorithm is `Trainer.train_step`; commands/train.py sets it up."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fsdp_qlora import data
from fsdp_qlora.best import BestFolder, best_step
from fsdp_qlora.build import BuiltModel
from fsdp_qlora.checkpoint import Position
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks, sum_over_ranks
from fsdp_qlora.errors import Interrupted, TrainingError
from fsdp_qlora.evaluation import evaluate
from fsdp_qlora.forward import forward
from fsdp_qlora.metrics import Metrics, memory_gib
from fsdp_qlora.optim import build_optimizer, gradient_norm, learning_rate, sum_replicas
from fsdp_qlora.run_folder import Progress
from fsdp_qlora.samples import Sampler
from fsdp_qlora.saver import Saver
from fsdp_qlora.stop import Stop


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks: mean loss per target token, gradient norm before clipping.

    Attributes:
        votes: sums over the ranks of what each said in `train_step`.
    """

    loss: float
    grad_norm: float
    num_targets: int
    num_tokens: int
    votes: tuple[float, ...] = ()


class Trainer:
    """A model, its optimizer and its data.

    Args:
        built: the loaded model.
        train: loader of the training data.
        evaluation: loaders of the evaluation sets by name.
        start: where to go on.
        sampler: answers sample prompts at every evaluation.
        best: keeps what is trained after every evaluation that gave the lowest loss so far.
        progress: kept up to date.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        built: BuiltModel,
        train: data.Loader,
        evaluation: Mapping[str, data.Loader],
        start: Position | None = None,
        sampler: Sampler | None = None,
        best: BestFolder | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.config, self.ranks, self.root = config, ranks, built.root
        self.train_loader, self.eval_loaders, self.sampler = train, evaluation, sampler
        self.best = best
        # a CPU that computes has nothing to spare beside the forward
        self.optimizer = build_optimizer(built.root, config, built.offloaded if ranks.device.type == "cuda" else ())
        self.progress = progress or Progress()
        built.skeleton.blocks[0].register_forward_pre_hook(lambda *_: self.progress.beat())
        self.position = start = start or Position()
        self.num_steps = max(config.max_steps, start.step)
        if config.max_steps < 0:
            left = count_steps(train, range(start.epoch, config.num_epochs), self.progress)
            self.num_steps = start.step + max(0, left - start.sequences // train.sequences_per_step)

    def loss(self, batch: data.Batch) -> torch.Tensor:
        """Return the sum of the token losses of a micro-batch, on this rank."""
        return forward(self.root, batch, self.ranks.device)["loss"]

    def train_step(
        self, batches: list[data.Batch], step: int, votes: Callable[[], Sequence[float]] = tuple
    ) -> StepResult:
        """Do one optimizer step on this rank's micro-batches.

        What rests in CPU memory is updated while the next forward runs: see `ShardedAdamW.finish`.

        Args:
            votes: asked near the end of the step for numbers to add up over the ranks, in the exchange of the loss.

        Raises:
            TrainingError: on every rank, if loss or gradient norm is not finite on any; there was no update then.
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
        sum_replicas(self.root, self.ranks)
        norm = gradient_norm(self.root).to(self.ranks.device)
        totals = torch.stack([total, *(total.new_full((), vote) for vote in votes())])  # nothing that waits for the GPU
        dist.all_reduce(totals)
        self.optimizer.set_lr(learning_rate(self.config, step, self.num_steps))
        self.optimizer.step_if_finite(totals[0], norm)
        self.optimizer.zero_grad()
        # only now does the CPU wait for the GPU, which has the whole step to do
        grad_norm, mean_loss, *votes_of_all = torch.cat([norm[None], totals]).tolist()
        if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
            raise TrainingError(
                f"step {step + 1}: loss {mean_loss}, gradient norm {grad_norm}; stopped before the update."
                " Lower --lr, or look for broken rows in this step's data"
            )
        num_tokens = sum(batch.input_ids.numel() for batch in batches) * self.ranks.world_size
        return StepResult(mean_loss, grad_norm, int(num_targets), num_tokens, tuple(votes_of_all))

    def fit(self, metrics: Metrics, saver: Saver, stop: Stop, recorded: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Train to the end, evaluating before, after and every `eval_steps`, and saving every `save_steps`.

        Args:
            recorded: the metrics of earlier sessions of the run.

        Returns:
            The summary of the run; None if a signal stopped it, after a checkpoint. An evaluation that it stops is given up,
            and done by whoever goes on.
        """
        evaluations = {record["step"]: record for record in recorded if "eval_loss" in record}
        loss = next((record["loss"] for record in reversed(recorded) if "loss" in record), None)
        started, first_step = time.monotonic(), self.position.step
        stopped = self._evaluate_if_due(metrics, evaluations, stop)
        while self.position.step < self.num_steps and not stopped and not self._has_stalled(evaluations):
            step, epoch = self.position.step, self.position.epoch
            index = self.position.sequences // self.train_loader.sequences_per_step
            step_started = time.monotonic()
            batches = self.train_loader.step(epoch, index)
            data_seconds = time.monotonic() - step_started
            try:
                result = self.train_step(batches, step, lambda: (saver.is_writing, stop.is_asked()))
            except TrainingError as error:
                saver.finish()
                examples = self.train_loader.examples(epoch, index)
                raise TrainingError(f"{error}: training examples {examples} of epoch {epoch}") from error
            seconds, loss = time.monotonic() - step_started, result.loss
            done = (time.monotonic() - started) / (step + 1 - first_step)
            remaining = done * (self.num_steps - step - 1)
            self._log_step(metrics, result, step, epoch, (seconds, data_seconds), remaining)
            if step == first_step:
                spent = {**self.progress.spent, "first step": seconds}
                metrics.show(
                    "until the first step: " + ", ".join(f"{what} {took:.1f} s" for what, took in spent.items())
                )
            self.position = self._after(result.num_tokens, seconds)
            self.progress.step = self.position.step
            self.progress.beat()
            num_writing, num_stopping = result.votes
            stopped = num_stopping > 0
            saver.poll(num_writing)
            if stopped or self._is_due(self.config.save_steps):
                saver.start(self.position)
            stopped = stopped or self._evaluate_if_due(metrics, evaluations, stop)
        self.optimizer.finish()
        saver.finish()
        if self._has_stalled(evaluations) and self.position.step < self.num_steps and not stopped:
            metrics.show(
                f"stopped at step {self.position.step}: the lowest loss is that of step {best_step(evaluations)}"
            )
            self.num_steps = self.progress.num_steps = self.position.step
        if self.position.step not in (0, self.progress.saved_step):
            saver.start(self.position)
            saver.finish()
        return None if stopped else self._summary(evaluations, loss)

    def _after(self, num_tokens: int, seconds: float) -> Position:
        """Return the position one step further."""
        here, size = self.position, self.train_loader.sequences_per_step
        epoch, sequences = here.epoch, here.sequences + size
        if sequences // size == self.train_loader.num_steps(epoch):
            epoch, sequences = epoch + 1, 0
        return Position(here.step + 1, epoch, sequences, here.tokens + num_tokens, here.seconds + seconds)

    def _is_due(self, every: int) -> bool:
        """Return whether what happens every so many steps (0: only at the end) happens now."""
        step = self.position.step
        return step == self.num_steps or (every > 0 and step % every == 0)

    def _evaluate_if_due(self, metrics: Metrics, evaluations: dict[int, dict[str, Any]], stop: Stop) -> bool:
        """Evaluate before the first step, after the last and every `eval_steps`, unless an earlier session has.

        Returns:
            Whether a signal ended it early.
        """
        step = self.position.step
        if step in evaluations or not (step == 0 or self._is_due(self.config.eval_steps)):
            if self.best is not None and step in evaluations:  # which may have been killed before it was kept
                self.best.keep(step, evaluations)
            return False
        self.optimizer.finish()
        try:
            values = evaluate(self.root, self.eval_loaders, self.ranks, stop.is_asked)
            answers = self.sampler.answers(stop.is_asked) if self.sampler is not None else []
        except Interrupted:
            return True
        if values:
            evaluations[step] = values
            metrics.log(values, step)
            sets = ", ".join(f"{name} {values[f'eval_loss/{name}']:.4f}" for name in self.eval_loaders if name)
            of_sets = f" ({sets})" if sets else ""
            metrics.show(
                f"step {step}: eval loss {values['eval_loss']:.4f}{of_sets}, perplexity {values['perplexity']:.2f},"
                f" token accuracy {values['token_accuracy']:.1%}"
            )
            if self.best is not None:
                self.best.keep(step, evaluations)
        if answers:
            metrics.log_samples(answers, step)
        return False

    def _has_stalled(self, evaluations: Mapping[int, dict[str, Any]]) -> bool:
        """Return whether the last `early_stopping_patience` evaluations (0: never) gave no lower loss than one before."""
        patience = self.config.early_stopping_patience
        return patience > 0 and sum(step > best_step(evaluations) for step in evaluations) >= patience

    def _summary(self, evaluations: dict[int, dict[str, Any]], loss: float | None) -> dict[str, Any]:
        tokens, seconds = self.position.tokens, self.position.seconds
        return {
            "steps": self.num_steps,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
            "train_loss": loss,
            "eval_loss_before": evaluations.get(0, {}).get("eval_loss"),
            "eval_loss_after": evaluations.get(self.num_steps, {}).get("eval_loss"),
            "best_step": self.best.step() if self.best is not None else best_step(evaluations) if evaluations else None,
            "peak_gpu_gib": round(memory_gib(self.ranks.device), 2),
        }

    def _log_step(
        self,
        metrics: Metrics,
        result: StepResult,
        step: int,
        epoch: int,
        took: tuple[float, float],
        remaining: float,
    ) -> None:
        """Write the metrics of a step that took so many seconds, of which the data took the second number."""
        if (step + 1) % self.config.logging_steps and step + 1 != self.num_steps:
            return
        rate = result.num_tokens / took[0]
        lr = learning_rate(self.config, step, self.num_steps)
        record = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "epoch": epoch,
            "tokens_per_second": round(rate, 1),
            "target_tokens": result.num_targets,
            "step_seconds": round(took[0], 3),
            "data_seconds": round(took[1], 4),
            "peak_gpu_gib": round(memory_gib(self.ranks.device), 2),
        }
        metrics.log(record, step + 1)
        metrics.progress(record, step + 1, self.num_steps, remaining)


def count_steps(train: data.Loader, epochs: range, progress: Progress) -> int:
    """Return the optimizer steps of epochs, which the schedule needs; each is packed for it (1 s a million examples).

    The first epoch comes last, as the loader keeps the latest, and training begins with it.
    """
    num_steps = 0
    for epoch in reversed(epochs):
        progress.beat(f"packing epoch {epoch + 1}")
        num_steps += train.num_steps(epoch)
    progress.beat("start-up")
    return num_steps

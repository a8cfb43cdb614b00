"""Fine-tuning from start to end. The algorithm is `Trainer.train_step`; finetune.py sets it up."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch
import torch.distributed as dist

from fsdp_qlora import data
from fsdp_qlora.build import BuiltModel
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks, sum_over_ranks
from fsdp_qlora.errors import TrainingError
from fsdp_qlora.loss import IGNORE
from fsdp_qlora.metrics import Metrics, memory_gib
from fsdp_qlora.optim import build_optimizer, clip_gradients, learning_rate


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
            metrics.show(f"step {step}: eval loss {values['eval_loss']:.4f}, perplexity {values['perplexity']:.2f}")
        return values

    def _log_step(
        self, metrics: Metrics, result: StepResult, step: int, epoch: int, seconds: float, started: float
    ) -> None:
        if (step + 1) % self.config.logging_steps and step + 1 != self.num_steps:
            return
        rate = result.num_tokens / seconds
        lr = learning_rate(self.config, step, self.num_steps)
        record = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "epoch": epoch,
            "tokens_per_second": round(rate, 1),
            "target_tokens": result.num_targets,
            "step_seconds": round(seconds, 3),
            "peak_gpu_gib": round(memory_gib(self.ranks.device), 2),
        }
        metrics.log(record, step + 1)
        remaining = (time.monotonic() - started) / (step + 1) * (self.num_steps - step - 1)
        metrics.progress(record, step + 1, self.num_steps, remaining)


def _padded(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Return document boundaries with empty documents at the end, up to a power of two: few shapes, few compilations."""
    length = max(64, 1 << (len(cu_seqlens) - 1).bit_length())
    return torch.nn.functional.pad(cu_seqlens, (0, length - len(cu_seqlens)), value=int(cu_seqlens[-1]))

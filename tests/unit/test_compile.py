"""Compiled blocks stay compiled: one code for all, in enough versions for every kind of block, mode and shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fsdp_qlora import parallel
from fsdp_qlora.build import build_model
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.models import attention
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from tests.batches import make_trainer, random_ids, whole_rows
from tests.tiny import COMMON, save_tiny


def one_operation(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """Stand in for attention, which on CPUs looks at values and so is not compiled."""
    groups = query.shape[1] // key.shape[1]
    return query + (key + value).repeat_interleave(groups, dim=1)


def train(folder: Path, ranks: Ranks) -> None:
    """Train and evaluate on several shapes, half of the blocks recomputed and half of them with LoRA."""
    torch._dynamo.reset()
    lora = LoraSettings(4, 8.0, layers=(0, 1))
    memory = MemorySettings(checkpoint_blocks=2)
    built = build_model(folder, ranks, QuantSettings(), lora, torch.float32, memory=memory, compiled=True)
    trainer = make_trainer(built, ranks, max_steps=3)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for step, tokens in enumerate((16, 24, 40)):
            batch = whole_rows(random_ids(2, tokens, COMMON["vocab_size"]))
            trainer.train_step([batch], step)
            built.root.eval()
            with torch.no_grad():
                trainer.loss(batch)


def test_versions_suffice(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(module: nn.Module) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile)
    monkeypatch.setattr(attention, "_by_document", one_operation)
    folder = save_tiny("olmo3", tmp_path)
    train(folder, ranks)
    monkeypatch.setattr(parallel, "COMPILED_VERSIONS", 8)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        train(folder, ranks)


def test_full_fine_tuning_is_the_same_compiled(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_blocks = []

    def compile(module: nn.Module) -> None:
        compiled_blocks.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile)
    folder = save_tiny("llama", tmp_path, num_hidden_layers=2)
    batch = whole_rows(random_ids(2, 16, COMMON["vocab_size"]))
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        memory = MemorySettings(checkpoint_blocks=1)
        quant = QuantSettings("none")
        built = build_model(folder, ranks, quant, None, torch.float32, memory=memory, compiled=compiled, full=True)
        trainer = make_trainer(built, ranks, max_steps=3, lr=1e-3)
        found.append([trainer.train_step([batch], step).loss for step in range(3)])
    assert len(compiled_blocks) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-6)

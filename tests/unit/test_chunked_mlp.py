"""An MLP that works on some tokens at a time: the same training, no more work, less memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fsdp_qlora import chunked_mlp
from fsdp_qlora.activation_checkpointing import Block
from fsdp_qlora.build import BuiltModel, build_model
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from tests.batches import make_trainer, random_ids, whole_rows
from tests.tiny import COMMON, save_tiny

BLOCKS = 2
TOKENS = 2 * 37
"""Of a micro-batch: 7 chunks of 10 or 11 tokens."""

DENSE = ("llama", "phi3", "cohere", "granite", "qwen3", "glm")
ATTENTION_ONLY = LoraSettings(4, 8.0, target_modules="q_proj,o_proj")
MLP_ONLY = LoraSettings(4, 8.0, target_modules="gate_proj,up_proj,down_proj")
DORA = LoraSettings(4, 8.0, use_dora=True)


def load(folder: Path, ranks: Ranks, lora: LoraSettings, kept: int = 0, compiled: bool = False) -> BuiltModel:
    memory = MemorySettings(checkpoint_blocks=BLOCKS - kept)
    quant = QuantSettings("nf4")
    return build_model(folder, ranks, quant, lora, torch.float32, memory=memory, compiled=compiled)


def losses(built: BuiltModel, ranks: Ranks) -> list[float]:
    """Train three steps, evaluating between them."""
    trainer = make_trainer(built, ranks, max_steps=3, lr=1e-2)
    found = []
    for step in range(3):
        batch = whole_rows(random_ids(2, TOKENS // 2, COMMON["vocab_size"], seed=step))
        found.append(trainer.train_step([batch, batch], step).loss)
        with torch.no_grad():
            found.append(trainer.loss(batch).item())
    return found


def rows_of_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list to which every chunk's number of tokens is added."""
    rows: list[int] = []
    run = chunked_mlp.ChunkedMLP.run

    def counted(self: chunked_mlp.ChunkedMLP, part: Tensor) -> Tensor:
        rows.append(len(part))
        return run(self, part)

    monkeypatch.setattr(chunked_mlp.ChunkedMLP, "run", counted)
    return rows


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        *((family, LoraSettings(4, 8.0)) for family in DENSE),
        ("llama", ATTENTION_ONLY),
        ("llama", MLP_ONLY),
        ("llama", DORA),
    ],
    ids=[*DENSE, "attention only", "MLP only", "DoRA"],
)
def test_training_is_the_same(
    family: str, lora: LoraSettings, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(family, tmp_path, num_hidden_layers=BLOCKS)
    expected = losses(load(folder, ranks, lora), ranks)
    monkeypatch.setattr(chunked_mlp, "CHUNK_TOKENS", 10)
    rows = rows_of_chunks(monkeypatch)
    assert losses(load(folder, ranks, lora), ranks) == pytest.approx(expected, rel=2e-5)
    # each of the steps: two micro-batches forward and back, and once for the evaluation
    assert len(rows) == 3 * BLOCKS * 7 * (2 * 2 + 1)
    assert set(rows) == {10, 11}


def test_blocks_that_keep_their_activations_and_dropout_have_no_chunks(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", tmp_path, num_hidden_layers=BLOCKS)
    monkeypatch.setattr(chunked_mlp, "CHUNK_TOKENS", 10)
    rows = rows_of_chunks(monkeypatch)
    batch = whole_rows(random_ids(2, TOKENS // 2, COMMON["vocab_size"]))
    for lora, kept, chunks in ((LoraSettings(4, 8.0), 1, 14), (LoraSettings(4, 8.0, dropout=0.1), 0, 0)):
        rows.clear()
        make_trainer(load(folder, ranks, lora, kept), ranks).train_step([batch], 0)
        assert len(rows) == chunks


@pytest.mark.parametrize("kept", [0, 1])
def test_it_is_the_same_compiled(kept: int, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(module: nn.Module) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    compiled_with = torch.compile
    monkeypatch.setattr(nn.Module, "compile", compile)
    monkeypatch.setattr(
        torch, "compile", lambda module, **how: compiled_with(module, **{"backend": "aot_eager", **how})
    )
    folder = save_tiny("llama", tmp_path, num_hidden_layers=BLOCKS)
    expected = losses(load(folder, ranks, LoraSettings(4, 8.0), kept), ranks)
    monkeypatch.setattr(chunked_mlp, "CHUNK_TOKENS", 10)
    torch._dynamo.reset()
    built = load(folder, ranks, LoraSettings(4, 8.0), kept, compiled=True)
    assert losses(built, ranks) == pytest.approx(expected, rel=2e-5)


class PeakBytes(TorchDispatchMode):
    """Counts the memory of the tensors that are made and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            self._count(tensor.untyped_storage())
        return result

    def _tensors(self, result: Any) -> Iterator[Tensor]:
        if isinstance(result, Tensor):
            yield result
        elif isinstance(result, tuple | list):
            for one in result:
                yield from self._tensors(one)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def run_block(folder: Path, ranks: Ranks) -> tuple[int, int]:
    """Run a wide block forward and backward; return floating-point operations and peak bytes."""
    block = load(folder, ranks, LoraSettings(4, 8.0)).skeleton.blocks[0]
    assert isinstance(block, Block)
    hidden = torch.randn(1, 512, COMMON["hidden_size"], requires_grad=True)
    rotary = tuple(torch.randn(1, 512, COMMON["hidden_size"] // COMMON["num_attention_heads"]) for _ in range(2))
    documents = {"cu_seq_lens_q": None, "max_length_q": 512}
    with PeakBytes() as memory, FlopCounterMode(display=False) as flops:
        output = block(hidden, position_embeddings=rotary, attention_mask=None, **documents)
        output.backward(torch.ones_like(output))
    return flops.get_total_flops(), memory.peak


def test_no_more_work_and_less_memory(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny("llama", tmp_path, num_hidden_layers=BLOCKS, intermediate_size=2048)
    work, memory = run_block(folder, ranks)
    monkeypatch.setattr(chunked_mlp, "CHUNK_TOKENS", 64)
    work_in_chunks, memory_in_chunks = run_block(folder, ranks)
    assert work_in_chunks == work
    # alive at once in the MLP's backward: five tensors of its width, of which each chunk has an eighth of the tokens
    inner = 512 * 2048 * 4
    assert memory > 4 * inner
    assert memory_in_chunks < memory - 3 * inner

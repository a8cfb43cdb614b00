"""Greedy answers and evaluation figures: the same on any number of ranks, offloaded or not, and for every family."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fsdp_qlora import data
from fsdp_qlora.build import BuiltModel, build_model
from fsdp_qlora.decode import generate
from fsdp_qlora.distributed import Ranks, process_group
from fsdp_qlora.errors import Interrupted
from fsdp_qlora.evaluation import evaluate
from fsdp_qlora.models.attention import ATTENTION
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings
from tests.ranks import run_ranks
from tests.tiny import FAMILIES, memory, save_tiny

MAX_NEW_TOKENS = 20
STOPS = set(range(0, 320, 12))
"""So many that some answers end early."""


def prompts() -> list[list[int]]:
    """Return seven prompts of unequal lengths, which no number of ranks divides."""
    random = np.random.default_rng(2)
    return [random.integers(12, 320, size=size).tolist() for size in (5, 1, 30, 17, 2, 9, 23)]


def build(folder: Path, ranks: Ranks, *, cpu_offload: bool = False) -> BuiltModel:
    """Build a tiny model with LoRA matrices at their initial values."""
    quant = QuantSettings(num_shards=ranks.num_shards)
    settings = memory(cpu_offload=cpu_offload, activation_checkpointing=True)
    return build_model(folder, ranks, quant, LoraSettings(4, 8), torch.float32, memory=settings)


@torch.no_grad()
def answer_alone(built: BuiltModel, prompt: list[int]) -> list[int]:
    """Continue one prompt without cache, padding or mask, running all of it again for every token."""
    head = built.root.vocabulary.gather()
    ids = list(prompt)
    while len(ids) < len(prompt) + MAX_NEW_TOKENS:
        batch = data.Batch(
            input_ids=torch.tensor([ids]),
            labels=torch.full((1, len(ids)), -100),
            position_ids=torch.arange(len(ids)).unsqueeze(0),
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
            max_seqlen=len(ids),
            num_targets=0,
        )
        hidden = built.root.model.model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).last_hidden_state
        token = int(F.linear(hidden[0, -1], head).argmax())
        if token in STOPS:
            break
        ids.append(token)
    return ids[len(prompt) :]


def answer_all(built: BuiltModel, ranks: Ranks, batch_size: int) -> list[list[int]]:
    return generate(built.root, prompts(), ranks, max_new_tokens=MAX_NEW_TOKENS, stop_ids=STOPS, batch_size=batch_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_one_prompt_alone(tmp_path: Path, family: str) -> None:
    folder = save_tiny(family, tmp_path / family)
    with process_group("full", 60, device="cpu") as ranks:
        built = build(folder, ranks)
        answers = answer_all(built, ranks, batch_size=3)
        assert built.skeleton.model.config._attn_implementation == ATTENTION, "training goes on as before"
        assert answers == [answer_alone(built, prompt) for prompt in prompts()]


def answers_and_figures(folder: Path, cpu_offload: bool) -> tuple[list[list[int]], dict[str, float]]:
    with process_group("full", 60, device="cpu") as ranks:
        built = build(folder, ranks, cpu_offload=cpu_offload)
        # before anything else has run through the model, as in `evaluate` of a prompt only
        answers = answer_all(built, ranks, batch_size=2)
        loaders = {name: loader(size, ranks) for name, size in (("few", 3), ("many", 10))}
        return answers, evaluate(built.root, loaders, ranks)


def examples(size: int) -> list[data.Example]:
    random = np.random.default_rng(size)
    found = []
    for number in range(size):
        ids = random.integers(12, 320, size=4 + 3 * number).tolist()
        found.append(data.Example(ids, [-100, -100, *ids[2:]]))
    return found


def loader(size: int, ranks: Ranks) -> data.Loader:
    return data.Loader(
        examples(size),
        batch_size=2,
        gradient_accumulation_steps=1,
        context_length=64,
        packing=True,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=0,
        shuffle=False,
        pad_token_id=0,
    )


def test_the_same_on_two_ranks_sharded_and_offloaded(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    (alone,) = run_ranks(answers_and_figures, 1, folder, False)
    assert len({len(answer) for answer in alone[0]}) > 1, "some end early"
    for cpu_offload in (False, True):
        for answers, figures in run_ranks(answers_and_figures, 2, folder, cpu_offload):
            assert answers == alone[0]
            assert figures == pytest.approx(alone[1], rel=1e-6)


def interrupt_answers(folder: Path) -> tuple[str, int]:
    """Ask rank 1 to end before the fifth token; return the interruption and how often this rank was asked about it."""
    asked = 0

    def is_stopping() -> bool:
        nonlocal asked
        asked += 1
        return ranks.rank == 1 and asked == 5

    with process_group("full", 60, device="cpu") as ranks:
        built = build(folder, ranks)
        try:
            generate(
                built.root, prompts(), ranks, max_new_tokens=20, stop_ids=(), batch_size=2, is_stopping=is_stopping
            )
        except Interrupted as interruption:
            return str(interruption), asked
    return "", asked


def test_answers_end_between_two_tokens(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    assert run_ranks(interrupt_answers, 2, folder) == [("interrupted while answering", 5)] * 2


def test_figures(tmp_path: Path) -> None:
    """Loss and accuracy against full logits of transformers' own loss, and the mean over sets against its parts."""
    folder = save_tiny("llama", tmp_path / "llama")
    with process_group("full", 60, device="cpu") as ranks:
        built = build(folder, ranks)
        figures = evaluate(built.root, {"few": loader(3, ranks), "many": loader(10, ranks)}, ranks)
        losses, hits = [], []
        with torch.no_grad():
            for example in examples(3):
                ids = torch.tensor([example.input_ids])
                hidden = built.root.model.model(input_ids=ids, use_cache=False).last_hidden_state
                logits = F.linear(hidden[0, 1:-1], built.root.vocabulary.gather())
                losses.append(F.cross_entropy(logits, ids[0, 2:], reduction="none"))
                hits.append(logits.argmax(-1) == ids[0, 2:])
    assert figures["eval_loss/few"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert figures["token_accuracy/few"] == pytest.approx(torch.cat(hits).float().mean().item())
    assert figures["perplexity"] == pytest.approx(math.exp(figures["eval_loss"]))
    counts = {
        name: sum(len(example.input_ids) - 2 for example in examples(n)) for name, n in (("few", 3), ("many", 10))
    }
    mean = sum(figures[f"eval_loss/{name}"] * count for name, count in counts.items()) / sum(counts.values())
    assert figures["eval_loss"] == pytest.approx(mean)


def test_no_sets_no_figures(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "llama")
    with process_group("full", 60, device="cpu") as ranks:
        assert evaluate(build(folder, ranks).root, {}, ranks) == {}

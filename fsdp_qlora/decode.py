"""Greedy answers to many prompts, by all ranks together: works on sharded and offloaded models as on plain ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase

from fsdp_qlora.announce import announced
from fsdp_qlora.distributed import Ranks, end_together, never, sum_over_ranks
from fsdp_qlora.parallel import LossModel


def read_stop_ids(base_folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's eos and those of the model's generation config."""
    stops = {tokenizer.eos_token_id}
    if (base_folder / "generation_config.json").exists():
        found = GenerationConfig.from_pretrained(base_folder, local_files_only=True).eos_token_id
        stops |= set(found) if isinstance(found, list) else {found}
    return {stop for stop in stops if stop is not None}


@torch.no_grad()
def generate(
    root: LossModel,
    prompts: Sequence[Sequence[int]],
    ranks: Ranks,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    batch_size: int,
    is_stopping: Callable[[], bool] = never,
) -> list[list[int]]:
    """Return the most likely continuation of each prompt, without the token that ended it.

    Every rank must call this with the same prompts; each answers its share, in step with the others, and all get all
    answers.

    Args:
        prompts: token ids, at least one each.
        batch_size: prompts of a rank at a time.
        is_stopping: whether this rank was asked to end; asked before every token.

    Raises:
        Interrupted: on every rank, if any was asked to end.
    """
    root.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths together: little padding
    together = batch_size * ranks.world_size
    own: dict[int, list[int]] = {}
    with _step_by_step(root):
        starts = range(0, len(order), together)
        for start in announced(starts, lambda done: f"answering: {done * together:,} of {len(order):,}", ranks.is_main):
            everyone = order[start : start + together]
            mine = everyone[ranks.rank :: ranks.world_size]
            # the same shape on all ranks, which exchange equal pieces; a rank without a prompt works on a dummy
            rows = -(-len(everyone) // ranks.world_size)
            filled = [prompts[i] for i in mine] + [prompts[everyone[0]]] * (rows - len(mine))
            length = max(len(prompts[i]) for i in everyone)
            answers = _continue(root, filled, length, ranks, max_new_tokens, stop_ids, is_stopping)
            own |= dict(zip(mine, answers, strict=False))
    gathered: list[dict[int, list[int]]] = [{} for _ in range(ranks.world_size)]
    dist.all_gather_object(gathered, own)
    found = {i: answer for part in gathered for i, answer in part.items()}
    return [found[i] for i in range(len(prompts))]


def _continue(
    root: LossModel,
    prompts: Sequence[Sequence[int]],
    length: int,
    ranks: Ranks,
    max_new_tokens: int,
    stop_ids: Collection[int],
    is_stopping: Callable[[], bool],
) -> list[list[int]]:
    """Continue the prompts of one batch, padded on the left to `length`, until all ranks have all their ends."""
    tokens, mask = _left_padded(prompts, length)
    tokens, mask = tokens.to(ranks.device), mask.to(ranks.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # transformers renamed the argument in 5.2x
    renamed = "cache" in inspect.signature(root.model.model.forward).parameters
    cache = {"cache" if renamed else "past_key_values": DynamicCache(config=root.model.config)}
    answers: list[list[int]] = [[] for _ in prompts]
    is_open = [True] * len(prompts)
    for _ in range(max_new_tokens):
        end_together(is_stopping(), "answering")
        chosen = root.next_tokens(tokens, positions, mask, cache)
        for row, token in enumerate(chosen.tolist()):
            is_open[row] = is_open[row] and token not in stop_ids
            if is_open[row]:
                answers[row].append(token)
        if not sum_over_ranks(sum(is_open)):
            break
        tokens, positions = chosen.unsqueeze(1), positions[:, -1:] + 1
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return answers


def _left_padded(prompts: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask (1: a token of a prompt), both int64 [prompts, length]."""
    tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return tokens, mask


@contextmanager
def _step_by_step(root: LossModel) -> Iterator[None]:
    """Let the model attend to a cache, which packed attention cannot, and run its blocks uncompiled: shapes change."""
    model = root.model
    trained = model.config._attn_implementation
    # torch's own attention has no soft cap (Gemma 2)
    has_softcap = getattr(model.config, "attn_logit_softcapping", None) is not None
    model.set_attn_implementation("eager" if has_softcap else "sdpa")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.set_attn_implementation(trained)

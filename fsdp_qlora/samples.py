"""Answers to chosen prompts while a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data.prompts import encode_prompts
from fsdp_qlora.decode import generate
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.errors import DataError
from fsdp_qlora.parallel import LossModel

Prompt = tuple[str, list[int]]
"""A user's message, and the tokens that the model continues."""

BATCH_SIZE = 8


def read_prompts(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return the prompts of --sample_prompts, one a line of the file; none without.

    Raises:
        DataError: the file cannot be read, or holds no prompt or one that does not fit.
    """
    if config.sample_prompts is None:
        return []
    path = Path(config.sample_prompts).expanduser()
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"--sample_prompts={path} cannot be read ({reason}); give a UTF-8 text file") from error
    if not texts:
        raise DataError(f"--sample_prompts={path} is empty; write one prompt a line")
    prompts = list(zip(texts, encode_prompts(texts, tokenizer), strict=True))
    for text, ids in prompts:
        if len(ids) + config.max_new_tokens > config.context_length:
            raise DataError(
                f"--sample_prompts={path}: {text[:40]!r} has {len(ids)} tokens, which with {config.max_new_tokens} of the"
                f" answer exceed --context_length {config.context_length}; shorten it, or lower --max_new_tokens"
            )
    return prompts


class Sampler:
    """Answers the prompts with the model as it is.

    Args:
        stop_ids: tokens that end an answer.
        max_new_tokens: tokens of an answer at most.
    """

    def __init__(
        self,
        root: LossModel,
        ranks: Ranks,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        stop_ids: Collection[int],
        max_new_tokens: int,
    ) -> None:
        self._root, self._ranks, self._tokenizer = root, ranks, tokenizer
        self._prompts, self._stop_ids, self._max_new_tokens = prompts, stop_ids, max_new_tokens

    def answers(self, is_stopping: Callable[[], bool]) -> list[dict[str, str]]:
        """Return {"prompt", "answer"} of every prompt; every rank must call this. For `is_stopping` see decode.py."""
        found = generate(
            self._root,
            [ids for _, ids in self._prompts],
            self._ranks,
            max_new_tokens=self._max_new_tokens,
            stop_ids=self._stop_ids,
            batch_size=BATCH_SIZE,
            is_stopping=is_stopping,
        )
        return [
            {"prompt": text, "answer": self._tokenizer.decode(ids, skip_special_tokens=True).strip()}
            for (text, _), ids in zip(self._prompts, found, strict=True)
        ]

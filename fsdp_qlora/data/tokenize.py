"""Documents -> token ids and labels."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import tokenizers
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.templates import Document, Piece
from fsdp_qlora.errors import DataError

IGNORE = -100
"""Label of a position that is not a target."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised document; both lists have the same length."""

    input_ids: list[int]

    labels: list[int]
    """input_ids where the token is a target, else -100; not shifted."""


class Encoder:
    """Tokenises documents so that control tokens written inside contents stay plain text.

    Everything else gets the ids of `tokenizer(text)`: a document is encoded whole, and character offsets tell which
    tokens are targets. A token that reaches into a target from the text before it is a target.

    Args:
        tokenizer: a fast (Rust) one, for its offsets.
        control_tokens: token texts that contents must not produce.
        all_targets: every token is a target, whatever the pieces say.

    Raises:
        DataError: the tokenizer is not a fast one or has no eos token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, control_tokens: set[str], *, all_targets: bool = False
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(f"{tokenizer.name_or_path} has no fast tokenizer; add its tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise DataError(f"{tokenizer.name_or_path} has no eos token; set eos_token in tokenizer_config.json")
        self._tokenizer = tokenizer
        self._control_tokens = control_tokens
        self._all_targets = all_targets
        self._is_control = np.zeros(len(tokenizer), dtype=bool)
        self._is_control[[tokenizer.convert_tokens_to_ids(token) for token in control_tokens]] = True
        self._integers = list(range(len(tokenizer)))
        self._adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id

    def encode(self, documents: Sequence[Document]) -> list[Example | DataError]:
        """Return one example per document, not truncated, or the error of one that cannot be encoded."""
        results: dict[int, Example | DataError] = {}
        for add_special_tokens in (False, True):
            chosen = [i for i, document in enumerate(documents) if document.add_special_tokens == add_special_tokens]
            if not chosen:
                continue
            texts = [self._text(documents[i]) for i in chosen]
            encoded = self._tokenizer(
                texts,
                add_special_tokens=add_special_tokens,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            for i, ids, offsets in zip(chosen, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                results[i] = self._example(documents[i], ids, offsets)
        return [results[i] for i in range(len(documents))]

    def _text(self, document: Document) -> str:
        text = "".join(piece.text for piece in document.pieces)
        bos = self._tokenizer.bos_token
        if document.add_special_tokens and self._adds_bos and bos and document.pieces[0].literal:
            return text.removeprefix(bos)  # the tokenizer adds it: never two
        return text

"""Documents -> token ids and labels."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import tokenizers
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.data.templates import Document, Piece
from fsdp_qlora.errors import DataError

IGNORE = -100
"""Label of a position that is not a target."""

TrainOn: TypeAlias = Literal["assistant", "last", "all"]

Offsets: TypeAlias = list[tuple[int, int]]
"""Character span [start, end) of each token."""


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
        train_on: which tokens are targets: those of the target pieces ('assistant'), of the last run of them, or all.

    Raises:
        DataError: the tokenizer is not a fast one or has no eos token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, control_tokens: set[str], train_on: TrainOn = "assistant"
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(f"{tokenizer.name_or_path} has no fast tokenizer; add its tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise DataError(f"{tokenizer.name_or_path} has no eos token; set eos_token in tokenizer_config.json")
        self._tokenizer = tokenizer
        self._control_tokens = control_tokens
        self._train_on = train_on
        self._is_control = np.zeros(len(tokenizer), dtype=bool)
        self._is_control[[tokenizer.convert_tokens_to_ids(token) for token in control_tokens]] = True
        self._is_control_for_sure = self._is_control.copy()
        if tokenizer.unk_token_id is not None:
            self._is_control_for_sure[tokenizer.unk_token_id] = False  # it also stands for unknown characters
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

    def _example(self, document: Document, ids: list[int], offsets: Offsets) -> Example | DataError:
        pieces = document.pieces
        if contents_hold(self._is_control, pieces, ids, offsets):
            pieces = tuple(self._rename_control_tokens(piece) for piece in pieces)
            text = "".join(piece.text for piece in pieces)
            encoding = self._renamed_tokenizer.encode(text, add_special_tokens=document.add_special_tokens)
            ids, offsets = encoding.ids, encoding.offsets
            if contents_hold(self._is_control_for_sure, pieces, ids, offsets):
                return DataError("holds a control token that this tokenizer cannot encode as plain text; remove it")
        input_ids = [self._integers[i] for i in ids]  # shared int objects, a quarter of the memory of new ones
        labels = list(input_ids)
        if self._train_on != "all" and not all(piece.target for piece in pieces):
            targets = tokens_in_spans(offsets, spans_of(pieces, lambda piece: piece.target))
            labels = [i if target else IGNORE for i, target in zip(input_ids, targets.tolist(), strict=True)]
        eos = self._tokenizer.eos_token_id
        if document.append_eos and input_ids[-1:] != [eos]:
            input_ids.append(eos)
            labels.append(eos)
        if self._train_on == "last":
            start = start_of_last_answer(labels)
            labels[:start] = [IGNORE] * start
        return Example(input_ids, labels)

    def _rename_control_tokens(self, piece: Piece) -> Piece:
        if not piece.literal:
            return piece
        longest_first = sorted(map(re.escape, self._new_names), key=len, reverse=True)
        text = re.sub("|".join(longest_first), lambda match: self._new_names[match[0]], piece.text)
        return replace(piece, text=text)

    @cached_property
    def _new_names(self) -> dict[str, str]:
        """New texts for the control tokens, which no content can guess (private-use characters survive normalisers)."""
        secret = secrets.token_hex(8)
        return {token: f"\ue000{secret}x{i}\ue001" for i, token in enumerate(sorted(self._control_tokens))}

    @cached_property
    def _renamed_tokenizer(self) -> tokenizers.Tokenizer:
        """The same tokenizer with its control tokens renamed, so that their usual texts are plain text to it."""
        names = self._new_names
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
        else:  # unigram: [text, score] by id
            model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        if "merges" in model:
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            model["merges"] = [pair for pair in pairs if names.keys().isdisjoint([*pair, "".join(pair)])]
        renamed = tokenizers.Tokenizer.from_str(json.dumps(state))
        renamed.no_truncation()
        renamed.no_padding()
        for old, new in names.items():
            assert renamed.token_to_id(new) == self._tokenizer.convert_tokens_to_ids(old), f"{old!r} changed its id"
        return renamed


def start_of_last_answer(labels: Sequence[int]) -> int:
    """Return the index of the first token of the last run of targets."""
    position = len(labels)
    while position and labels[position - 1] == IGNORE:
        position -= 1
    while position and labels[position - 1] != IGNORE:
        position -= 1
    return position


def contents_hold(chosen_V: npt.NDArray[np.bool_], pieces: Sequence[Piece], ids: list[int], offsets: Offsets) -> bool:
    """Return whether a token whose entry in the table is true, by id, begins inside a content."""
    chosen = chosen_V[np.array(ids, dtype=np.int64)]
    if not chosen.any():
        return False
    starts, ends = np.array(offsets, dtype=np.int64)[chosen].T
    contents = spans_of(pieces, lambda piece: not piece.literal)
    return any(bool(((starts >= a) & (starts < b) & (ends > starts)).any()) for a, b in contents)


def spans_of(pieces: Sequence[Piece], chosen: Callable[[Piece], bool]) -> list[tuple[int, int]]:
    """Return the character spans [start, end) of the chosen pieces in the text that the pieces make up."""
    spans = []
    end = 0
    for piece in pieces:
        start, end = end, end + len(piece.text)
        if chosen(piece):
            spans.append((start, end))
    return spans


def tokens_in_spans(offsets: Offsets, spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Return which tokens hold a character of a span."""
    starts, ends = np.array(offsets, dtype=np.int64).T
    # Byte-level tokenizers report spaces outside of the token they belong to: a token reaches back to the one before.
    previous_ends = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])
    starts = np.minimum(starts, previous_ends)
    inside = np.zeros(len(offsets), dtype=bool)
    for a, b in spans:
        inside |= (starts < b) & (ends > a)
    return inside

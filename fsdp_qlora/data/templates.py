"""Chat templates: a conversation becomes pieces of text, each known to be a target or not.

Common templates have no `{% generation %}` blocks, and rendering growing prefixes fails where a template treats the
last turn specially (Qwen3). So the template is rendered once per shape of conversation with a sentinel in the place of
every content: what stands between the sentinels is the template's own text. Filling in the contents must then give
exactly what the template gives for the real messages, which is checked for every conversation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jinja2
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.errors import DataError

Message: TypeAlias = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text that is not blank}."""

Shape: TypeAlias = tuple[tuple[str, str], ...]
"""(role, content with HOLE in the place of its texts) per message: all of a conversation but its texts."""

HOLE = "\0"
SENTINEL = re.compile(r"zq(\d+)slotqz")
REASONING_TAG = re.compile(r"(</?think>)")

FIXED_DATE = """{%- macro strftime_now(format) -%}
{{ format | replace("%Y", "2025") | replace("%m", "01") | replace("%d", "01") | replace("%b", "Jan") \
| replace("%B", "January") | replace("%y", "25") | replace("%A", "Wednesday") | replace("%a", "Wed") }}
{%- endmacro %}
"""
"""Put before templates that print today's date, which would give other tokens after a resume or past midnight.

(Functions cannot be passed to a template: transformers turns them into strings.)
"""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of rendered text."""

    text: str
    literal: bool
    """Written by the template, so control tokens in it mean what they say; in a message's content they are text."""

    target: bool
    """The model must produce it."""


@dataclass(frozen=True, slots=True)
class Document:
    """What becomes one example."""

    pieces: tuple[Piece, ...]
    add_special_tokens: bool
    """Let the tokenizer add its BOS; templates write their own."""

    append_eos: bool
    """End with the eos token, as a target."""


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A rendered shape: literal text, or the number of the content that goes there, each with its target flag."""

    parts: tuple[tuple[str | int, bool], ...]
    cut: str
    """What the template writes after the last turn, such as the header of a next one, and is left out."""

    append_eos: bool


class ChatRenderer:
    """Renders conversations by a tokenizer's chat template; remembers the shapes it has seen.

    `control_tokens` are the tokens that only the template may write: the tokenizer's special tokens and other added
    tokens found in the template's own text. `merges_system` tells whether the template takes no system message, so that
    it is put into the first user message.

    Raises:
        DataError: the tokenizer has no chat template, or one that cannot render a question and an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"{tokenizer.name_or_path or 'this tokenizer'} has no chat template, so conversations cannot be "
                "rendered: use an instruct/chat model, or rows of the form 'prompt_completion' or 'text'"
            )
        self._tokenizer = tokenizer
        template = tokenizer.get_chat_template()
        self._template = FIXED_DATE + template if "strftime_now" in template else template
        self._skeletons: dict[Shape, Skeleton] = {}
        self.control_tokens = special_tokens(tokenizer)
        self._generation_prompt = self._find_generation_prompt()
        question: Shape = (("user", HOLE), ("assistant", HOLE))
        own_text = " ".join(part for part, _ in self._skeleton(question).parts if isinstance(part, str))
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        self.control_tokens |= {token for token in added if token in own_text}
        self.merges_system = not self._accepts((("system", HOLE), *question))
        self._skeletons.clear()  # control tokens decide where a turn ends

    def render(self, messages: Sequence[Message]) -> Document:
        """Return the pieces of a conversation; concatenated they are what the template renders.

        Targets are what the model writes after the generation prompt: the answer, an empty reasoning block that the
        template adds, and the end-of-turn token (eos is appended if the template writes none after the last answer).
        A system message that the template refuses or leaves out is put before the first user message.

        Raises:
            DataError: the template refuses the conversation, leaves a message out, or changes a content.
        """
        if self.merges_system and messages[0]["role"] == "system":
            messages = merge_system(messages)
        shape, contents = split_contents(messages)
        skeleton = self._skeleton(shape)
        pieces = tuple(
            Piece(part, True, target) if isinstance(part, str) else Piece(contents[part], False, target)
            for part, target in skeleton.parts
        )
        if self._apply(messages) != "".join(piece.text for piece in pieces) + skeleton.cut:
            raise DataError("the chat template changes a message's text (is there markup of the template in it?)")
        return Document(pieces, add_special_tokens=False, append_eos=skeleton.append_eos)

    def _apply(self, messages: Sequence[Message], **kwargs: Any) -> str:
        """Render by the tokenizer's template, with a fixed date."""
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages), chat_template=self._template, tokenize=False, **kwargs
            )
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        assert isinstance(rendered, str)
        return rendered

    def _accepts(self, shape: Shape) -> bool:
        try:
            self._skeleton(shape)
        except DataError:
            return False
        return True

    def _find_generation_prompt(self) -> str:
        """Return what the template writes before an answer that is to be generated; empty if it writes nothing."""
        question = [{"role": "user", "content": "question"}]
        without, with_prompt = self._apply(question), self._apply(question, add_generation_prompt=True)
        return with_prompt.removeprefix(without) if with_prompt.startswith(without) else ""

    def _skeleton(self, shape: Shape) -> Skeleton:
        if shape not in self._skeletons:
            self._skeletons[shape] = self._build_skeleton(shape)
        return self._skeletons[shape]

    def _build_skeleton(self, shape: Shape) -> Skeleton:
        messages, owners = sentinel_messages(shape)
        fields = SENTINEL.split(self._apply(messages))  # literal, slot, literal, slot, ..., literal
        literals, slots = fields[0::2], [int(number) for number in fields[1::2]]
        check_slots(slots, owners, shape)
        around = [-1, *(owners[slot] for slot in slots), -1]  # the messages before and after each literal
        parts: list[tuple[str | int, bool]] = []
        for i, literal in enumerate(literals[:-1]):
            before, after = around[i], around[i + 1]
            is_answer = shape[after][0] == "assistant"
            head, tail = 0, len(literal)
            if before == after and is_answer:
                tail = 0
            else:
                if before >= 0 and shape[before][0] == "assistant":
                    head = self._end_of_turn(literal, shape[before][1])[0]
                if is_answer:
                    tail = max(head, self._start_of_answer(literal, shape[after][1]))
            parts += [(literal[:head], True), (literal[head:tail], False), (literal[tail:], True)]
            parts.append((slots[i], is_answer))
        last = literals[-1]
        end, has_end_token = self._end_of_turn(last, shape[-1][1])
        keep = len(last) if has_end_token and not last[end:].strip() else end
        parts += [(last[:end], True), (last[end:keep], False)]
        return Skeleton(tuple(part for part in parts if part[0] != ""), last[keep:], not has_end_token)

    def _start_of_answer(self, literal: str, form: str) -> int:
        """Return where, in the text before an answer's first words, the model begins to write."""
        if self._generation_prompt and self._generation_prompt in literal:
            return literal.rindex(self._generation_prompt) + len(self._generation_prompt)
        own_start = form[: form.index(HOLE)]
        return len(literal) - len(own_start) if literal.endswith(own_start) else len(literal)

    def _end_of_turn(self, literal: str, form: str) -> tuple[int, bool]:
        """Return where, in the text after an answer's last words, the model stops, and if that is a control token."""
        own_end = form[form.rindex(HOLE) + 1 :]
        start = len(own_end) if literal.startswith(own_end) else 0
        found = [(literal.find(token, start), -len(token)) for token in self.control_tokens]
        position, negative_length = min((hit for hit in found if hit[0] >= 0), default=(-1, 0))
        if position < 0 or literal[start:position].strip():
            return start, False
        return position - negative_length, True


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the texts of a tokenizer's special tokens."""
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def merge_system(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with a leading system message put before the text of the first user message."""
    system, user, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def split_contents(messages: Sequence[Message]) -> tuple[Shape, list[str]]:
    """Split a conversation into its shape and its texts.

    The shape keeps white space around texts, which templates trim or keep, and the reasoning tags of answers, which
    templates move or remove.
    """
    shape: list[tuple[str, str]] = []
    contents: list[str] = []
    for message in messages:
        content = message["content"]
        has_reasoning = message["role"] == "assistant" and "</think>" in content
        form = ""
        for part in REASONING_TAG.split(content) if has_reasoning else [content]:
            text = part.strip()
            if text and not (has_reasoning and REASONING_TAG.fullmatch(text)):
                contents.append(text)
                form += part.replace(text, HOLE, 1)
            else:
                form += part
        if HOLE not in form:
            raise DataError(f"message {len(shape) + 1} ({message['role']}) is empty")
        shape.append((message["role"], form))
    return tuple(shape), contents


def sentinel_messages(shape: Shape) -> tuple[list[Message], list[int]]:
    """Return messages of that shape with sentinels as texts, and the message that each sentinel belongs to."""
    messages: list[Message] = []
    owners: list[int] = []
    for index, (role, form) in enumerate(shape):
        while HOLE in form:
            form = form.replace(HOLE, f"zq{len(owners)}slotqz", 1)
            owners.append(index)
        messages.append({"role": role, "content": form})
    return messages, owners


def check_slots(slots: list[int], owners: list[int], shape: Shape) -> None:
    """Raise DataError if a message, or an answer's last text, was not rendered exactly once."""
    for index, (role, _) in enumerate(shape):
        own = [slot for slot, owner in enumerate(owners) if owner == index]
        if not own or slots.count(own[-1]) != 1:
            raise DataError(f"the chat template leaves out or repeats message {index + 1} ({role})")

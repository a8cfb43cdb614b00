"""Chat templates: a conversation becomes pieces of text, each known to be a target or not.

Common templates have no `{% generation %}` blocks, and rendering growing prefixes fails where a template treats the
last turn specially (Qwen3). So the template is rendered once per shape of conversation with a sentinel in the place of
every text: what stands between the sentinels is the template's own. Filling in the texts must then give exactly what the
template gives for the real messages, which is checked for every conversation. Of a tool call only the function's name has
a sentinel; its arguments stay in the shape, and what the template makes of them counts as its own text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.errors import DataError

Message: TypeAlias = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}; answers may also have "reasoning_content" (text) and
"tool_calls" ([{"type": "function", "function": {"name", "arguments"}}]), and with those an empty content."""

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
class Turn:
    """A message without its texts, of which HOLE marks the places."""

    role: str
    content: str
    reasoning: str = ""
    extras: str = "{}"
    """JSON of all other fields."""

    @property
    def has_calls(self) -> bool:
        return '"tool_calls"' in self.extras


@dataclass(frozen=True, slots=True)
class Shape:
    """A conversation without its texts, and the JSON of its tools."""

    turns: tuple[Turn, ...]
    tools: str = "[]"

    @property
    def is_plain(self) -> bool:
        """Whether many conversations can have this shape: no tools, no tool calls."""
        return self.tools == "[]" and all(turn.extras == "{}" for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for a text: the turn it belongs to, and whether the template must write it."""

    owner: int
    required: bool


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
        self._end_tokens: set[str] = {str(tokenizer.eos_token)}
        self._generation_prompt = self._find_generation_prompt()
        question = (Turn("user", HOLE), Turn("assistant", HOLE))
        own_text = " ".join(part for part, _ in self._skeleton(Shape(question)).parts if isinstance(part, str))
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
        self.control_tokens |= {token for token in added if token in own_text}
        self.merges_system = not self._accepts(Shape((Turn("system", HOLE), *question)))
        self._skeletons.clear()  # control tokens decide where a turn ends
        parts = [part for part, _ in self._skeleton(Shape(question)).parts]
        self._answer_header = "".join(
            part for part in parts[parts.index(0) + 1 : parts.index(1)] if isinstance(part, str)
        )
        end = "".join(part for part in parts[parts.index(1) + 1 :] if isinstance(part, str)).strip()
        self._end_tokens |= {token for token in self.control_tokens if token == end}

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> Document:
        """Return the pieces of a conversation; concatenated they are what the template renders.

        Targets are what the model writes after the generation prompt: reasoning (an empty block that the template adds
        included), the answer, tool calls, and the end-of-turn token (eos is appended if the template writes none after the
        last answer). What tools return is no target.
        A system message that the template refuses or leaves out is put before the first user message.

        Raises:
            DataError: the template refuses the conversation, leaves a message or the last reasoning out, or changes a text;
                or a tool or call holds a control token.
        """
        if self.merges_system and messages[0]["role"] == "system":
            messages = merge_system(messages)
        turns, contents = split_contents(messages)
        shape = Shape(turns, json.dumps(list(tools), ensure_ascii=False))
        structured = shape.tools + "".join(turn.extras for turn in turns)
        if inside := next((token for token in sorted(self.control_tokens) if token in structured), None):
            raise DataError(f"a tool, or a call of one, holds the control token {inside}; remove it")
        skeleton = self._skeleton(shape)
        pieces = tuple(
            Piece(part, True, target) if isinstance(part, str) else Piece(contents[part], False, target)
            for part, target in skeleton.parts
        )
        if self._apply(messages, shape.tools) != "".join(piece.text for piece in pieces) + skeleton.cut:
            raise DataError("the chat template changes a message's text (is there markup of the template in it?)")
        return Document(pieces, add_special_tokens=False, append_eos=skeleton.append_eos)

    def _apply(self, messages: Sequence[Message], tools: str = "[]", **kwargs: Any) -> str:
        """Render by the tokenizer's template, with a fixed date."""
        try:
            rendered = self._tokenizer.apply_chat_template(
                list(messages), tools=json.loads(tools) or None, chat_template=self._template, tokenize=False, **kwargs
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
        if not shape.is_plain:
            return self._build_skeleton(shape)
        if shape not in self._skeletons:
            self._skeletons[shape] = self._build_skeleton(shape)
        return self._skeletons[shape]

    def _build_skeleton(self, shape: Shape) -> Skeleton:
        turns = shape.turns
        messages, slots = sentinel_messages(turns)
        fields = SENTINEL.split(self._apply(messages, shape.tools))  # literal, slot, literal, slot, ..., literal
        literals, found = fields[0::2], [int(number) for number in fields[1::2]]
        check_slots(found, slots, turns)
        around = [-1, *(slots[number].owner for number in found), -1]  # the turns before and after each literal
        parts: list[tuple[str | int, bool]] = []
        for i, literal in enumerate(literals[:-1]):
            before, after = around[i], around[i + 1]
            is_answer = turns[after].role == "assistant"
            head, tail = 0, len(literal)
            if before == after and is_answer:
                tail = 0
            else:
                if before >= 0 and turns[before].role == "assistant":
                    head = self._end_of_turn(literal, turns[before])[0]
                if is_answer:
                    tail = max(head, self._start_of_answer(literal, turns[after]))
            parts += [(literal[:head], True), (literal[head:tail], False), (literal[tail:], True)]
            parts.append((found[i], is_answer))
        last = literals[-1]
        end, has_end_token = self._end_of_turn(last, turns[-1])
        keep = len(last) if has_end_token and not last[end:].strip() else end
        parts += [(last[:end], True), (last[end:keep], False)]
        return Skeleton(tuple(part for part in parts if part[0] != ""), last[keep:], not has_end_token)

    def _start_of_answer(self, literal: str, turn: Turn) -> int:
        """Return where, in the text before an answer's first words, the model begins to write.

        Raises:
            DataError: the answer is a tool call only, and nothing tells where it begins.
        """
        if self._generation_prompt and self._generation_prompt in literal:
            return literal.rindex(self._generation_prompt) + len(self._generation_prompt)
        form = turn.reasoning or turn.content
        if HOLE not in form:
            header = self._answer_header.rstrip()
            if not header or header not in literal:
                raise DataError("the chat template does not show where a tool call begins")
            return literal.rindex(header) + len(header)
        own_start = form[: form.index(HOLE)]
        return len(literal) - len(own_start) if literal.endswith(own_start) else len(literal)

    def _end_of_turn(self, literal: str, turn: Turn) -> tuple[int, bool]:
        """Return where, in the text after an answer's last words, the model stops, and if that is a control token.

        Raises:
            DataError: nothing tells where a tool call ends.
        """
        if turn.has_calls:
            ends = [literal.index(token) + len(token) for token in self._end_tokens if token in literal]
            if not ends:
                raise DataError("the chat template does not show where a tool call ends")
            return min(ends), True
        own_end = turn.content[turn.content.rindex(HOLE) + 1 :]
        start = len(own_end) if literal.startswith(own_end) else 0
        hits = [(literal.find(token, start), -len(token)) for token in self.control_tokens]
        position, negative_length = min((hit for hit in hits if hit[0] >= 0), default=(-1, 0))
        if position < 0 or literal[start:position].strip():
            return start, False
        return position - negative_length, True


def use_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    """Put the chat template of a file in the place of the tokenizer's own, if there is one; DataError if unreadable."""
    if path is None:
        return
    try:
        tokenizer.chat_template = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"--chat_template={path} cannot be read ({reason}); give a UTF-8 file with a Jinja template"
        ) from error


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the texts of a tokenizer's special tokens."""
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def merge_system(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with a leading system message put before the text of the first user message."""
    system, user, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def split_contents(messages: Sequence[Message]) -> tuple[tuple[Turn, ...], list[str]]:
    """Split a conversation into its turns and its texts.

    Turns keep white space around texts, which templates trim or keep, and the reasoning tags of answers, which templates
    move or remove.

    Raises:
        DataError: a message without text and tool calls.
    """
    turns: list[Turn] = []
    contents: list[str] = []
    for message in messages:
        extras = {
            name: value for name, value in message.items() if name not in ("role", "content", "reasoning_content")
        }
        reasoning = _take_texts(message.get("reasoning_content", ""), False, contents)
        content = message["content"]
        form = _take_texts(content, message["role"] == "assistant" and "</think>" in content, contents)
        if HOLE not in form and "tool_calls" not in extras:
            raise DataError(f"message {len(turns) + 1} ({message['role']}) is empty")
        if "tool_calls" in extras:
            contents += [call["function"]["name"] for call in extras["tool_calls"]]
            extras["tool_calls"] = [
                {**call, "function": {**call["function"], "name": HOLE}} for call in extras["tool_calls"]
            ]
        turns.append(Turn(message["role"], form, reasoning, json.dumps(extras, ensure_ascii=False)))
    return tuple(turns), contents


def _take_texts(content: str, has_tags: bool, contents: list[str]) -> str:
    """Return a content with HOLE in the place of its texts, which are added to the list."""
    form = ""
    for part in REASONING_TAG.split(content) if has_tags else [content]:
        text = part.strip()
        if text and not (has_tags and REASONING_TAG.fullmatch(text)):
            contents.append(text)
            form += part.replace(text, HOLE, 1)
        else:
            form += part
    return form


def sentinel_messages(turns: Sequence[Turn]) -> tuple[list[Message], list[Slot]]:
    """Return messages of the turns with sentinels as texts, and the slot of each sentinel."""
    messages: list[Message] = []
    slots: list[Slot] = []

    def fill(form: str, owner: int, required: bool) -> str:
        while HOLE in form:
            # of an answer with reasoning tags, only the last text is sure to stay
            slots.append(Slot(owner, required and form.count(HOLE) == 1))
            form = form.replace(HOLE, f"zq{len(slots) - 1}slotqz", 1)
        return form

    for owner, turn in enumerate(turns):
        message: Message = {"role": turn.role}
        if turn.reasoning:
            # templates leave the reasoning of earlier turns out
            message["reasoning_content"] = fill(turn.reasoning, owner, owner == len(turns) - 1)
        message["content"] = fill(turn.content, owner, True)
        extras = json.loads(turn.extras)
        for call in extras.get("tool_calls", ()):
            call["function"]["name"] = fill(call["function"]["name"], owner, True)
        messages.append({**message, **extras})
    return messages, slots


def check_slots(found: Sequence[int], slots: Sequence[Slot], turns: Sequence[Turn]) -> None:
    """Raise DataError if a text that must be there was not rendered exactly once."""
    for number, slot in enumerate(slots):
        if slot.required and found.count(number) != 1:
            part = "the reasoning of" if turns[slot.owner].reasoning and number not in found else "or repeats"
            raise DataError(f"the chat template leaves out {part} message {slot.owner + 1} ({turns[slot.owner].role})")

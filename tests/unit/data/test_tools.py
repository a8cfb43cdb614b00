"""Tools and reasoning in conversations: rows in several forms, and what must be learned of them per template family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fsdp_qlora.data.chats import RowError, check_conversation, tools_of, turns_of
from fsdp_qlora.data.formats import load_rows
from fsdp_qlora.data.report import DataReport
from fsdp_qlora.data.templates import ChatRenderer, use_template
from fsdp_qlora.data.tokenize import Encoder, Example
from fsdp_qlora.errors import DataError
from tests.unit.data.families import FAMILIES, tiny_tokenizer
from tests.unit.data.test_templates import check_marked

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "What is 1+1, and 2+2?"},
    {"role": "assistant", "content": "", "tool_calls": [call("add", a=1, b=1), call("add", a=2, b=2)]},
    {"role": "tool", "content": "2"},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "2 and 4."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "One more:", "tool_calls": [call("add", a=0, b="x y")]},
]

TEMPLATES = {
    # in the manner of Qwen: markup of added tokens, results as a user's turn
    "chatml": (
        "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}<tool_call>\n"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_start|>system\n" + json.dumps(TOOL) + "\n<|im_end|>\n<|im_start|>user\nWhat is 1+1, and 2+2?<|im_end|>\n"
        '<|im_start|>assistant\n«<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n2<|im_end|>\n<|im_start|>user\n4<|im_end|>\n<|im_start|>assistant\n«2 and 4.<|im_end|>»\n"
        "<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n«One more:\n<tool_call>\n"
        '{"name": "add", "arguments": {"a": 0, "b": "x y"}}\n</tool_call><|im_end|>»\n',
    ),
    # in the manner of Llama 3.1: the call is the turn, with a role of its own for results
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
        '{% for c in m.tool_calls or [] %}{"name": "{{ c.function.name }}", "parameters": '
        "{{ c.function.arguments | tojson }}}{% endfor %}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat is 1+1, and 2+2?<|eot_id|>"
        '<|start_header_id|>assistant<|end_header_id|>\n\n«{"name": "add", "parameters": {"a": 1, "b": 1}}'
        '{"name": "add", "parameters": {"a": 2, "b": 2}}<|eot_id|>»'
        "<|start_header_id|>ipython<|end_header_id|>\n\n2<|eot_id|><|start_header_id|>ipython<|end_header_id|>\n\n4<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«2 and 4.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nThanks<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '«One more:{"name": "add", "parameters": {"a": 0, "b": "x y"}}<|eot_id|>»',
    ),
    # in the manner of Mistral: no header before an answer
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
        "{% else %}{% if m.content %} {{ m.content }}{% endif %}{% if m.tool_calls %}[TOOL_CALLS] ["
        '{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
        "{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}</s>{% endif %}{% endfor %}",
        '<s>[INST] What is 1+1, and 2+2?[/INST]«[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 1}}, '
        '{"name": "add", "arguments": {"a": 2, "b": 2}}]</s>»[TOOL_RESULTS] 2[/TOOL_RESULTS]'
        "[TOOL_RESULTS] 4[/TOOL_RESULTS] «2 and 4.</s>»[INST] Thanks[/INST]« One more:[TOOL_CALLS] ["
        '{"name": "add", "arguments": {"a": 0, "b": "x y"}}]</s>»',
    ),
}
"""Template with tools and hand-made expectation by family; targets stand between « and »."""


def with_template(family: str, template: str) -> PreTrainedTokenizerBase:
    plain, spec = tiny_tokenizer(family), FAMILIES[family]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        bos_token=spec.bos,
        eos_token=spec.eos,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def encode(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None = None
) -> Example:
    renderer = ChatRenderer(tokenizer)
    (example,) = Encoder(tokenizer, renderer.control_tokens).encode([renderer.render(messages, tools or [])])
    assert isinstance(example, Example), example
    return example


@pytest.mark.parametrize("family", TEMPLATES)
def test_calls_are_targets_and_results_are_not(family: str) -> None:
    template, expected = TEMPLATES[family]
    tokenizer = with_template(family, template)
    check_marked(tokenizer, encode(tokenizer, MESSAGES, [TOOL]), expected)


def test_real_qwen3_with_tools_and_reasoning(qwen3: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is 1+1?"},
        {"role": "assistant", "content": "", "reasoning_content": "I add.", "tool_calls": [call("add", a=1, b=1)]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2.", "reasoning_content": "It says 2."},
    ]
    example = encode(qwen3, messages, [TOOL])
    expected = (
        '«<think>\nI add.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 1}}\n</tool_call><|im_end|>»'
        "\n<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "«<think>\nIt says 2.\n</think>\n\n2.<|im_end|>»\n"
    )
    whole = qwen3.apply_chat_template(messages, tools=[TOOL], tokenize=False)
    plain = expected.replace("«", "").replace("»", "")
    assert whole.endswith(plain)
    check_marked(qwen3, example, whole.removesuffix(plain) + expected)


def test_reasoning_of_earlier_turns_may_go_that_of_the_last_must_not(qwen3: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "A", "reasoning_content": "one"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "B", "reasoning_content": "two"},
    ]
    text = qwen3.decode(encode(qwen3, messages).input_ids)
    assert "<think>\ntwo\n</think>\n\nB" in text
    assert "one" not in text
    with pytest.raises(DataError, match=r"leaves out the reasoning of message 2 \(assistant\)"):
        encode(tiny_tokenizer("chatml"), messages[:2])


def test_control_tokens_in_calls_are_refused() -> None:
    tokenizer = with_template("chatml", TEMPLATES["chatml"][0])
    attack = [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [call("add", a="<|im_end|>")]}]
    with pytest.raises(DataError, match=r"a call of one, holds the control token <\|im_end\|>"):
        encode(tokenizer, attack)
    with pytest.raises(DataError, match="holds the control token"):
        encode(tokenizer, [MESSAGES[0], {"role": "assistant", "content": "x"}], [{"name": "<|im_start|>"}])


def test_control_tokens_in_results_and_names_are_text() -> None:
    tokenizer = with_template("chatml", TEMPLATES["chatml"][0])
    messages = [*MESSAGES[:2], {"role": "tool", "content": "<|im_end|>"}, MESSAGES[4]]
    ends = [
        encode(tokenizer, turns).input_ids.count(tokenizer.eos_token_id)
        for turns in (messages, [*MESSAGES[:3], MESSAGES[4]])
    ]
    assert ends[0] == ends[1]


def test_templates_without_calls_are_refused() -> None:
    with pytest.raises(DataError, match=r"leaves out or repeats message 2 \(assistant\)"):
        encode(tiny_tokenizer("chatml"), MESSAGES[:5])


def test_the_same_conversation_in_every_form(tmp_path: Path) -> None:
    """Calls as objects or JSON, flat or under 'function'; sharegpt's function_call and observation; nulls of Parquet."""
    flat = [
        {"name": "add", "arguments": '{"a": 1, "b": 1}'},
        {"function": call("add", a=2, b=2)["function"], "id": None},
    ]
    called = [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": flat}, *MESSAGES[2:]]
    padded = [{"tool_calls": None, "reasoning": None, **message} for message in MESSAGES]
    rows = [
        {"messages": MESSAGES, "tools": [TOOL]},
        {"messages": called, "tools": json.dumps([TOOL])},
        {"messages": padded, "tools": [TOOL | {"x": None}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, *others = load_rows(str(path), "auto", DataReport())
    assert list(first.messages) == MESSAGES
    assert first.tools == (TOOL,)
    assert [(row.messages, row.tools) for row in others] == [(first.messages, first.tools)] * 2


def test_sharegpt_with_tools() -> None:
    calls = [{"name": "add", "arguments": {"a": 1}}]
    columns: dict[str, Any] = {
        "conversations": [
            {"from": "human", "value": "1+1?"},
            {"from": "function_call", "value": json.dumps(calls[0])},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "2"},
        ],
        "tools": json.dumps([TOOL]),
    }
    messages = turns_of(columns, "conversations", "from", "value")
    check_conversation(messages)
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [call("add", a=1)]}
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert tools_of(columns) == (TOOL,)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([MESSAGES[0], MESSAGES[1], MESSAGES[4]], "message 3 is from assistant, expected tool"),
        ([MESSAGES[0], MESSAGES[2], MESSAGES[4]], "message 2 is from tool, expected assistant"),
        (MESSAGES[:4], "the last message is from tool, expected assistant"),
        (
            [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [{"name": ""}]}],
            "a tool call needs a 'name'",
        ),
        ([MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": "x"}], "'tool_calls' is not JSON"),
        (
            [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "a", "arguments": "[1]"}]}],
            "must be an object",
        ),
    ],
)
def test_malformed_calls(tmp_path: Path, messages: list[dict[str, Any]], reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match=reason):
        load_rows(str(path), "auto", DataReport())


def test_tools_must_be_objects() -> None:
    with pytest.raises(RowError, match="'tools' must be a list of objects, found a string"):
        tools_of({"tools": '"add"'})


def test_a_template_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}")
    tokenizer = with_template("chatml", "")
    use_template(tokenizer, str(path))
    check_marked(
        tokenizer,
        encode(tokenizer, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]),
        "[user]q<|im_end|>[assistant]«a<|im_end|>»",
    )
    with pytest.raises(DataError, match="cannot be read"):
        use_template(tokenizer, str(tmp_path / "none.jinja"))

"""Tiny tokenizers with a chat template in the style of each common family, and what must be learned from a conversation.

Targets stand between « and » in `expected`, which is written by hand from the family's documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "It is 2."},
]

CORPUS = [message["content"] for message in CONVERSATION] * 3 + ["the user asked the model and the assistant answered"]


@dataclass(frozen=True)
class Family:
    special: tuple[str, ...]
    template: str
    expected: str
    eos: str
    bos: str | None = None
    rstrip: bool = False  # special tokens swallow the white space after them, as in Phi-3
    appended: str = ""  # written by us, not by the template


FAMILIES = {
    "chatml": Family(
        special=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        eos="<|im_end|>",
        template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        expected="<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\n«Hello!<|im_end|>»\n<|im_start|>user\nWhat is 1+1?<|im_end|>\n"
        "<|im_start|>assistant\n«It is 2.<|im_end|>»\n",
    ),
    "llama2": Family(
        special=("<unk>", "<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        template="{% set state = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set state.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
        "{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ state.system }}{{ m.content | trim }} [/INST]"
        "{% set state.system = '' %}{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
        expected="<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi there [/INST]« Hello! </s>»"
        "<s>[INST] What is 1+1? [/INST]« It is 2. </s>»",
    ),
    "llama3": Family(
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        # like the first published version: the header of the next answer is always there
        template="{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n",
        expected="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello!<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 1+1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«It is 2.<|eot_id|>»",
    ),
    "mistral": Family(
        special=("<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        # the system message goes into the last question
        template="{% set state = namespace(system='') %}{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set state.system = m.content + '\n\n' %}"
        "{% elif m.role == 'user' %}[INST] {% if loop.index0 >= messages | length - 2 %}{{ state.system }}{% endif %}"
        "{{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        expected="<s>[INST] Hi there[/INST]« Hello!</s>»[INST] Be kind.\n\nWhat is 1+1?[/INST]« It is 2.</s>»",
    ),
    "gemma": Family(
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        template="{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        expected="<bos><start_of_turn>user\nBe kind.\n\nHi there<end_of_turn>\n"
        "<start_of_turn>model\n«Hello!<end_of_turn>»\n<start_of_turn>user\nWhat is 1+1?<end_of_turn>\n"
        "<start_of_turn>model\n«It is 2.<end_of_turn>»\n",
    ),
    "phi3": Family(
        special=("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        rstrip=True,
        # leaves a system message out without a word
        template="{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        expected="<|user|>\nBe kind.\n\nHi there<|end|>\n<|assistant|>\n«Hello!<|end|>»\n"
        "<|user|>\nWhat is 1+1?<|end|>\n<|assistant|>\n«It is 2.<|end|>»\n",
    ),
    "qwen3": Family(
        special=("<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        # reasoning is dropped from all turns but the last, which gets an empty block if it has none
        template="{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% set text = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.last %}<think>\n"
        "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' }}"
        "\n</think>\n\n{% endif %}{{ text }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        expected="<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\n«Hello!<|im_end|>»\n<|im_start|>user\nWhat is 1+1?<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\nIt is 2.<|im_end|>»\n",
    ),
    "no end of turn": Family(
        special=("<|eos|>",),
        eos="<|eos|>",
        # plain words as headers, nothing after an answer
        template="{% for m in messages %}### {{ m.role }}\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant\n{% endif %}",
        expected="### system\nBe kind.\n### user\nHi there\n### assistant\n«Hello!»\n"
        "### user\nWhat is 1+1?\n### assistant\n«It is 2.",
        appended="<|eos|>»",
    ),
}


@lru_cache
def tiny_tokenizer(family: str | None, *, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with a family's special tokens and chat template; None: no template.

    add_bos makes tokenizer(text) put the bos token in front, as many do although their template writes it too.
    """
    spec = FAMILIES[family] if family else Family(("<s>", "</s>"), "", "", bos="<s>", eos="</s>")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [
        tokenizers.AddedToken(token, special=True, normalized=False, rstrip=spec.rstrip) for token in spec.special
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    if family == "qwen3":
        backend.add_tokens(
            [tokenizers.AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")]
        )
    if add_bos:
        assert spec.bos is not None
        backend.post_processor = processors.TemplateProcessing(
            f"{spec.bos} $A", special_tokens=[(spec.bos, backend.token_to_id(spec.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=spec.bos, eos_token=spec.eos, clean_up_tokenization_spaces=False
    )
    if family:
        tokenizer.chat_template = spec.template
    return tokenizer

"""Encoding of plain documents, and tokenizers that make plain text of control tokens hard."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fsdp_qlora.data.templates import Document, Piece, special_tokens
from fsdp_qlora.data.tokenize import IGNORE, Encoder, Example
from fsdp_qlora.errors import DataError
from tests.unit.data.families import tiny_tokenizer


def text(content: str) -> Document:
    return Document((Piece(content, True, True),), add_special_tokens=True, append_eos=True)


def completion(prompt: str, answer: str) -> Document:
    return Document((Piece(prompt, False, False), Piece(answer, False, True)), add_special_tokens=True, append_eos=True)


def encode(tokenizer: PreTrainedTokenizerBase, document: Document, **settings: bool) -> Example:
    (example,) = Encoder(tokenizer, special_tokens(tokenizer), **settings).encode([document])
    assert isinstance(example, Example), example
    return example


@pytest.mark.parametrize("add_bos", [False, True])
def test_text_is_all_targets_and_ends_with_eos(add_bos: bool) -> None:
    tokenizer = tiny_tokenizer("llama2", add_bos=add_bos)
    example = encode(tokenizer, text("Hi there"))
    assert example.input_ids == [*tokenizer("Hi there")["input_ids"], tokenizer.eos_token_id]
    assert example.labels == example.input_ids


@pytest.mark.parametrize("add_bos", [False, True])
def test_text_that_brings_bos_and_eos_gets_no_second_ones(add_bos: bool) -> None:
    tokenizer = tiny_tokenizer("llama2", add_bos=add_bos)
    example = encode(tokenizer, text("<s>[INST] Hi [/INST] Hello </s>"))
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.input_ids.count(tokenizer.eos_token_id) == 1
    assert example.input_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("add_bos", [False, True])
def test_completion_learns_the_answer_and_eos(add_bos: bool) -> None:
    tokenizer = tiny_tokenizer("llama2", add_bos=add_bos)
    example = encode(tokenizer, completion("What is 1+1?\n", "It is </s> 2."))
    answer = tokenizer("It is </s> 2.", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert example.labels[-len(answer) - 1 :] == [*answer, tokenizer.eos_token_id]
    assert set(example.labels[: -len(answer) - 1]) == {IGNORE}
    assert (example.input_ids[0] == tokenizer.bos_token_id) == add_bos
    everything = encode(tokenizer, completion("What is 1+1?\n", "It is </s> 2."), train_on="all")
    assert everything.labels == everything.input_ids == example.input_ids


def test_a_token_across_the_edge_is_a_target() -> None:
    tokenizer = tiny_tokenizer("llama2")
    example = encode(tokenizer, completion("the us", "er"))
    assert tokenizer.decode([i for i in example.labels if i != IGNORE]) in (" user</s>", "user</s>")


def test_spaces_that_the_offsets_leave_out_are_targets() -> None:
    """Byte-level tokenizers like GPT-2's trim spaces from the spans that they report."""
    backend = tokenizers.Tokenizer.from_str(tiny_tokenizer("llama2").backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer("a  ", return_offsets_mapping=True)["offset_mapping"][-1] == (3, 3)
    example = encode(tokenizer, completion("What?  ", "x y  "))
    assert tokenizer.decode([i for i in example.labels if i != IGNORE]) == "x y  </s>"


def test_real_llama2_completion(llama2: PreTrainedTokenizerBase) -> None:
    example = encode(llama2, completion("Q: 1+1?\nA:", " 2 </s> "))
    assert example.input_ids[0] == llama2.bos_token_id
    assert [i for i in example.input_ids if i in (1, 2)] == [1, 2]
    assert llama2.decode([i for i in example.labels if i != IGNORE]).split() == ["2", "</s>", "</s>"]


def test_order_of_mixed_documents_is_kept() -> None:
    tokenizer = tiny_tokenizer("llama2", add_bos=True)
    plain = Document((Piece("Hello!", True, True),), add_special_tokens=False, append_eos=False)
    encoder = Encoder(tokenizer, special_tokens(tokenizer))
    lengths = [len(example.input_ids) for example in encoder.encode([text("Hello!"), plain, text("Hello!")])]
    assert lengths == [lengths[1] + 2, lengths[1], lengths[1] + 2]


def test_unigram_piece_equal_to_a_control_token() -> None:
    """The likeliest cut of the text "</s>" is the control token itself, unless it is renamed in the vocabulary too."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in "</s>abc ")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    assert tokenizer("a</s>", split_special_tokens=True)["input_ids"][-1] == tokenizer.eos_token_id  # the trap
    example = encode(tokenizer, completion("a", "b</s>c"))
    assert example.input_ids.count(tokenizer.eos_token_id) == 1
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_bpe_merges_that_form_a_control_token() -> None:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator(["a </s>", "b </s>", "c </s>"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert tokenizer("</s>", split_special_tokens=True)["input_ids"] == [tokenizer.eos_token_id]  # the trap
    example = encode(tokenizer, completion("a", "b </s> c"))
    assert example.input_ids.count(tokenizer.eos_token_id) == 1


def test_unknown_characters_are_no_control_tokens() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert encode(tokenizer, completion("a", " z a")).input_ids == [2, 0, 2, 1]


def test_no_eos_token() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer("chatml").backend_tokenizer)
    with pytest.raises(DataError, match="has no eos token"):
        Encoder(tokenizer, set())

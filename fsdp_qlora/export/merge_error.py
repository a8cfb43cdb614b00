"""How far a merged model's logits are from those of base + adapter, computed with one matrix in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.export.merged_weights import Lora
from fsdp_qlora.models.skeleton import Skeleton
from fsdp_qlora.quant.expert_lora import EXPERT_PARAMETERS
from fsdp_qlora.weights.reader import Reader

PROMPTS = (
    "The capital of France is Paris, and the capital of Germany is Berlin. The capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "What is 17 * 6? 17 * 6 = 102, because 10 * 6 = 60 and 7 * 6 = 42, and 60 + 42 = 102.",
    "Dear Sir or Madam, thank you for your letter of 3 May. I am sorry to hear that the lamp arrived broken;",
)

VOCABULARY_ROWS = 1 << 14
"""Rows of the head that are multiplied at a time."""

TOKENS = 16
"""Tokens whose logits are compared at a time."""


@dataclass(frozen=True)
class Variant:
    """A way to compute the model.

    Attributes:
        title: for the table.
        matrix: returns a linear layer's weight [out, in] in float32 by its name ('....weight').
        reader: has every other tensor, by the model's names.
        lora: returns the update that is added beside a weight, or None where there is none; None if there are no updates.
        dtype: what other tensors are rounded to.
        replaced: returns elements of embedding or head, by the tensor's name, where they are not the reader's; they count
            as updates where there are updates.
    """

    title: str
    matrix: Callable[[str], Tensor]
    reader: Reader
    lora: Callable[[str], Lora | None] | None = None
    dtype: torch.dtype = torch.float32
    replaced: Mapping[str, Callable[[int, int], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class LogitError:
    """Distance of logits from the reference, over all tokens.

    Attributes:
        mean, largest: absolute difference.
        divergence: mean Kullback-Leibler divergence of the next token's distribution from the reference's, in nats.
        agreement: share of tokens for which the most likely next token is the same.
    """

    mean: float
    largest: float
    divergence: float
    agreement: float


def tokenize(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return the prompts' tokens [prompts, length], padded at the end, and which of them count."""
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    counts = torch.tensor([[position < len(row) for position in range(longest)] for row in rows])
    return tokens, counts


@torch.no_grad()
def logits(
    skeleton: Skeleton, variant: Variant, tokens: Tensor, counts: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the logits of the tokens that count, float32 [count, vocab] on the CPU: with the updates, and without.

    Both at once, because making the matrices takes longest; the same twice if the variant has no updates. The padding needs
    no mask: it comes after the tokens, which see only what precedes them.
    """
    both = tokens if variant.lora is None else tokens.repeat(2, 1)
    with _streamed(skeleton, variant, device):
        states = skeleton.decoder(input_ids=both.to(device), use_cache=False).last_hidden_state
    hidden = torch.cat([half[counts.to(device)] for half in states.split(len(tokens))])
    name = "model.embed_tokens.weight" if skeleton.tied else "lm_head.weight"
    rows, width = variant.reader.entry(name).shape
    count = int(counts.sum())
    result = torch.empty(len(hidden), rows)
    for start in range(0, rows, VOCABULARY_ROWS):
        stop = min(start + VOCABULARY_ROWS, rows)
        weight = _rounded(variant, variant.reader.read(name, start * width, stop * width)).view(-1, width)
        result[:, start:stop] = F.linear(hidden, weight.to(device))
        if name in variant.replaced:
            weight = _rounded(variant, variant.replaced[name](start * width, stop * width)).view(-1, width)
            result[:count, start:stop] = F.linear(hidden[:count], weight.to(device))
    result *= skeleton.logit_scale
    if skeleton.logit_softcap is not None:
        result.div_(skeleton.logit_softcap).tanh_().mul_(skeleton.logit_softcap)
    return result[:count], result[-count:]


def _rounded(variant: Variant, values: Tensor) -> Tensor:
    return values.to(variant.dtype).float()


@contextmanager
def _streamed(skeleton: Skeleton, variant: Variant, device: torch.device) -> Iterator[None]:
    """Give each layer of the decoder its weights just before it computes, and take them away afterwards."""
    handles = []
    for name, module in skeleton.model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if module is skeleton.embedding:
            handles.append(module.register_forward_pre_hook(_rows_of(f"{name}.weight", variant, device)))
            handles.append(module.register_forward_hook(_taker(own)))
        elif own and name.startswith("model."):
            handles.append(module.register_forward_pre_hook(_giver(name, own, variant, device)))
            if isinstance(module, nn.Linear) and variant.lora is not None:
                handles.append(module.register_forward_hook(_adder(f"{name}.weight", variant.lora)))
            elif variant.lora is not None and _is_experts(own):
                handles.append(module.register_forward_hook(_expert_adder(name, variant.lora)))
            handles.append(module.register_forward_hook(_taker(own)))
    buffers = [(module, dict(module.named_buffers(recurse=False))) for module in skeleton.model.modules()]
    try:
        for module, values in buffers:
            for name, value in values.items():
                setattr(module, name, value.to(device))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _giver(name: str, own: dict[str, nn.Parameter], variant: Variant, device: torch.device) -> Callable[..., None]:
    def give(module: nn.Module, arguments: Any) -> None:
        for key, parameter in own.items():
            full = f"{name}.{key}"
            if isinstance(module, nn.Linear) and key == "weight":
                value = variant.matrix(full)
            elif parameter.dim() == 3:
                value = _stack(name, key, len(parameter), variant)
            else:
                value = _rounded(variant, variant.reader.read(full)).view(parameter.shape)
            setattr(module, key, nn.Parameter(value.to(device), requires_grad=False))

    return give


def _is_experts(own: Mapping[str, nn.Parameter]) -> bool:
    return all(key in own and own[key].dim() == 3 for key in EXPERT_PARAMETERS)


def _matrices(name: str, key: str, expert: int) -> list[str]:
    """Return the names of the matrices that one expert has in a parameter, in their order of rows."""
    parts = ("gate_proj", "up_proj") if key == "gate_up_proj" else (key,)
    return [f"{name}.{expert}.{part}.weight" for part in parts]


def _stack(name: str, key: str, num_experts: int, variant: Variant) -> Tensor:
    """Return the experts' matrices as transformers stacks them, [experts, out, in]."""
    return torch.stack(
        [
            torch.cat([variant.matrix(matrix) for matrix in _matrices(name, key, expert)])
            for expert in range(num_experts)
        ]
    )


def _taker(own: dict[str, nn.Parameter]) -> Callable[..., None]:
    def take(module: nn.Module, arguments: Any, output: Any) -> None:
        for key, parameter in own.items():
            setattr(module, key, parameter)

    return take


def _adder(name: str, update: Callable[[str], Lora | None]) -> Callable[..., None]:
    """Add the update to the first half of the batch."""

    def add(module: nn.Linear, arguments: tuple[Tensor], output: Tensor) -> None:
        lora = update(name)
        if lora is not None:
            half = len(output) // 2
            output[:half] += lora.scaling * (arguments[0][:half] @ lora.A.t()) @ lora.B.t()
            factors = lora.factors(torch.addmm(module.weight, lora.B, lora.A, alpha=lora.scaling))
            if factors is not None:
                output[:half] *= factors
                if module.bias is not None:
                    output[:half] += module.bias * (1 - factors)

    return add


def _expert_adder(name: str, update: Callable[[str], Lora | None]) -> Callable[..., None]:
    """Compute the first half of the batch again, with the updates added to the experts' matrices."""

    def add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        for key in EXPERT_PARAMETERS:
            for expert, matrix in enumerate(getattr(module, key)):
                rows = matrix.chunk(len(_matrices(name, key, expert)))
                for part, own in zip(rows, _matrices(name, key, expert), strict=True):
                    lora = update(own)
                    if lora is not None:
                        lora.add_to(part)
        half = len(output) // 2
        output[:half] = module.forward(*(argument[:half] for argument in arguments))

    return add


def _rows_of(name: str, variant: Variant, device: torch.device) -> Callable[..., tuple[Tensor]]:
    """Give the embedding only the rows that are looked up, under new numbers."""

    def give(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        used, numbers = torch.unique(arguments[0], return_inverse=True)
        width = variant.reader.entry(name).shape[1]
        spans = [(row * width, (row + 1) * width) for row in used.tolist()]
        rows = [_rounded(variant, variant.reader.read(name, *span)) for span in spans]
        if name in variant.replaced:  # a second table, for the first half of the batch
            rows += [_rounded(variant, variant.replaced[name](*span)) for span in spans]
            half = len(numbers) // 2 if variant.lora is not None else len(numbers)
            numbers[:half] += len(used)
        module.weight = nn.Parameter(torch.stack(rows).to(device), requires_grad=False)
        module.padding_idx = None  # type: ignore[assignment]
        return (numbers,)

    return give


def compare(reference: Tensor, found: Tensor) -> LogitError:
    """Return how far logits [tokens, vocab] are from the reference; a few tokens at a time, for large vocabularies."""
    total = largest = divergence = agreement = 0.0
    for expected, actual in zip(torch.split(reference, TOKENS), torch.split(found, TOKENS), strict=True):
        difference = (actual - expected).abs()
        total += difference.sum().item()
        largest = max(largest, difference.max().item())
        wanted, given = F.log_softmax(expected, dim=-1), F.log_softmax(actual, dim=-1)
        divergence += F.kl_div(given, wanted, log_target=True, reduction="sum").item()
        agreement += (actual.argmax(dim=-1) == expected.argmax(dim=-1)).sum().item()
    count = len(reference)
    return LogitError(total / reference.numel(), largest, divergence / count, agreement / count)


def table(errors: Sequence[tuple[str, LogitError]]) -> list[str]:
    """Return the errors as lines of a table."""
    width = max(len(title) for title, _ in errors)
    lines = [f"{'':<{width}}  mean error  largest  divergence  same token"]
    for title, error in errors:
        lines.append(
            f"{title:<{width}}  {error.mean:10.2e}  {error.largest:7.1e}  {error.divergence:10.2e}  {error.agreement:10.1%}"
        )
    return lines

"""Which layers get LoRA, of which rank and scale: PEFT's LoraConfig and its rules for names. Without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fsdp_qlora.errors import ModelError

ALL_LINEAR = "all-linear"

EXPERTS = "experts"
"""As target_parameters: the matrices of all experts."""

VOCABULARY = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
"""What modules_to_save may hold, with the names in transformers' model."""

_NAMES = re.compile(r"\s*[\w.-]+\s*(,\s*[\w.-]+\s*)*")
_LAYERS = re.compile(r"\s*\d+(-\d+)?\s*(,\s*\d+(-\d+)?\s*)*")
_PAIRS = re.compile(r"\s*(?P<pattern>\S+?)\s*=\s*(?P<value>\d+(?:\.\d+)?)\s*(?:,|$)")


@dataclass(frozen=True)
class LoraSettings:
    """LoRA as PEFT's LoraConfig names it.

    Attributes:
        rank, alpha: of every layer that no pattern matches.
        target_modules: 'all-linear'; or names, or the ends of names behind a dot, separated by commas; or a regular
            expression for the whole names (model.layers.0.self_attn.q_proj).
        init: initial values of lora_A, see `initial_lora_A` in linear.py.
        use_rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
        use_dora: also train the lengths of the rows of the matrices, see linear.py.
        layers: the decoder blocks that get LoRA, counted from 0; None for all.
        rank_pattern, alpha_pattern: pairs of a pattern and a value; the first pattern that matches a layer's name, or the
            end of it behind a dot, decides.
        modules_to_save: of VOCABULARY, what is trained whole beside LoRA.
        target_parameters: parameters of experts that get LoRA: EXPERTS, or names such as mlp.experts.down_proj, or the
            ends of names behind a dot.
        ensure_weight_tying: whether a head that is the embedding stays so when it is trained; always, but for adapters
            that PEFT trained otherwise.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: str = ALL_LINEAR
    init: str = "default"
    use_rslora: bool = False
    use_dora: bool = False
    layers: tuple[int, ...] | None = None
    rank_pattern: tuple[tuple[str, float], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    modules_to_save: tuple[str, ...] = ()
    ensure_weight_tying: bool = True
    target_parameters: tuple[str, ...] = ()

    def rank_of(self, name: str) -> int:
        """Return the rank of a layer."""
        return int(pattern_value(self.rank_pattern, name, self.rank))

    def alpha_of(self, name: str) -> float:
        """Return the alpha of a layer."""
        return pattern_value(self.alpha_pattern, name, self.alpha)

    def scaling_of(self, name: str) -> float:
        """Return the factor of a layer's update B A."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)


def whole_modules(lora: LoraSettings | None, tied: bool) -> tuple[str, ...]:
    """Return the names in transformers' model of what is trained whole; a tied head is in the embedding's.

    Args:
        tied: whether the model's head is its embedding.

    Raises:
        ModelError: what PEFT would untie, so that the result would be no model of this kind.
    """
    if lora is None or not lora.modules_to_save:
        return ()
    if not tied:
        return tuple(VOCABULARY[name] for name in lora.modules_to_save)
    if "embed_tokens" not in lora.modules_to_save:
        raise ModelError(
            "modules_to_save lm_head: the head of this model is its embedding (tie_word_embeddings in config.json); use"
            " embed_tokens, which trains both as the one matrix they are"
        )
    if not lora.ensure_weight_tying:
        raise ModelError(
            "modules_to_save embed_tokens: the adapter has its own embedding beside the old head (PEFT without"
            " ensure_weight_tying), and this model has one matrix for both (tie_word_embeddings in config.json); train the"
            " adapter with ensure_weight_tying"
        )
    return (VOCABULARY["embed_tokens"],)


def parse_modules(text: str) -> tuple[str, ...]:
    """Return the modules that a text such as 'embed_tokens,lm_head' names; ValueError for others than VOCABULARY's."""
    names = {name.strip() for name in text.split(",")}
    if not names <= VOCABULARY.keys():
        raise ValueError(f"{text!r} names other modules than {', '.join(VOCABULARY)}")
    return tuple(sorted(names))


def parse_names(text: str) -> tuple[str, ...]:
    """Return the names that a text such as 'mlp.up_proj,q_proj' lists, sorted; ValueError for anything else."""
    if _NAMES.fullmatch(text) is None:
        raise ValueError(f"{text!r} is no list of names")
    return tuple(sorted({name.strip() for name in text.split(",")}))


def pattern_value(pairs: Sequence[tuple[str, float]], name: str, default: float) -> float:
    """Return the value of the first pattern that matches a layer's name as PEFT matches them."""
    return next((value for pattern, value in pairs if re.match(rf"(.*\.)?({pattern})$", name)), default)


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the numbers that a text such as '0-15,20' names, in order; ValueError for anything else."""
    if _LAYERS.fullmatch(text) is None:
        raise ValueError(f"{text!r} names no blocks")
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    if not numbers:
        raise ValueError(f"{text!r} names no blocks")
    return tuple(sorted(numbers))


def parse_patterns(text: str) -> tuple[tuple[str, float], ...]:
    """Return the pairs of a text such as 'q_proj=8,.*mlp.*=32'; ValueError for anything else."""
    pairs, position = [], 0
    while position < len(text):
        match = _PAIRS.match(text, position)
        if match is None or not is_regex(match["pattern"]):
            raise ValueError(f"{text!r} is no list of pattern=value")
        pairs.append((match["pattern"], float(match["value"])))
        position = match.end()
    return tuple(pairs)


def is_names(text: str) -> bool:
    """Return whether target modules are meant as a list of names: anything that only a regular expression has is absent."""
    return re.search(r"[^\w.,\s-]", text) is None


def is_targets(text: str) -> bool:
    """Return whether target modules are well written."""
    return _NAMES.fullmatch(text) is not None if is_names(text) else is_regex(text)


def is_regex(text: str) -> bool:
    """Return whether a text is a regular expression."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def block_of(name: str) -> int:
    """Return the number of the decoder block that a layer is in."""
    return int(name.removeprefix("model.layers.").partition(".")[0])


def adapted_layers(names: Sequence[str], lora: LoraSettings, experts: Sequence[str] = ()) -> set[str]:
    """Return which of the linear layers of the decoder blocks, and of the parameters of experts, get LoRA.

    Args:
        experts: names of the parameters of experts, such as model.layers.0.mlp.experts.down_proj.

    Raises:
        ModelError: a target, block or pattern that matches nothing, or a kind of LoRA that experts cannot have.
    """
    targets = _matching(names, lora.target_modules) | _adapted_experts(experts, lora)
    if lora.layers is not None:
        blocks = {block_of(name) for name in names}
        absent = sorted(set(lora.layers) - blocks)
        if absent:
            raise ModelError(
                f"layers_to_transform {absent[0]}: this model's blocks are 0 to {max(blocks)}; name some of them"
            )
        targets = {name for name in targets if block_of(name) in lora.layers}
    for setting, pairs in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern, value in pairs:
            if not any(pattern_value([(pattern, value)], name, 0) for name in targets):
                raise ModelError(
                    f"{setting} '{pattern}': matches no layer that gets LoRA; patterns are names such as q_proj or"
                    " regular expressions for whole names such as model.layers.0.self_attn.q_proj"
                )
    return targets


def _adapted_experts(names: Sequence[str], lora: LoraSettings) -> set[str]:
    """Return which parameters of experts get LoRA."""
    if not lora.target_parameters:
        return set()
    refusal = refused_with_experts(lora.dropout, lora.use_dora)
    if refusal is not None:
        raise ModelError(refusal)
    if not names:
        given = ",".join(lora.target_parameters)
        raise ModelError(f"lora_target_parameters '{given}': this model has no experts; leave it out")
    if lora.target_parameters == (EXPERTS,):
        return set(names)
    for target in lora.target_parameters:
        if not any(is_target_parameter(name, [target]) for name in names):
            available = ", ".join(dict.fromkeys(name.split(".", 3)[-1] for name in names))
            raise ModelError(f"lora_target_parameters '{target}': this model has {available}; or use {EXPERTS}")
    return {name for name in names if is_target_parameter(name, lora.target_parameters)}


def is_target_parameter(name: str, targets: Iterable[str]) -> bool:
    """Return whether one of PEFT's target_parameters means the parameter of this name."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def refused_with_experts(dropout: float, use_dora: bool) -> str | None:
    """Return why LoRA on experts cannot be of this kind, in the words of the settings; None if it can."""
    if dropout > 0:
        return f"--lora_dropout={dropout:g}: PEFT, for which the adapter is, has no dropout of LoRA on experts; set it to 0"
    if use_dora:
        return "--use_dora=true: PEFT, for which the adapter is, has no DoRA of experts; leave it or the experts out"
    return None


def _matching(names: Sequence[str], target_modules: str) -> set[str]:
    if target_modules in (ALL_LINEAR, ""):
        return set(names) if target_modules else set()
    if not is_names(target_modules):
        found = {name for name in names if re.fullmatch(target_modules, name)}
        if not found:
            raise ModelError(
                f"lora_target_modules '{target_modules}': the regular expression matches no linear layer; it must match"
                f" whole names such as {names[0]}"
            )
        return found
    wanted = {name.strip() for name in target_modules.split(",")}
    found, used = set(), set()
    for name in names:
        parts = name.split(".")
        ends = wanted.intersection(".".join(parts[start:]) for start in range(len(parts)))
        if ends:
            found.add(name)
            used |= ends
    if wanted - used:
        available = dict.fromkeys(name.rpartition(".")[2] for name in names)
        raise ModelError(
            f"lora_target_modules '{target_modules}': no linear layer is named {', '.join(sorted(wanted - used))};"
            f" this model has {', '.join(available)}, or use all-linear"
        )
    return found

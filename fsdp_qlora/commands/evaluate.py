"""The command `evaluate`: loss, token accuracy and exact answers of a trained adapter, or of its base alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fsdp_qlora import data
from fsdp_qlora.adapters import TrainedAdapter, open_adapter
from fsdp_qlora.build import BuiltModel, build_model, form_alone, load_tokenizer, tokenizer_folder
from fsdp_qlora.config import EvaluateConfig
from fsdp_qlora.data.formats import Row, load_rows
from fsdp_qlora.data.prompts import question_tokens
from fsdp_qlora.data.store import Mixture
from fsdp_qlora.data.templates import use_template
from fsdp_qlora.decode import generate, read_stop_ids
from fsdp_qlora.distributed import Ranks, agree_on_errors, compute_dtype, process_group
from fsdp_qlora.errors import ConfigError, DataError
from fsdp_qlora.evaluation import evaluate
from fsdp_qlora.files import write_file
from fsdp_qlora.models.hub import commit_of, resolve, resolve_config
from fsdp_qlora.models.skeleton import read_config
from fsdp_qlora.parallel import MemorySettings


@dataclass(frozen=True)
class Answer:
    """What the model said to a row's question, and what the row says."""

    question: str
    answer: str
    reference: str

    @property
    def is_exact(self) -> bool:
        return self.answer == self.reference


def run(config: EvaluateConfig) -> None:
    """Print the figures; the command line's `evaluate`."""
    with process_group("full", config.timeout_s, config.device) as ranks:
        figures, answers = score(config, ranks)
        with agree_on_errors(ranks, "writing the answers"):
            if ranks.is_main:
                if config.save_answers is not None:
                    save_answers(Path(config.save_answers), answers)
                for name, value in figures.items():
                    print(f"{name.replace('_', ' ')}: {value:.4f}")
                if answers:
                    num_exact = sum(answer.is_exact for answer in answers)
                    print(f"exact match: {num_exact / len(answers):.4f} ({num_exact} of {len(answers)})")


def score(config: EvaluateConfig, ranks: Ranks) -> tuple[dict[str, float], list[Answer]]:
    """Return the figures of evaluation.evaluate, and the answers if they are asked for.

    Raises:
        ModelError, WeightsError, CheckpointError: the base or the adapter cannot be read, or do not fit.
        DataError: a dataset or row that cannot be used.
    """
    with agree_on_errors(ranks, "reading adapter and data"):
        adapter = None
        if config.adapter is not None:
            adapter = open_adapter(Path(config.adapter), config.model, config.revision)
        name, revision = (adapter.base, adapter.revision) if adapter else (config.model or "", config.revision)
        base = resolve_config(name, revision, tokenizer=True)
        tokenizer = load_tokenizer(tokenizer_folder(adapter, base))
        use_template(tokenizer, config.chat_template)
        report = data.DataReport(bad_rows=config.bad_rows)
        rows = load_rows(config.dataset, config.dataset_format, report, seed=config.seed) if config.exact_match else []
        examples = data.load_store(config.dataset, config, tokenizer, report)
        if not len(examples):
            raise DataError(f"dataset {config.dataset}: no answer begins within --context_length; raise it")
        vocab_size = read_config(base)[0].vocab_size
        data.check_vocabulary(examples, vocab_size)
        base = resolve(name, commit_of(name, revision, base))  # only now: data that cannot be used costs no download
    built = _build(config, ranks, base, adapter)
    loader = data.make_loader(
        Mixture([examples]),
        config,
        tokenizer,
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulation=None,
        vocab_size=vocab_size,
    )
    figures = evaluate(built.root, {"": loader}, ranks)
    if not config.exact_match:
        return figures, []
    return figures, _answers(config, ranks, built, rows, tokenizer, base)


def save_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write one JSON object a line; ConfigError if the file cannot be written."""
    lines = [
        json.dumps({"question": one.question, "answer": one.answer, "reference": one.reference, "exact": one.is_exact})
        for one in answers
    ]
    try:
        write_file(path, "".join(line + "\n" for line in lines).encode())
    except OSError as error:
        raise ConfigError(f"--save_answers={path} cannot be written ({error.strerror}); choose another file") from error


def _build(config: EvaluateConfig, ranks: Ranks, base: Path, adapter: TrainedAdapter | None) -> BuiltModel:
    num_blocks = read_config(base)[0].num_hidden_layers
    return build_model(
        base,
        ranks,
        replace(adapter.quant if adapter else form_alone(base), num_shards=ranks.num_shards),
        adapter.lora if adapter else None,
        compute_dtype(config.precision, ranks.device),
        memory=MemorySettings(offload_blocks=min(config.offload_blocks, num_blocks)),
        adapter=adapter.matrices if adapter else None,
    )


def _answers(
    config: EvaluateConfig,
    ranks: Ranks,
    built: BuiltModel,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    base: Path,
) -> list[Answer]:
    with agree_on_errors(ranks, "preparing the questions"):
        questions = question_tokens(rows, tokenizer)
    found = generate(
        built.root,
        questions,
        ranks,
        max_new_tokens=config.max_new_tokens,
        stop_ids=read_stop_ids(base, tokenizer),
        batch_size=config.batch_size,
    )
    return [
        Answer(
            row.messages[-2]["content"],
            tokenizer.decode(ids, skip_special_tokens=True).strip(),
            row.messages[-1]["content"].strip(),
        )
        for row, ids in zip(rows, found, strict=True)
    ]

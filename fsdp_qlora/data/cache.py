"""Tokenised datasets on disk: made once by one process, mapped by all ranks of a machine, used again by later runs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from fsdp_qlora.announce import announced
from fsdp_qlora.config.data import RowSettings
from fsdp_qlora.data import hub
from fsdp_qlora.data.demo import INSTALL
from fsdp_qlora.data.formats import DEMO_DATASETS, rows_of
from fsdp_qlora.data.readers import READERS
from fsdp_qlora.data.report import DataReport
from fsdp_qlora.data.store import TokenStore, read_meta, write_store
from fsdp_qlora.data.tokenize_rows import tokenize_rows
from fsdp_qlora.errors import DataError
from fsdp_qlora.models.hub import cache_dir


def load_store(dataset: str, config: RowSettings, tokenizer: PreTrainedTokenizerBase, report: DataReport) -> TokenStore:
    """Return a dataset's examples, tokenised now or before, and add their counts to the report.

    Several processes may call this at once: one tokenises, the others wait for it.

    Raises:
        DataError: a dataset or row that cannot be used, or a cache folder that cannot be written.
    """
    if config.token_cache == "none":
        rows = rows_of(dataset, config, report)
        return TokenStore.from_examples(tokenize_rows(rows, tokenizer, config, report))
    root = cache_dir() / "tokens" if config.token_cache == "auto" else Path(config.token_cache).expanduser()
    folder = root / cache_key(dataset, config, tokenizer)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{folder.name}.lock"):
            if not folder.is_dir():
                _fill(folder, dataset, config, tokenizer)
    except OSError as error:
        raise DataError(
            f"--token_cache={root} cannot be used ({error}); choose another folder, or none to keep tokens in memory"
        ) from error
    try:
        report.add(DataReport.from_dict(read_meta(folder)["report"]))
        return TokenStore.open(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: damaged tokens ({error}); delete this folder, and they are made again") from error


def cache_key(dataset: str, config: RowSettings, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a name for all that decides the tokens: rows, settings, tokenizer, and the code that makes them."""
    content = {
        "dataset": [dataset, _content_of(dataset, config)],
        "settings": [
            config.dataset_format,
            config.train_on,
            config.bad_rows,
            config.context_length,
        ],
        "tokenizer": [
            tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(tokenizer),
            tokenizer.chat_template,
            tokenizer.special_tokens_map,
            sorted(tokenizer.init_kwargs.items(), key=str),
        ],
        "code": [
            *(importlib.metadata.version(package) for package in ("tokenizers", "transformers", "jinja2", "numpy")),
            *(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))),
        ],
    }
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:32]


def _content_of(dataset: str, config: RowSettings) -> str:
    """Return what changes whenever the rows of a dataset do."""
    if dataset in DEMO_DATASETS:
        return f"{config.seed} {INSTALL}"
    path = Path(dataset).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    name = hub.parse_name(dataset)
    if path.suffix.lower() in READERS or name is None:
        return "missing"  # reading it will say so
    return hub.fingerprint(dataset, name, config.hub_streaming)


def _fill(folder: Path, dataset: str, config: RowSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    report = DataReport(bad_rows=config.bad_rows)
    rows = announced(rows_of(dataset, config, report), lambda done: f"reading {dataset}: {done:,} rows")
    write_store(partial, tokenize_rows(rows, tokenizer, config, report), lambda: {"report": report.to_dict()})
    partial.rename(folder)

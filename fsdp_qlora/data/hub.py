"""Datasets of the Hugging Face hub: downloaded once into the hub's cache, or read as a stream and kept nowhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fsdp_qlora.errors import DataError

HUB_NAME = re.compile(
    r"(?P<repo>\w[\w.-]*(/\w[\w.-]*)?)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w. -]*))?(:(?P<split>\w[\w.-]*))?"
)


class HubName(NamedTuple):
    """What `owner/name@revision:config:split` names; all but the first part may be left out, and config be empty."""

    repo: str
    revision: str | None
    config: str | None
    split: str


def parse_name(dataset: str) -> HubName | None:
    """Return the parts of a hub dataset's name; None for what cannot be one."""
    match = HUB_NAME.fullmatch(dataset)
    if match is None:
        return None
    return HubName(match["repo"], match["revision"], match["config"] or None, match["split"] or "train")


def read_hub(dataset: str, name: HubName, streaming: bool) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield place (`dataset:row`) and columns of the rows of a split.

    Raises:
        DataError: it cannot be found or read; says why and what to do.
    """
    number = 0
    rows = iter(_load(dataset, name, streaming))
    while True:
        try:
            columns = next(rows)
        except StopIteration:
            return
        except _errors() as error:
            raise DataError(
                f"dataset {dataset}: cannot be read after row {number} ({_reason(error)}); run again, or download it"
                " and give the path of the file"
            ) from error
        number += 1
        yield f"{dataset}:{number}", columns


def fingerprint(dataset: str, name: HubName, streaming: bool) -> str:
    """Return what changes whenever the rows do: of a stream the commit, which is known without reading any.

    Raises:
        DataError: as `read_hub`.
    """
    if _streams(name, streaming):
        return str(_commit(dataset, name))
    return str(_load(dataset, name, streaming)._fingerprint)


def _streams(name: HubName, streaming: bool) -> bool:
    """Return whether the rows come as a stream; a folder of that name, which the library prefers, need not."""
    return streaming and not Path(name.repo).is_dir()


def _load(dataset: str, name: HubName, streaming: bool) -> Any:
    """Return the library's dataset; one that was downloaded before is found without a network too."""
    import datasets

    streaming, revision = _streams(name, streaming), name.revision
    if not Path(name.repo).is_dir():
        # asked here, as the library would take a cached dataset for a name or revision that does not exist
        try:
            revision = _commit(dataset, name)
        except _Unreachable:
            if streaming:
                raise
    try:
        return datasets.load_dataset(name.repo, name.config, split=name.split, revision=revision, streaming=streaming)
    except RuntimeError as error:
        raise DataError(
            f"dataset {dataset}: needs Python code of its own, which is never run ({_reason(error)}); look for a Parquet"
            " copy of it, or give the path of a file"
        ) from error
    except _errors() as error:
        wrong = _wrong_part(name) if isinstance(error, ValueError) else None
        raise (DataError(f"dataset {dataset}: {wrong}") if wrong else _failure(dataset, error)) from error


class _Unreachable(DataError):
    """The hub gives no answer; what was downloaded before may do."""


def _commit(dataset: str, name: HubName) -> str:
    """Return the commit that a name stands for now."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"{constants.ENDPOINT}/datasets/{name.repo}"
    try:
        HfApi().auth_check(name.repo, repo_type="dataset")
        return str(HfApi().dataset_info(name.repo, revision=name.revision).sha)
    except GatedRepoError as error:
        token = "the account of your HF_TOKEN has no access" if get_token() else "no HF_TOKEN is set"
        raise DataError(
            f"dataset {name.repo} is gated and {token}; accept its terms at {page}, then set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(
            f"dataset {name.repo} has no revision {name.revision}; see {page}/tree/main for its branches and tags"
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"dataset {name.repo} is neither a local file nor a dataset at {constants.ENDPOINT} that you may read; check"
            " the name, and set HF_TOKEN if it is private"
        ) from error
    except _errors() as error:
        raise _Unreachable(str(_failure(dataset, error))) from error


def _errors() -> tuple[type[Exception], ...]:
    """Return what the libraries raise for names, networks and files that are not as they should be."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    transport_error: type[Exception] = HfHubHTTPError.__mro__[1]  # HTTPError of the client library, which has changed
    return (OSError, ValueError, datasets.exceptions.DatasetsError, transport_error)


def _failure(dataset: str, error: Exception) -> DataError:
    return DataError(
        f"dataset {dataset}: cannot be loaded from the hub ({_reason(error)}); check the name, the network and HF_TOKEN,"
        " or download it and give the path of a .jsonl, .json, .csv or .parquet file"
    )


def _wrong_part(name: HubName) -> str | None:
    """Return what is wrong with the name's configuration or split, asking the hub which ones there are."""
    import datasets

    try:
        configs = datasets.get_dataset_config_names(name.repo, revision=name.revision)
        if name.config not in (None, *configs):
            return f"has no configuration {name.config!r}, but {', '.join(configs)}"
        if name.config is None and len(configs) > 1 and "default" not in configs:
            example = f"{name.repo}:{configs[0]}"
            return f"has several configurations; name one of {', '.join(configs)}, such as {example}"
        splits = datasets.get_dataset_split_names(name.repo, name.config, revision=name.revision)
    except _errors():
        return None
    if name.split in splits:
        return None
    example = f"{name.repo}:{name.config or ''}:{splits[0]}"
    return f"has no split {name.split!r}, but {', '.join(splits)}; name one as in {example}"


def _reason(error: BaseException) -> str:
    """Return an error's first line; the library's 'error occurred' says less than what caused it."""
    import datasets

    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""From the --model setting to a checked local folder: alias, folder, or download from the Hugging Face hub."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from fsdp_qlora.errors import FsdpQloraError, ModelError, WeightsError
from fsdp_qlora.models import smollm2
from fsdp_qlora.models.aliases import ALIASES
from fsdp_qlora.settings import suggest

TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_WEIGHT_FILES = ("*.safetensors",)
# Sub-folders (original/, metal/, onnx/) and consolidated files repeat the weights in other forms.
_DUPLICATES = ("*/*", "consolidated*")


def resolve(model: str, revision: str | None = None) -> Path:
    """Return a local folder with config.json, safetensors weights and tokenizer files for a --model value.

    A connection that breaks is taken up again where it broke, and finished files are kept for the next run. HF_HOME,
    HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are honoured. A local folder and the smollm2-135m alias never open a
    connection.

    Args:
        model: alias, local folder or hub id (owner/name).
        revision: branch, tag or commit of a hub model.

    Raises:
        ModelError: unknown name, no access, no network, or a model that asks for custom code.
        WeightsError: no safetensors weights, or the download cannot be stored.
    """
    folder = _local_folder(model, revision)
    if folder is not None:
        if model not in ALIASES:
            check_weights(folder)
        return folder
    repo = _repo(model)
    # The small files come first, so that a model that will be refused costs no download of its weights.
    snapshot = _download(repo, revision, TEXT_FILES)
    check_config(snapshot, name=repo)
    snapshot = _download(repo, snapshot.name, TEXT_FILES + _WEIGHT_FILES)
    check_weights(snapshot, name=repo)
    return snapshot


def resolve_config(model: str, revision: str | None = None, *, tokenizer: bool = False) -> Path:
    """Return a local folder with the config.json of a --model value; of a hub model no weights are fetched.

    Args:
        tokenizer: fetch the files of the tokenizer too.

    Raises:
        ModelError: as `resolve`; weights are not asked for.
    """
    folder = _local_folder(model, revision)
    if folder is not None:
        return folder
    snapshot = _download(_repo(model), revision, TEXT_FILES if tokenizer else ("config.json",))
    check_config(snapshot, name=model)
    return snapshot


def commit_of(model: str, revision: str | None, folder: Path) -> str | None:
    """Return the revision under which `resolve` finds the weights that go with the folder of `resolve_config`.

    A branch may move in between: of a hub model it is the commit, by which its folder is named.
    """
    return revision if _is_local(model) else folder.name


def _local_folder(model: str, revision: str | None) -> Path | None:
    """Return the folder of a model that needs no hub, with its config checked; None for hub models."""
    alias = ALIASES.get(model)
    if alias is not None and alias.repo is None:
        _refuse_revision(model, revision)
        return smollm2.ensure(cache_dir())
    folder = find_model(Path(model).expanduser())
    if alias is not None or not folder.is_dir():
        return None
    _refuse_revision(model, revision)
    check_config(folder)
    return folder


def find_model(folder: Path) -> Path:
    """Return the model's own folder where that of a run of full fine-tuning is given."""
    inner = folder / "model"
    return inner if (inner / "config.json").is_file() and not (folder / "config.json").exists() else folder


def _repo(model: str) -> str:
    """Return the hub id of an alias or hub id; ModelError for anything else."""
    alias = ALIASES.get(model)
    if alias is not None and alias.repo is not None:
        return alias.repo
    folder = Path(model).expanduser()
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise ModelError(_unknown(model, folder))
    return model


def download_cache(model: str) -> Path | None:
    """Return the folder that `resolve` fills with a --model value; None for what never comes from the hub."""
    alias = ALIASES.get(model)
    if _is_local(model):
        return None if alias is None else cache_dir()
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _is_local(model: str) -> bool:
    """Return whether a --model value never comes from the hub."""
    alias = ALIASES.get(model)
    return Path(model).expanduser().exists() if alias is None else alias.repo is None


def cache_dir() -> Path:
    """Return the folder for files that this package makes once and keeps."""
    default = Path.home() / ".cache" / "fsdp_qlora"
    return Path(os.environ.get("FSDP_QLORA_CACHE") or default).expanduser()


def check_config(folder: Path, name: str | None = None) -> None:
    """Refuse a model folder without a readable config.json, or one that needs Python code of its own.

    Raises:
        ModelError: names the file and the remedy.
    """
    name = name or str(folder)
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{name} is a LoRA adapter, not a base model; give the model it was trained on")
        if (folder / "adapter" / "adapter_config.json").is_file():
            raise ModelError(f"{name} is a training run of LoRA, not a model; give it as --adapter, or merge it first")
        raise ModelError(f"{name} has no config.json; give a folder made by save_pretrained or a hub model")
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        content = _read_json(path) if path.is_file() else {}
        if content.get("auto_map"):
            raise ModelError(
                f"{name}: {path.name} asks for Python code of the model's own (auto_map); custom code is not run; "
                "choose a model whose architecture is part of transformers"
            )


def check_weights(folder: Path, name: str | None = None) -> None:
    """Refuse a model folder without safetensors weights; pickled ones can run code and are never read.

    Raises:
        WeightsError: names what was found and the remedy.
    """
    name = name or str(folder)
    if any(folder.glob("*.safetensors")):
        return
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
    found = f" but {others[0]}, which is not read" if others else ""
    raise WeightsError(
        f"{name} holds no .safetensors weights{found}; choose a revision with safetensors, "
        "or convert it where you trust the files: from_pretrained, then save_pretrained"
    )


def _refuse_revision(model: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(f"--revision={revision} applies to hub models, and {model} is not one; remove --revision")


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: is not a JSON object; fetch the file again")
    return content


def _unknown(model: str, folder: Path) -> str:
    if folder.is_file():
        return f"--model={model} is a file; give the folder that holds it"
    others = "check the path" if "/" in model else f"aliases are {', '.join(ALIASES)}"
    hint = suggest(folder.name.lower(), list(ALIASES), others)
    return f"--model={model} is neither a local folder, an alias nor a hub id (owner/name); {hint}"


def _download(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Fetch the matching top-level files into the hub's own cache; return the snapshot folder, named by its commit."""
    import huggingface_hub  # its settings are read from the environment at this import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    transport_error: type[Exception] = HfHubHTTPError.__mro__[1]  # HTTPError of the client library, which has changed
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_DUPLICATES)
            )
        )
    except HFValidationError as error:
        raise ModelError(f"--model={repo} is neither a local folder nor a valid hub id (owner/name)") from error
    except LocalEntryNotFoundError as error:
        raise _explain(repo, revision, error.__cause__ or error) from error
    except (transport_error, OSError) as error:
        raise _explain(repo, revision, error) from error


def _explain(repo: str, revision: str | None, error: BaseException) -> FsdpQloraError:
    """Turn an error of the hub client into one line: what happened and what to do."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{repo}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, GatedRepoError) or status == 403:
        token = "the account of your HF_TOKEN has no access" if get_token() else "no HF_TOKEN is set"
        return ModelError(f"{repo} is gated and {token}; accept its licence at {page}, then set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"{repo} has no revision {revision}; see {page}/tree/main for its branches and tags")
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return ModelError(
            f"--model={repo} is neither a local folder nor a model at {constants.ENDPOINT} that you may read; "
            "check the name, and set HF_TOKEN if it is private"
        )
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return ModelError(
            f"{repo} is not complete in {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set; "
            "unset it, or copy the cache from a machine that has the model"
        )
    if isinstance(error, OSError) and error.errno is not None and not status:
        space = "; free space or move the cache with HF_HOME" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return WeightsError(f"{repo} cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror}){space}")
    reason = f"HTTP status {status}" if status else type(error).__name__
    return ModelError(
        f"{repo} could not be downloaded from {constants.ENDPOINT} ({reason}); "
        "check the network, proxy and HF_ENDPOINT, then run again: finished files are kept"
    )

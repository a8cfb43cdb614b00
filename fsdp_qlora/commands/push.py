"""Publish an adapter or a model on the Hugging Face hub, with a card written from the record of its run."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdp_qlora.config import PushConfig
from fsdp_qlora.errors import CheckpointError, ConfigError, ModelError
from fsdp_qlora.export import model_card
from fsdp_qlora.models.hub import find_model
from fsdp_qlora.output_files import (
    CONFIG_FILE,
    INDEX_FILE,
    SIDE_FILES,
    STATE_FILE,
    WEIGHTS_FILE,
    find_adapter,
    read_record,
)

_PATHS = ("base_model_name_or_path", "_name_or_path", "name_or_path")
"""Fields of JSON files that may hold a path of this machine."""


@dataclass(frozen=True)
class Upload:
    """What is published: the files by name, each a path or, where it is made or changed for publication, its content."""

    files: dict[str, Path | bytes]

    @property
    def size_bytes(self) -> int:
        return sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in self.files.values())


def run(config: PushConfig) -> None:
    """Publish as `config` says; the command line's `push`."""
    upload = collect(Path(config.folder).expanduser(), config.repo, config.base_model)
    if config.dry_run:
        card = upload.files["README.md"]
        assert isinstance(card, bytes)
        print(card.decode())
        print("\n".join(["files:", *(f"  {name}" for name in sorted(upload.files))]))
        return
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise ConfigError(
            "HF_TOKEN is not set; put a token with write access into the environment (never on the command line)"
        )
    url = _send(upload, config.repo, config.private, token)
    print(f"pushed: {len(upload.files)} files, {upload.size_bytes / 1e6:.1f} MB\n{url}", flush=True)


def collect(folder: Path, repo: str, base_model: str | None = None) -> Upload:
    """Return the files of an adapter or a model, with a card for `repo`.

    Args:
        folder: of a training run, an adapter, or a model that was merged or trained whole.
        base_model: the base's name for the card; default: the recorded one.

    Raises:
        CheckpointError: the folder holds neither, or something unfinished or unreadable.
    """
    content = find_model(find_adapter(folder))
    is_adapter = (content / CONFIG_FILE).exists()
    weights = [WEIGHTS_FILE] if is_adapter else ["*.safetensors", INDEX_FILE]
    found = [path for pattern in weights for path in sorted(content.glob(pattern))]
    if (content / STATE_FILE).exists():
        raise CheckpointError(f"{folder}: is unfinished ({STATE_FILE}); repeat the command that was making it")
    if not found or not (is_adapter or (content / "config.json").exists()):
        raise CheckpointError(
            f"{folder}: holds neither an adapter ({CONFIG_FILE}, {WEIGHTS_FILE}) nor a model (config.json,"
            " *.safetensors); give the --output_dir of train or merge"
        )
    record = read_record(content)
    found += [path for pattern in SIDE_FILES for path in sorted(content.glob(pattern))]
    private = ("run.json", "exit.json")
    files: dict[str, Path | bytes] = {path.name: path for path in found if path.name not in private}
    for path in found:
        if path.suffix == ".json" and path.name.endswith("config.json"):
            files[path.name] = _published(path, base_model)
    base = base_model or _base(content, is_adapter, record)
    files["README.md"] = _card(repo, base, is_adapter, record).encode()
    return Upload(files)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is unreadable ({error}); restore it") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object; restore it")
    return content


def _published(path: Path, base_model: str | None) -> Path | bytes:
    """Return a settings file as it is published: without folders of this machine or aliases, or with the name given."""
    content = _read(path)
    local = {key: model_card.without_folders(content[key]) for key in _PATHS if key in content}
    changed = {key: model_card.hub_id(str(value)) or value for key, value in local.items()}
    if base_model is not None and "base_model_name_or_path" in content:
        changed["base_model_name_or_path"] = base_model
    if changed == {key: content[key] for key in changed}:
        return path
    return (json.dumps({**content, **changed}, indent=2) + "\n").encode()


def _base(content: Path, is_adapter: bool, record: dict[str, Any]) -> str:
    if is_adapter:
        return str(_read(content / CONFIG_FILE).get("base_model_name_or_path") or "an unnamed base model")
    trained = record.get("config", {}).get("model") if model_card.is_full(record) else None
    return str(record.get("merge", {}).get("base") or trained or "an unnamed base model")


def _card(repo: str, base: str, is_adapter: bool, record: dict[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(**model_card.metadata(base, is_adapter, record))
    return f"---\n{data.to_yaml()}\n---\n\n{model_card.body(repo, base, is_adapter, record)}"


def _send(upload: Upload, repo: str, private: bool, token: str) -> str:
    """Create the repository where there is none, and commit all files at once; return its address.

    Raises:
        ModelError: no access, no network, or a public repository where a private one is wanted.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    transport_error: type[Exception] = HfHubHTTPError.__mro__[1]  # HTTPError of the client library, which has changed
    api = HfApi(token=token)
    operations = [CommitOperationAdd(name, file) for name, file in sorted(upload.files.items())]
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise ModelError(
                f"--private: {repo} exists and is public; make it private in its settings at"
                f" {constants.ENDPOINT}/{repo}/settings, or choose another --repo"
            )
        api.create_commit(repo, operations, commit_message="Upload by fsdp_qlora")
    except (transport_error, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise _explain(repo, error) from error
    return f"{constants.ENDPOINT}/{repo}"


def _explain(repo: str, error: Exception) -> ModelError:
    """Turn an error of the hub client into one line: what happened and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status == 401:
        return ModelError(f"{repo}: the hub does not accept HF_TOKEN (401); make a token with write access and set it")
    if status in (403, 404):
        return ModelError(
            f"{repo}: HF_TOKEN may not write there ({status}); use your own name or organisation in --repo, and a token with"
            " write access to it"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return ModelError(f"{repo}: HF_HUB_OFFLINE is set; unset it to push")
    reason = f"HTTP status {status}" if status else f"{type(error).__name__}: {error}".splitlines()[0]
    return ModelError(
        f"{repo} could not be pushed to {constants.ENDPOINT} ({reason}); check the network, proxy and HF_ENDPOINT, then run"
        " again: files that arrived are not sent twice"
    )

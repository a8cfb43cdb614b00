"""--model to a checked folder: local folders, a stand-in hub in every mood, and errors that say what to do."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest

from fsdp_qlora.errors import ModelError, WeightsError
from fsdp_qlora.models import hub as hub_module
from fsdp_qlora.models import smollm2
from fsdp_qlora.models.hub import cache_dir, resolve
from tests.unit.models.hub_server import COMMIT, Hub, serve

ROOT = Path(__file__).resolve().parents[3]
REPO = "someone/model"
TOKEN = "hf_plantedTokenThatMustNotShow"
WANTED = {"config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "model.safetensors"}
UNWANTED = {
    "README.md",
    "modeling_own.py",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "original/consolidated.00.pth",
    "original/params.json",
    "metal/model.safetensors",
}

# huggingface_hub reads its settings when it is imported, so each trial is a process of its own.
CLIENT = """
import json, sys
from fsdp_qlora.errors import FsdpQloraError
from fsdp_qlora.models.hub import resolve
try:
    answer = {"folder": str(resolve(sys.argv[1], sys.argv[2] or None))}
except FsdpQloraError as error:
    answer = {"kind": type(error).__name__, "message": str(error)}
print(json.dumps(answer))
"""


@dataclass
class Answer:
    folder: Path
    kind: str
    message: str
    output: str


def ask(hub: Hub, home: Path, model: str = REPO, revision: str = "", **environment: str) -> Answer:
    """Resolve a model in a new process whose hub is the stand-in."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, model, revision],
        env={**kept, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    folder = Path(answer.get("folder", "/nonexistent"))
    return Answer(folder, answer.get("kind", ""), answer.get("message", ""), done.stdout + done.stderr)


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {name: f"content of {name}".encode() for name in WANTED | UNWANTED}
    files |= {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"}
    with serve(Hub(REPO, files)) as served:
        yield served


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def make_folder(folder: Path, **files: str) -> Path:
    """Write files named with __ for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def test_download_fetches_what_is_needed_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    answer = ask(hub, tmp_path)
    assert {path.name for path in answer.folder.iterdir()} == WANTED
    assert (answer.folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert answer.folder.name == COMMIT
    assert answer.folder.is_relative_to(tmp_path)
    assert hub.downloads() == WANTED
    assert "Fetching" in answer.output  # progress

    hub.requests.clear()
    assert ask(hub, tmp_path).folder == answer.folder
    assert hub.downloads() == set()
    hub.requests.clear()
    assert ask(hub, tmp_path, HF_HUB_OFFLINE="1").folder == answer.folder
    assert hub.requests == []


def test_cached_model_is_used_when_the_hub_is_away(hub: Hub, tmp_path: Path) -> None:
    folder = ask(hub, tmp_path).folder
    hub.status = 503
    assert ask(hub, tmp_path).folder == folder


def test_revision_can_be_a_commit(hub: Hub, tmp_path: Path) -> None:
    assert ask(hub, tmp_path, revision=COMMIT).folder.name == COMMIT


def test_cut_connection_is_resumed_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = random.Random(0).randbytes(25_000_000)
    hub.cut_at = 12_000_000  # the client writes in pieces of 10 MB, so 10 MB are kept
    answer = ask(hub, tmp_path)
    assert hub.cuts == 2
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith("model.safetensors")]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert ranges[1] is not None
    assert int(ranges[1].removeprefix("bytes=").rstrip("-")) >= 10_000_000
    assert (answer.folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_failed_download_keeps_finished_files_for_the_next_run(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = b"w" * 50_000
    hub.cut_at, hub.dead_after_cut = 20_000, True
    answer = ask(hub, tmp_path)
    assert answer.kind == "ModelError"
    assert "HTTP status 500" in answer.message
    assert "run again: finished files are kept" in answer.message
    hub.cut_at = None
    hub.requests.clear()
    answer = ask(hub, tmp_path)
    assert (answer.folder / "model.safetensors").read_bytes() == b"w" * 50_000
    assert hub.downloads() == {"model.safetensors"}


def test_incomplete_cache_is_not_taken_for_a_model_offline(hub: Hub, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = b"w" * 50_000
    hub.cut_at, hub.dead_after_cut = 20_000, True
    ask(hub, tmp_path)
    answer = ask(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert (answer.kind, "HF_HUB_OFFLINE is set; unset it" in answer.message) == ("ModelError", True)


@pytest.mark.parametrize(
    ("changes", "environment", "revision", "kind", "texts"),
    [
        ({"gated": True}, {}, "", "ModelError", ("no HF_TOKEN is set; accept its licence at", f"{REPO}, then set HF")),
        ({"gated": True, "token": "hf_other"}, {"HF_TOKEN": TOKEN}, "", "ModelError", ("account of your HF_TOKEN",)),
        ({"status": 401}, {}, "", "ModelError", ("neither a local folder nor a model at", "set HF_TOKEN if")),
        ({"status": 404}, {}, "", "ModelError", ("could not be downloaded", "HTTP status 404")),
        ({"status": 503}, {}, "", "ModelError", ("HTTP status 503", "check the network")),
        ({}, {}, "v9", "ModelError", ("has no revision v9; see",)),
        ({}, {"HF_HUB_OFFLINE": "1"}, "", "ModelError", ("HF_HUB_OFFLINE is set; unset it",)),
    ],
)
def test_refusals_of_the_hub_say_what_to_do(
    hub: Hub,
    tmp_path: Path,
    changes: dict[str, object],
    environment: dict[str, str],
    revision: str,
    kind: str,
    texts: tuple[str, ...],
) -> None:
    for name, value in changes.items():
        setattr(hub, name, value)
    answer = ask(hub, tmp_path, revision=revision, **environment)
    assert answer.kind == kind
    for text in texts:
        assert text in answer.message
    assert "\n" not in answer.message
    assert TOKEN not in answer.output


def test_token_from_the_environment_opens_a_gated_model(hub: Hub, tmp_path: Path) -> None:
    hub.gated, hub.token = True, TOKEN
    answer = ask(hub, tmp_path, HF_TOKEN=TOKEN)
    assert (answer.folder / "model.safetensors").is_file()
    assert TOKEN not in answer.output
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_unknown_repository(hub: Hub, tmp_path: Path) -> None:
    answer = ask(hub, tmp_path, model="someone/else")
    assert answer.kind == "ModelError"
    assert answer.message.startswith("--model=someone/else is neither a local folder nor a model at http://127.0.0.1")


def test_no_hub_at_that_address(tmp_path: Path) -> None:
    with serve(Hub(REPO, {})) as closed:
        pass
    answer = ask(closed, tmp_path)
    assert (answer.kind, "check the network, proxy and HF_ENDPOINT" in answer.message) == ("ModelError", True)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_model_with_code_of_its_own_is_refused_before_its_weights_are_fetched(
    hub: Hub, tmp_path: Path, name: str
) -> None:
    hub.files[name] = b'{"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}'
    answer = ask(hub, tmp_path)
    assert answer.kind == "ModelError"
    assert f"{name} asks for Python code" in answer.message
    assert "custom code is not run" in answer.message
    assert not hub.downloads() & {"model.safetensors", "modeling_own.py"}


def test_hub_model_with_pickled_weights_only(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    answer = ask(hub, tmp_path)
    assert answer.kind == "WeightsError"
    assert f"{REPO} holds no .safetensors weights; choose a revision with safetensors" in answer.message
    assert "pytorch_model.bin" not in hub.downloads()


@pytest.mark.usefixtures("no_network")
def test_local_folder_is_used_as_it_is_without_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "owner" / "name", config__json="{}", model__safetensors="")
    assert resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/owner/name") == folder


@pytest.mark.usefixtures("no_network")
def test_converted_smollm2_needs_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_find_gguf", lambda: tmp_path / "weights.gguf")
    monkeypatch.setattr(smollm2, "_convert", lambda gguf, folder: make_folder(folder, config__json="{}"))
    folder = resolve("smollm2-135m")
    assert folder.is_relative_to(tmp_path)
    assert resolve("smollm2-135m") == folder


@pytest.mark.parametrize(
    ("files", "kind", "text"),
    [
        ({}, ModelError, "has no config.json; give a folder made by save_pretrained"),
        ({"model__safetensors": ""}, ModelError, "has no config.json"),
        ({"adapter_config__json": "{}"}, ModelError, "is a LoRA adapter, not a base model"),
        ({"config__json": "{"}, ModelError, "config.json: is not JSON"),
        ({"config__json": "[]"}, ModelError, "config.json: is not a JSON object"),
        ({"config__json": '{"auto_map": {"AutoConfig": "own.Own"}}'}, ModelError, "custom code is not run"),
        (
            {"config__json": "{}", "tokenizer_config__json": '{"auto_map": {"AutoTokenizer": ["own.Own", null]}}'},
            ModelError,
            "tokenizer_config.json asks for Python code",
        ),
        ({"config__json": "{}"}, WeightsError, "holds no .safetensors weights; choose"),
        ({"config__json": "{}", "pytorch_model__bin": ""}, WeightsError, "but pytorch_model.bin, which is not read"),
        ({"config__json": "{}", "weights__pt": ""}, WeightsError, "but weights.pt, which is not read"),
        ({"config__json": "{}", "weights__gguf": ""}, WeightsError, "but weights.gguf, which is not read"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_unfit_local_folder(tmp_path: Path, files: dict[str, str], kind: type[Exception], text: str) -> None:
    folder = make_folder(tmp_path / "model", **files)
    with pytest.raises(kind) as caught:
        resolve(str(folder))
    assert text in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_a_run_in_the_place_of_a_model(tmp_path: Path) -> None:
    make_folder(tmp_path / "adapter", adapter_config__json="{}")
    with pytest.raises(ModelError, match="is a training run of LoRA, not a model; give it as --adapter"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("llama-70", "did you mean llama-70b?"),
        ("Llama-70B", "did you mean llama-70b?"),
        ("./qwen3-32", "did you mean qwen3-32b?"),
        ("zzz", "aliases are smollm2-135m, "),
        ("/no/such/folder", "neither a local folder, an alias nor a hub id (owner/name); check the path"),
        ("../models/mine", "neither a local folder, an alias nor a hub id"),
        ("~/no/such/folder", "neither a local folder, an alias nor a hub id"),
        ("a/b/c", "neither a local folder, an alias nor a hub id"),
        ("owner/../name", "neither a local folder, an alias nor a hub id"),
        ("https://example.org/owner/name", "neither a local folder, an alias nor a hub id"),
        ("owner/name--x", "nor a valid hub id"),
        (__file__, "is a file; give the folder that holds it"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_name_that_leads_nowhere(model: str, text: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(model)
    assert text in str(caught.value)
    assert f"--model={model}" in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_revision_of_something_that_has_none(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, config__json="{}", model__safetensors="")
    for model in (str(folder), "smollm2-135m"):
        with pytest.raises(ModelError, match=r"--revision=main applies to hub models.*remove --revision"):
            resolve(model, "main")


def test_alias_leads_to_its_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(repo: str, **options: object) -> str:
        asked.append((repo, options["revision"]))
        return str(make_folder(tmp_path / COMMIT, config__json="{}", model__safetensors=""))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("llama-70b-4bit", "main").name == COMMIT
    repo = "unsloth/Llama-3.3-70B-Instruct-bnb-4bit"
    assert asked == [(repo, "main"), (repo, COMMIT)]  # weights of the very commit whose config was checked


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "No space left on device); free space or move the cache with HF_HOME"),
        (errno.EACCES, "(Permission denied)"),
    ],
)
def test_download_that_cannot_be_stored(monkeypatch: pytest.MonkeyPatch, number: int, text: str) -> None:
    def download(repo: str, **_: object) -> str:
        raise OSError(number, os.strerror(number), "/cache/blob")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(WeightsError) as caught:
        resolve(REPO)
    assert text in str(caught.value)
    assert f"{REPO} cannot be stored in " in str(caught.value)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_QLORA_CACHE", "~/somewhere")
    assert cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("FSDP_QLORA_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "fsdp_qlora"
    assert hub_module.cache_dir is cache_dir

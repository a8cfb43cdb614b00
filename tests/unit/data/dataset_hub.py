"""A stand-in for the hub's datasets: the HTTP answers that the datasets library asks for."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.http_server import Handler, serve_http

COMMIT = "da7a" * 10


@dataclass
class DatasetHub:
    """One dataset repository; `requests` lists (method, path)."""

    repo: str
    files: dict[str, bytes]
    is_gated: bool = False
    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    sent_bytes: int = 0


class HubHandler(Handler):
    """Answers for a hub."""

    def __init__(self, hub: DatasetHub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.url_path()
        body = self.body()
        self.hub.requests.append((self.command, path))
        if path.startswith(f"/api/datasets/{self.hub.repo}"):
            return self._api(path.removeprefix(f"/api/datasets/{self.hub.repo}").strip("/"), body.decode())
        prefix = f"/datasets/{self.hub.repo}/resolve/"
        if not path.startswith(prefix):
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        name = path.removeprefix(prefix).partition("/")[2]
        if name not in self.hub.files:
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        self._file(self.hub.files[name])

    def _api(self, rest: str, body: str) -> None:
        if rest == "auth-check":
            error = {"X-Error-Code": "GatedRepo"} if self.hub.is_gated else None
            return self.send(401 if self.hub.is_gated else 200, b"{}", error)
        kind, revision, folder = [*rest.split("/", 2), "", "", ""][:3] if rest else ("revision", "main", "")
        if revision not in ("main", COMMIT):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        names = [{"rfilename": name} for name in self.hub.files]
        content: object = {"id": self.hub.repo, "sha": COMMIT, "siblings": names, "private": False}
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.hub.files.items()
        ]
        if kind == "paths-info":
            wanted = json.loads(body)["paths"]
            content = [entry for entry in entries if entry["path"] in wanted]
        if kind == "tree":
            inside = [entry for entry in entries if str(entry["path"]).startswith(f"{folder}/" if folder else "")]
            if not inside:
                return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            content = inside
        self.send(200, json.dumps(content).encode())

    def _file(self, data: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, start, end = 200, 0, len(data)
        if requested := self.headers.get("Range"):
            first, _, last = requested.removeprefix("bytes=").partition("-")
            status, start, end = 206, int(first), min(len(data), int(last) + 1) if last else len(data)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        if self.command == "GET":
            self.hub.sent_bytes += end - start
        self.send(status, data[start:end], headers)


@contextmanager
def serve(hub: DatasetHub) -> Iterator[DatasetHub]:
    """Serve the hub on a free local port while the block runs."""
    with serve_http(functools.partial(HubHandler, hub)) as hub.url:
        yield hub

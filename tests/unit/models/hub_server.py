"""A stand-in for the model hub: the few HTTP answers that huggingface_hub's snapshot_download asks for."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.http_server import Handler, serve_http

COMMIT = "c0ffee" * 6 + "abcd"


@dataclass
class Hub:
    """One repository, with switches for what goes wrong; `requests` lists (method, path, Range header)."""

    repo: str
    files: dict[str, bytes]
    gated: bool = False
    token: str | None = None  # with gated: the token that has access
    cut_at: int | None = None  # the first download of a longer file is cut off after so many bytes
    dead_after_cut: bool = False  # no longer file can be downloaded after the cut
    status: int | None = None  # answer everything with this status
    url: str = ""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cuts: int = 0

    def downloads(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {
            path.split("/resolve/")[1].split("/", 1)[1]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        }


class HubHandler(Handler):
    """Answers for a hub."""

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.url_path()
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.status is not None:
            return self.send(self.hub.status, b"{}")
        if path.startswith(f"/api/models/{self.hub.repo}"):
            return self._api(path.removeprefix(f"/api/models/{self.hub.repo}"))
        prefix = f"/{self.hub.repo}/resolve/"
        name = path.removeprefix(prefix).partition("/")[2]
        if not path.startswith(prefix):
            return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if name not in self.hub.files:
            return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        if self.hub.gated and (
            self.hub.token is None or self.headers.get("Authorization") != f"Bearer {self.hub.token}"
        ):
            code = 403 if self.headers.get("Authorization") else 401
            return self.send(code, b"{}", {"X-Error-Code": "GatedRepo"})
        self._file(self.hub.files[name])

    def _api(self, rest: str) -> None:
        _, kind, revision = [*rest.split("/"), "", ""][:3] if rest else ("", "revision", "main")
        if revision not in ("main", COMMIT):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        names = [{"rfilename": name} for name in self.hub.files]
        content: object = {"id": self.hub.repo, "modelId": self.hub.repo, "sha": COMMIT, "siblings": names}
        if kind == "tree":
            content = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.hub.files.items()
            ]
        self.send(200, json.dumps(content).encode())

    def _file(self, data: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, start = 200, 0
        if requested := self.headers.get("Range"):
            status, start = 206, int(requested.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and self.hub.cut_at is not None and len(data) > self.hub.cut_at:
            if self.hub.dead_after_cut and self.hub.cuts:
                return self.send(500, b"{}")
            self.hub.cuts += 1
            if self.hub.cuts == 1:
                self.send(status, data[start:], headers, cut_at=self.hub.cut_at)
                self.close_connection = True
                return None
        self.send(status, data[start:], headers)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve the hub on a free local port while the block runs."""
    with serve_http(functools.partial(HubHandler, hub)) as hub.url:
        yield hub

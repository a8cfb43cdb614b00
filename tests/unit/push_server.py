"""A stand-in for the model hub that takes uploads: what huggingface_hub's create_repo and create_commit ask for."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.http_server import Handler, serve_http

COMMIT = "c0ffee" * 6 + "abcd"


@dataclass
class Hub:
    """Repositories by name, and what was sent; `token` has access to the names in `writable`."""

    token: str
    writable: tuple[str, ...]
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    sent: list[bytes] = field(default_factory=list)
    status: int | None = None  # answer everything with this status
    large: dict[str, bytes] = field(default_factory=dict)
    url: str = ""


class HubHandler(Handler):
    """Answers for a hub."""

    def __init__(self, hub: Hub, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def do_GET(self) -> None:
        repo = self.url_path().removeprefix("/api/models/")
        if repo not in self.hub.repos:
            return self._send(404, {}, "RepoNotFound")
        self._send(200, {"id": repo, "sha": COMMIT, "private": self.hub.private[repo], "siblings": []})

    def do_PUT(self) -> None:  # addresses of large files carry their own permission
        self.hub.large[self.url_path().removeprefix("/upload/")] = self.body()
        self._send(200, {})

    def do_POST(self) -> None:
        body = self.body()
        self.hub.sent.append(body)
        if self.hub.status is not None:
            return self._send(self.hub.status, {})
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(401, {})
        path = self.url_path()
        if path == "/api/validate-yaml":
            header = json.loads(body)["content"].split("---\n")[1]
            assert isinstance(yaml.safe_load(header), dict)
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
        if repo not in self.hub.writable:
            return self._send(403, {})
        if "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._send(200, {"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.hub.url}/upload/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self._send(200, {"transfer": "basic", "objects": objects})
        else:
            self._commit(repo, [json.loads(line) for line in body.splitlines()])

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}"
        if repo not in self.hub.writable:
            return self._send(403, {})
        if repo in self.hub.repos:
            return self._send(409, {"url": f"{self.hub.url}/{repo}"})
        self.hub.repos[repo] = {}
        self.hub.private[repo] = wanted.get("private") is True or wanted.get("visibility") == "private"
        self._send(200, {"url": f"{self.hub.url}/{repo}"})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.large[value["oid"]]
        url = f"{self.hub.url}/{repo}/commit/{COMMIT}"
        self._send(200, {"commitUrl": url, "commitOid": COMMIT})

    def _send(self, status: int, content: dict[str, Any], code: str | None = None) -> None:
        headers = {"Content-Type": "application/json", **({"X-Error-Code": code} if code is not None else {})}
        self.send(status, json.dumps(content).encode(), headers)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve the hub on a free local port while the block runs."""
    with serve_http(functools.partial(HubHandler, hub)) as hub.url:
        yield hub

"""A stand-in for the Hub's server, on this machine, to which huggingface_hub's own client talks.

    server.repositories    id -> Repository, which a test may fill or read
    server.files           those of the main branch of user/adapter, which is made when it is asked for
    server.requests        (method, path, body) of everything that was asked
    server.fail            (method, part of a path) -> status, code and message, or None to break off the connection
    server.odd_answers     start of a path -> the body of a successful answer that the Hub would not give

A token may read all repositories, and write to those of `user`.
"""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

TOKEN, READ_TOKEN = "hf_secret", "hf_read"
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]  # of a repository with one adapter


@dataclass
class Repository:
    """branches: name -> path -> content."""

    private: bool = True
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})

    def commit_id(self, branch: str = "main") -> str:
        """The same for the same files."""
        files = sorted((path, hashlib.sha256(content).hexdigest()) for path, content in self.branches[branch].items())
        return hashlib.sha1(repr((branch, files)).encode()).hexdigest()

    def branch_of(self, revision: str) -> str:
        return next((branch for branch in self.branches if self.commit_id(branch) == revision), revision)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, bytes]] = []
        self.fail: dict[tuple[str, str], tuple[int, str, str] | None] = {}
        self.odd_answers: dict[str, bytes] = {}

    @property
    def files(self) -> dict[str, bytes]:
        return self.repositories.setdefault("user/adapter", Repository()).branches["main"]

    @property
    def commit(self) -> str:
        return self.repositories["user/adapter"].commit_id()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str, message: str = "") -> None:
        headers = {"X_Error_Code": code} if code else {}
        self.answer(status, json.dumps({"error": message}).encode(), X_Error_Message=message, **headers)

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        self.server.requests.append((self.command, self.path, body))
        for (command, part), failure in self.server.fail.items():
            if command == self.command and part in path:
                if failure is None:
                    self.close_connection = True
                    self.connection.close()
                else:
                    self.refuse(*failure)
                return
        for start, content in self.server.odd_answers.items():
            if self.command == "GET" and path.startswith(start):
                self.answer(200, content)
                return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_TOKEN):
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(token, json.loads(body))
        else:
            self.of_repository(token, path, body)

    def create(self, token: str, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repositories:
            self.json({"url": f"{self.server.address}/{name}"}, 409)
        elif token == READ_TOKEN or asked["organization"] != "user":
            self.refuse(403, "", "You don't have the rights to create a model under this namespace")
        else:
            self.server.repositories[name] = Repository(asked.get("visibility") != "public")
            self.json({"url": f"{self.server.address}/{name}", "name": name})

    def of_repository(self, token: str, path: str, body: bytes) -> None:
        parts = path.strip("/").removeprefix("api/models/").split("/")
        name, (action, argument, *rest) = "/".join(parts[:2]), [*parts[2:], "", "main"][: max(2, len(parts) - 2)]
        repository = self.server.repositories.get(name)
        if repository is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if action in ("branch", "preupload", "commit") and token == READ_TOKEN:
            return self.refuse(403, "", "You need write access")
        if action == "branch":
            if argument in repository.branches:
                return self.refuse(409, "", "Reference already exists")
            repository.branches[argument] = dict(repository.branches["main"])
            return self.json({})
        branch = repository.branch_of(argument or "main")
        files = repository.branches.get(branch)
        if files is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        commit = repository.commit_id(branch)
        if action == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.json(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                match line:
                    case {"key": "file", "value": value}:
                        files[value["path"]] = base64.b64decode(value["content"])
                    case {"key": "deletedFile", "value": value}:
                        del files[value["path"]]
            new = repository.commit_id(branch)
            return self.json({"commitUrl": f"{self.server.address}/{name}/commit/{new}", "commitOid": new})
        if action == "resolve":
            content = files.get("/".join(rest))
            if content is None:
                return self.refuse(404, "EntryNotFound")
            return self.answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=commit)
        if action == "tree":
            entries = [{"type": "file", "path": p, "size": len(files[p]), "oid": commit} for p in files]
            return self.json(entries)
        siblings = [{"rfilename": name, "size": len(files[name])} for name in files]
        return self.json({"id": name, "sha": commit, "private": repository.private, "siblings": siblings})

    do_GET = do_POST = do_HEAD = handle_request

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """Starts a stand-in, and lets huggingface_hub's client talk to it, with downloaded files in tmp_path / "cache"."""
    server = Server()
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    without_waiting = SimpleNamespace(**{**vars(time), "sleep": lambda _: None})  # before the client tries again
    monkeypatch.setattr("huggingface_hub.utils._http.time", without_waiting)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()

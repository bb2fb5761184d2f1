"""A model hub on the loopback: repositories with commits and branches, ranges, hashes, and connections that break."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

IN_LFS: Final = (".safetensors", ".model")


class Request(NamedTuple):
    """A file that was asked for by its content."""

    file: str
    start: int
    """Its first byte that was asked for."""


@dataclass
class Repository:
    """A repository: each commit is a folder of its own."""

    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    """What branches and tags stand for."""
    gated: bool = False

    def commit(self, folder: Path, ref: str = "main") -> str:
        """Make a folder the newest commit of a branch; returns its hash."""
        content = b"".join(file.name.encode() + file.read_bytes() for file in sorted(folder.iterdir()))
        commit = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        self.commits[commit] = folder
        self.refs[ref] = commit
        return commit


class Hub:
    """What is on the hub, how it misbehaves, and what was asked of it."""

    def __init__(self, repositories: Mapping[str, Path]) -> None:
        self.repositories = {name: Repository() for name in repositories}
        for name, folder in repositories.items():
            self.repositories[name].commit(folder)
        self.endpoint = ""
        self.requests: list[Request] = []
        self.breaks: list[int] = []
        """Bytes after which each of the next connections breaks that sends a file in git-lfs."""
        self.corrupt = False
        """Whether files in git-lfs are sent with their last byte changed."""
        self.status = 0
        """What every request is answered with, or 0."""


class Content(NamedTuple):
    body: bytes
    etag: str
    commit: str
    in_lfs: bool


def blob_hash(body: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()


def _sibling(file: Path) -> dict[str, Any]:
    body = file.read_bytes()
    told: dict[str, Any] = {"rfilename": file.name, "size": len(body), "blobId": blob_hash(body)}
    if file.name.endswith(IN_LFS):
        told["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return told


@contextmanager
def serve(repositories: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve each folder as the main branch of the repository of its name; `endpoint` is for HF_ENDPOINT."""
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            if hub.status:
                return self._say(hub.status, "")
            path = unquote(self.path.split("?")[0])
            for name, repository in hub.repositories.items():
                if path.startswith(f"/api/models/{name}/revision/"):
                    return self._tell(name, repository, path.rpartition("/revision/")[2])
                if path.startswith(f"/{name}/resolve/"):
                    revision, _, file = path.removeprefix(f"/{name}/resolve/").partition("/")
                    return self._give(repository, revision, file, with_body)
            return self._say(404, "RepoNotFound")

        def _tell(self, name: str, repository: Repository, revision: str) -> None:
            commit = repository.refs.get(revision, revision)
            if commit not in repository.commits:
                return self._say(404, "RevisionNotFound")
            files = [_sibling(file) for file in sorted(repository.commits[commit].iterdir())]
            body = json.dumps({"id": name, "modelId": name, "sha": commit, "siblings": files}).encode()
            return self._send(Content(body, blob_hash(body), commit, in_lfs=False), with_body=True)

        def _give(self, repository: Repository, revision: str, file: str, with_body: bool) -> None:
            commit = repository.refs.get(revision, revision)
            if repository.gated:
                return self._say(401, "GatedRepo")
            if commit not in repository.commits:
                return self._say(404, "RevisionNotFound")
            path = repository.commits[commit] / file
            if not path.is_file():
                return self._say(404, "EntryNotFound")
            body = path.read_bytes()
            in_lfs = file.endswith(IN_LFS)
            etag = hashlib.sha256(body).hexdigest() if in_lfs else blob_hash(body)
            if with_body:
                hub.requests.append(Request(file, self._start()))
            return self._send(Content(body, etag, commit, in_lfs), with_body)

        def _start(self) -> int:
            asked = self.headers.get("Range", "bytes=0-")
            return int(asked.removeprefix("bytes=").partition("-")[0])

        def _send(self, content: Content, with_body: bool) -> None:
            start, body = self._start(), content.body
            if hub.corrupt and content.in_lfs:
                body = body[:-1] + bytes([body[-1] ^ 1])
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - start))
            self.send_header("ETag", f'"{content.etag}"')
            self.send_header("X-Repo-Commit", content.commit)
            self.end_headers()
            if with_body:
                end = start + hub.breaks.pop(0) if content.in_lfs and hub.breaks else len(body)
                self.wfile.write(body[start:end])

        def _say(self, code: int, error: str) -> None:
            self.send_response(code)
            self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A model hub on the loopback: the two requests by which huggingface_hub finds and fetches a repository's files."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[str]:
    """Serve each folder as the repository of its name; yields the address for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = self.path.split("?")[0]
            for repo, folder in repositories.items():
                if path.startswith(f"/api/models/{repo}/"):
                    files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                    body = json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": files}).encode()
                    return self._send(200, body, with_body)
                prefix = f"/{repo}/resolve/{COMMIT}/"
                if path.startswith(prefix) and (file := folder / path.removeprefix(prefix)).is_file():
                    return self._send(200, file.read_bytes(), with_body)
            return self._send(404, b"{}", with_body)

        def _send(self, code: int, body: bytes, with_body: bool) -> None:
            self.send_response(code)
            if code == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

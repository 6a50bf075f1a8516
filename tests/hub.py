"""A local stand-in for the Hugging Face hub: it answers what huggingface_hub needs to fetch one file."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Handler(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    requests: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        self.requests.append(f"{self.command} {self.path}")
        content = self.files.get(self.path)
        if content is None:
            self.send_response(404)
            known_repo = any(path.startswith(self.path.split("/resolve/")[0] + "/") for path in self.files)
            self.send_header("X-Error-Code", "EntryNotFound" if known_repo else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class Hub:
    """The stand-in: `url` for HF_ENDPOINT, `files` by path, and the `requests` in order."""

    def __init__(self, url: str, files: dict[str, bytes], requests: list[str]) -> None:
        self.url, self.files, self.requests = url, files, requests


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    files: dict[str, bytes] = {}
    requests: list[str] = []
    handler = type("Handler", (_Handler,), {"files": files, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_address[1]}", files, requests)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

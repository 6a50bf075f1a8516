"""Downloads from a local server that misbehaves in all the ways that servers do."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from porting.errors import CheckpointError, SourceError
from porting.files.checkpoint import verify_container
from porting.sources import download as module
from porting.sources.download import cache_folder, download, shown
from porting.sources.fetch import fetch
from porting.sources.table import Source, parse_location
from porting.tasks.port import port


class Server:
    """Serves `content`. `behave` changes the response to a request by its number from 0."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.etag = '"one"'
        self.requests: list[dict[str, str]] = []
        self.behave: dict[int, str] = {}
        self.always = ""
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        number = len(self.requests)
        self.requests.append(dict(handler.headers))
        how = self.always or self.behave.get(number, "")
        if how.isdigit():
            handler.send_response(int(how))
            if how in {"429", "503"}:
                handler.send_header("Retry-After", "0")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if how == "page":
            handler.send_response(200)
            handler.send_header("Content-Type", "text/html; charset=utf-8")
            handler.end_headers()
            handler.wfile.write(b"<!doctype html><title>Log in</title>")
            return
        begin = 0
        asked = re.match(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if asked and handler.headers.get("If-Range") == self.etag and how != "no ranges":
            begin = int(asked[1])
        body = self.content[begin:]
        handler.send_response(206 if begin else 200)
        if begin:
            handler.send_header("Content-Range", f"bytes {begin}-{len(self.content) - 1}/{len(self.content)}")
        if how != "no etag":
            handler.send_header("ETag", self.etag)
        length = {"too short": len(body) // 2, "too long": len(body) + 100}.get(how, len(body))
        if how != "no length":
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if how == "cut":
            body = body[: max(len(body) // 2, 1)]
        handler.wfile.write(body[:length])
        handler.wfile.flush()
        if how == "stall":
            time.sleep(3)


@contextlib.contextmanager
def serving(content: bytes) -> Iterator[Server]:
    server = Server(content)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(OSError):
                server.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/some%20where/nano.pth?token=secret"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture(scope="module")
def content() -> bytes:
    stream = io.BytesIO()
    torch.save({"weight": torch.arange(700_000, dtype=torch.float32)}, stream)
    return stream.getvalue()


@pytest.fixture
def server(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("VAN_PORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_LONGEST_WAIT", 0.01)
    with serving(content) as server:
        yield server


def in_cache() -> list[str]:
    return sorted(path.name for path in cache_folder().rglob("*") if path.is_file() and path.name != "lock")


def test_once_fetched_is_found_again_offline(server: Server, content: bytes) -> None:
    path = download(server.url)
    assert (path.name, path.read_bytes()) == ("nano.pth", content)
    assert in_cache() == ["nano.pth"]
    server.always = "503"
    whole = hashlib.sha256(content).hexdigest()
    assert download(server.url, sha256=whole) == download(server.url, sha256=whole[:8]) == path
    assert len(server.requests) == 1


@pytest.mark.parametrize("how", ["cut", "too long", "429", "503", "500", "no length", "no etag"])
def test_a_bad_first_answer_is_got_over(server: Server, content: bytes, how: str) -> None:
    server.behave = {0: how}
    assert download(server.url).read_bytes() == content
    assert in_cache() == ["nano.pth"]


def test_what_breaks_off_goes_on_where_it_stopped(server: Server, content: bytes) -> None:
    server.behave = dict.fromkeys(range(8), "cut")
    assert download(server.url).read_bytes() == content
    begins = [int(request["Range"][6:-1]) for request in server.requests[1:]]
    assert begins == sorted(set(begins)), "each request asks for more than the one before"
    assert len(begins) >= 8


def test_the_next_run_goes_on_too(server: Server, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ATTEMPTS", 1)
    server.behave = {0: "cut", 1: "503"}
    with pytest.raises(SourceError, match="HTTP 503; the [0-9,]+ bytes received so far are kept"):
        download(server.url)
    assert in_cache() == ["etag", "part"]
    assert download(server.url).read_bytes() == content
    assert server.requests[-1]["Range"] == f"bytes={len(content) // 2}-"


def test_a_file_that_changes_meanwhile_is_fetched_anew(server: Server, content: bytes) -> None:
    server.behave = {0: "cut"}
    answer = server.answer

    def change(handler: BaseHTTPRequestHandler) -> None:
        answer(handler)
        server.etag, server.content = '"two"', content[::-1]

    server.answer = change  # type: ignore[method-assign]
    assert download(server.url).read_bytes() == content[::-1]


def test_a_server_without_ranges(server: Server, content: bytes) -> None:
    server.behave = {0: "cut", 1: "no ranges"}
    assert download(server.url).read_bytes() == content


def test_a_stalling_server(server: Server, content: bytes) -> None:
    server.behave = {0: "stall"}
    server.content = content[:1000]
    answer = server.answer

    def cut_and_stall(handler: BaseHTTPRequestHandler) -> None:
        if len(server.requests) == 0:
            server.requests.append({})
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(server.content[:10])
            handler.wfile.flush()
            time.sleep(3)
        else:
            answer(handler)

    server.answer = cut_and_stall  # type: ignore[method-assign]
    begin = time.monotonic()
    assert download(server.url, stall_timeout=0.3).read_bytes() == content[:1000]
    assert time.monotonic() - begin < 2.5


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("404", "the server has no such file (HTTP 404)"),
        ("403", "the server refuses access (HTTP 403)"),
        ("418", "the server answers HTTP 418"),
        ("503", "the server answers HTTP 503"),
        ("429", "the server answers HTTP 429"),
        ("page", "is a web page, not a file"),
    ],
)
def test_errors_say_what_the_server_said(server: Server, how: str, message: str) -> None:
    server.always = how
    with pytest.raises(SourceError, match=re.escape(message)) as caught:
        download(server.url)
    assert "secret" not in str(caught.value)
    assert in_cache() == []


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAN_PORT_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match="cannot fetch http://127.0.0.1:9/x.pth"):
        download("http://127.0.0.1:9/x.pth")


def test_another_hash_is_refused_and_not_kept(server: Server) -> None:
    with pytest.raises(SourceError, match="but 0{64} was expected"):
        download(server.url, sha256="0" * 64)
    assert in_cache() == []


@pytest.mark.parametrize("how", ["too short"])
def test_a_server_that_lies_about_the_length_is_found_out(server: Server, how: str) -> None:
    """The download has the announced length; only reading it shows that the checkpoint is incomplete."""
    server.always = how
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        fetch(Source("van", "nano", "url", server.url), verify=verify_container)
    assert in_cache() == []


def test_two_processes_fetch_a_file_once(server: Server, content: bytes) -> None:
    code = f"from porting.sources.download import download; print(len(download({server.url!r}).read_bytes()))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ.copy())
        for _ in range(3)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == [str(len(content))] * 3
    assert len(server.requests) == 1
    assert in_cache() == ["nano.pth"]


def test_a_port_from_an_address(family: Any, checkpoint: Path, server: Server, tmp_path: Path) -> None:
    server.content = checkpoint.read_bytes()
    result = port(family, "nano", tmp_path / "x.h5", checkpoint=server.url, check=False)
    assert result.provenance["source"]["name"] == shown(server.url)
    assert "secret" not in str(result.provenance)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("some/x.pth", Path("some/x.pth")),
        ("https://host/x.pth", Source("van", "b0", "url", "https://host/x.pth", license="?")),
        ("hf://me/repo/a/x.pth", Source("van", "b0", "huggingface", "a/x.pth", "me/repo", license="?")),
        ("hf://me/repo/x.pth@v2", Source("van", "b0", "huggingface", "x.pth", "me/repo", license="?", revision="v2")),
    ],
)
def test_locations(location: str, expected: Source | Path) -> None:
    found = parse_location("van", "b0", location)
    if isinstance(found, Source):
        found = type(found)(**{**vars(found), "license": "?"})
    assert found == expected


@pytest.mark.parametrize("location", ["hf://me/repo", "hf:///repo/x", "ftp://host/x.pth"])
def test_locations_that_are_none(location: str) -> None:
    with pytest.raises(SourceError):
        parse_location("van", "b0", location)
    assert shown("https://me:pw@host:8000/x?token=1#y") == "https://host:8000/x"


@pytest.mark.parametrize("etag", ["ünïcode", '"quo"te"', "a\x01b", "W/weak", "x" * 10_000, '""""'])
def test_an_odd_etag_does_not_spoil_the_next_run(
    server: Server, content: bytes, monkeypatch: pytest.MonkeyPatch, etag: str
) -> None:
    server.etag = etag.encode("utf-8").decode("latin-1")
    server.always = "cut"
    monkeypatch.setattr(module, "_ATTEMPTS", 1)
    with pytest.raises(SourceError):
        download(server.url)
    server.always = ""
    assert download(server.url).read_bytes() == content


def test_an_etag_that_an_earlier_version_kept_is_not_believed(server: Server, content: bytes) -> None:
    folder = cache_folder() / hashlib.sha256(server.url.encode()).hexdigest()[:20]
    folder.mkdir(parents=True)
    (folder / "part").write_bytes(content[:100])
    (folder / "etag").write_bytes("ünïcode\r\nX: y".encode())
    assert download(server.url).read_bytes() == content
    assert "Range" not in server.requests[0]


def test_a_file_of_unknown_length_has_a_bound(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.always = "no length"
    monkeypatch.setattr(module, "_GREATEST_UNKNOWN", len(server.content) // 2)
    with pytest.raises(SourceError, match="states no length and exceeds"):
        download(server.url)
    assert not list(cache_folder().rglob("part"))


def test_a_file_that_does_not_fit_is_not_begun(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(SourceError, match="bytes, but .* has only 10"):
        download(server.url)


@pytest.mark.parametrize(
    "location",
    ["https://", "https://[::1", "http://host:port/x", "https://a b\x1b[2J/x", "https://:80/x", "http://host:99999/x"],
)
def test_malformed_addresses(location: str) -> None:
    with pytest.raises(SourceError, match="not an address"):
        parse_location("van", "b0", location)


@pytest.mark.parametrize(
    "location",
    ["ftp://me:secret@host/x.pth", "hf://me:secret@owner", "s3://me:secret@bucket/x", "https://me:secret@[/x"],
)
def test_passwords_in_addresses_are_never_printed(location: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_location("van", "b0", location)
    assert "secret" not in f"{caught.value.message}{caught.value.hint}"


def test_what_is_shown_of_addresses() -> None:
    assert shown("https://me:secret@host:80/a/b.pth?token=x#y") == "https://host:80/a/b.pth"
    assert shown("cannot reach http://me:secret@host/x: why") == "cannot reach http://host/x: why"
    assert shown("hf://owner/repo/file@main") == "hf://owner/repo/file@main"
    assert parse_location("van", "b0", "https://me:secret@host/x?sig=y").label == "https://host/x"  # type: ignore[union-attr]

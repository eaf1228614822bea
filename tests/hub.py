"""A Hugging Face hub on this machine, for what fetches models."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Hub:
    """Models by name and revision: folders. ``fetched`` are the files that were asked for."""

    def __init__(self) -> None:
        self.models: dict[tuple[str, str], Path] = {}
        self.refused: dict[str, int] = {}
        self.fetched: list[str] = []
        self.url = ""

    def add(self, name: str, folder: Path, revision: str = "main") -> str:
        """Offer a folder as a model; returns the commit."""
        commit = hashlib.sha1(f"{name} {revision}".encode()).hexdigest()
        self.models[name, revision] = self.models[name, commit] = folder
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        parts = path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, what, revision = "/".join(parts[2:4]), "".join(parts[4:5]) or "revision", "".join(parts[5:6])
        else:
            name, what, revision = "/".join(parts[:2]), "resolve", parts[3]
        revision = revision or "main"
        if name in self.refused:
            status = self.refused[name]
            code = {403: "GatedRepo", 404: "RepoNotFound"}.get(status)
            return status, {} if code is None else {"X-Error-Code": code}, b"{}"
        if not any(known == name for known, _ in self.models):
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if (name, revision) not in self.models:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        folder = self.models[name, revision]
        commit = next(r for (n, r), f in self.models.items() if n == name and f == folder and len(r) == 40)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        if what == "revision":
            return 200, {}, _json({"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]})
        if what == "tree":
            return 200, {}, _json([_entry(folder, file) for file in files])
        file = "/".join(parts[4:])
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        body = (folder / file).read_bytes()
        return 200, {"ETag": f'"{_id(body)}"', "X-Repo-Commit": commit}, body


def _entry(folder: Path, file: str) -> dict[str, Any]:
    body = (folder / file).read_bytes()
    return {"type": "file", "path": file, "size": len(body), "oid": _id(body)}


def _id(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            if self.command == "GET" and "/resolve/" in self.path:
                hub.fetched.append(self.path.rsplit("/", 1)[1])
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

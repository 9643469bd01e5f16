# SPDX-License-Identifier: Apache-2.0
"""A hub on this machine: as much of huggingface.co's interface as its client uses for repositories of models, and for
reading those of data sets, which are `datasets/user/name` here."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = re.compile(r"/api/(?:models/)?((?:datasets/)?[\w.\-]+/[\w.\-]+)(?:/([a-z\-]+)(?:/([^/]+)(?:/(.*))?)?)?")
FILE = re.compile(r"/((?:datasets/)?[\w.\-]+/[\w.\-]+)/resolve/([^/]+)/(.+)")


class Hub(ThreadingHTTPServer):
    """Attributes:
    repos: name -> branch -> path -> bytes.
    private: names of the repositories that were made as private ones.
    commits: what each commit was called, and the paths that it wrote.
    busy: how many of the next requests are not answered.
    log: method and path of each request, and the bytes range that it asked for.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.commits: list[tuple[str, list[str]]] = []
        self.log: list[tuple[str, str, str | None]] = []
        self.busy = 0
        self.token = "Bearer hf_test"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        body = self._body()
        hub.log.append((self.command, path, self.headers.get("Range")))
        if hub.busy:
            hub.busy, self.close_connection = hub.busy - 1, True
        elif self.headers.get("Authorization") != hub.token:
            self._send(401, b'{"error": "log in"}')
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
            known = name in hub.repos
            hub.repos.setdefault(name, {"main": {}})
            hub.private |= {name} if wanted.get("private") or wanted.get("visibility") == "private" else set()
            self._json({"url": f"{hub.url}/{name}"}, 409 if known else 200)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := REPO.fullmatch(path):
            self._repo(*match.groups(), body)
        elif match := FILE.fullmatch(path):
            self._file(*match.groups())
        else:
            self._send(404, b"{}")

    def _repo(self, name: str, what: str | None, revision: str | None, rest: str | None, body: bytes) -> None:
        hub = self.server
        if name not in hub.repos:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        branches = hub.repos[name]
        if what == "branch":
            branches.setdefault(str(revision), dict(branches["main"]))
            self._json({})
            return
        revision = next((branch for branch in branches if _sha(branch) == revision), revision)
        if revision is not None and revision not in branches:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        files = branches[revision or "main"]
        if what in (None, "revision"):
            siblings = [{"rfilename": path} for path in files]
            self._json(
                {
                    "id": name,
                    "sha": _sha(revision or "main"),
                    "siblings": siblings,
                    "private": name in hub.private,
                    "tags": [],
                }
            )
        elif what == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            self._json({"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked]})
        elif what == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            new = [line["value"] for line in lines if line["key"] == "file"]
            files |= {file["path"]: base64.b64decode(file["content"]) for file in new}
            hub.commits.append((lines[0]["value"]["summary"], [file["path"] for file in new]))
            self._json({"success": True, "commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})
        elif what == "paths-info":
            form = dict(part.split("=", 1) for part in unquote(body.decode()).split("&") if "=" in part)
            paths = json.loads(body)["paths"] if body.startswith(b"{") else [form["paths"]]
            self._json([_entry(files, path) for path in paths if _entry(files, path)])
        elif what == "tree":
            inside = f"{rest}/" if rest else ""
            below = [path[len(inside) :].split("/") for path in files if path.startswith(inside)]
            deep = "recursive=true" in urlsplit(self.path).query.lower()
            heads = {inside + "/".join(parts[: i + 1]) for parts in below for i in range(len(parts) if deep else 1)}
            if not heads:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                return
            self._json([_entry(files, path) for path in sorted(heads)])
        else:
            self._send(404, b"{}")

    def _file(self, name: str, revision: str, path: str) -> None:
        branches = self.server.repos.get(name, {})
        revision = next((branch for branch in branches if _sha(branch) == revision), revision)
        files = branches.get(revision)
        if files is None or path not in files:
            kind = "EntryNotFound" if files is not None else "RevisionNotFound" if branches else "RepoNotFound"
            self._send(404, b"{}", {"X-Error-Code": kind})
            return
        data, status, more = files[path], 200, {"ETag": f'"{hash(files[path]):x}"', "X-Repo-Commit": _sha(revision)}
        if (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")) and self.command == "GET":
            start, stop = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            more["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
            data, status = data[start : stop + 1], 206
        self._send(status, data, more)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, tree: Any, status: int = 200) -> None:
        self._send(status, json.dumps(tree).encode())

    def _send(self, status: int, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(more or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _sha(branch: str) -> str:
    """Stands for the commit that a branch is at."""
    return hashlib.sha1(branch.encode()).hexdigest()


def _entry(files: dict[str, bytes], path: str) -> dict[str, Any] | None:
    if path in files:
        return {"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40}
    if any(other.startswith(f"{path}/") for other in files):
        return {"type": "directory", "path": path, "oid": "0" * 40}
    return None

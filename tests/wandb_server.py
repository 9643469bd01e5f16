# SPDX-License-Identifier: Apache-2.0
"""A server on loopback that answers what wandb (0.31) asks of wandb.ai, and keeps what it is sent."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PLACE = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}


class Server:
    """Attributes: ``url``; ``runs``, by id: its lines by the name of a stream, each at the place that it was sent to;
    ``files``, by the path that they were uploaded as."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
        self.files: dict[str, bytes] = {}
        self._server = _Quiet(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def history(self, run: str) -> list[dict[str, Any]]:
        """What the run logged, in its order."""
        lines = self.runs[run].get("wandb-history.jsonl", {})
        assert sorted(lines) == list(range(len(lines)))
        return [lines[i] for i in sorted(lines)]

    def stream(self, run: str, files: dict[str, Any]) -> None:
        for name, sent in files.items():
            lines = self.runs[run].setdefault(name, {})
            for i, text in enumerate(sent["content"]):
                lines[sent["offset"] + i] = json.loads(text) if name.endswith(".jsonl") else {"text": text}

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            name = variables["name"]
            inserted = name not in self.runs
            self.runs.setdefault(name, {})
            bucket = {"id": "x", "name": name, "displayName": name, "config": "{}", "project": PLACE}
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if "historyTail" in query:
            return {"model": PLACE | {"bucket": self._resume(variables["name"])}}
        if "createRunFiles" in query:
            files = [{"name": f, "uploadUrl": f"{self.url}/{variables['run']}/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "u", "flags": "{}", "entity": "e", "username": "u", "teams": {"edges": []}}}
        return {}

    def _resume(self, name: str) -> dict[str, Any] | None:
        if name not in self.runs:
            return None
        counts = {key: len(self.runs[name].get(f"wandb-{key}.jsonl", {})) for key in ("history", "events")}
        tail = [json.dumps(line) for line in self.history(name)[-1:]]
        return {
            "name": name,
            "historyLineCount": counts["history"],
            "eventsLineCount": counts["events"],
            "logLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "summaryMetrics": "{}",
            "config": "{}",
            "tags": [],
        }


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:  # wandb leaves connections as they are
        pass


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _reply(self, data: dict[str, Any]) -> None:
            body = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._reply({})

        def do_PUT(self) -> None:
            server.files[self.path] = self._body()
            self._reply({})

        def do_POST(self) -> None:
            asked = json.loads(self._body() or b"{}")
            if self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], asked.get("files") or {})
                self._reply({})
            else:
                self._reply({"data": server.answer(asked.get("query", ""), asked.get("variables") or {})})

    return Handler

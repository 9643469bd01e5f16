# SPDX-License-Identifier: Apache-2.0
"""Credentials in URLs: whatever a command is given, and whatever the place answers, they are in nothing that it prints
or writes."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from view_models import CPU

from igae.cli import evaluate, export, fit, pack, train
from igae.errors import command
from igae.storage import LIMITS
from igae.viewer import Followed

USER, SECRET = "Qcanaryuser", "Qcanary4711Z"
ANSWERS = ("403", "404", "redirect", "garbage", "hang up")
KINDS = {
    "password": "http://{user}:{secret}@{host}/{answer}/x",
    "query": "http://{host}/{answer}/x?X-Amz-Credential={user}&X-Amz-Signature={secret}",
    "chained": "simplecache::http://{user}:{secret}@{host}/{answer}/x",
    "s3": "s3://{user}:{secret}@{answer}/x",
    "no such host": "http://{user}:{secret}@no-such-host.invalid/{answer}/x",
    "unknown scheme": "nowhere://{user}:{secret}@{host}/{answer}/x",
}


class Handler(BaseHTTPRequestHandler):
    """Answers as the path says; the answer repeats what it was asked, as stores do."""

    def do_GET(self) -> None:
        kind = next((answer for answer in ANSWERS if answer.replace(" ", "-") in self.path), "404")
        body = f"<Error><Message>denied: {self.path} {self.headers.get('Authorization')}</Message></Error>".encode()
        if kind == "hang up":
            self.connection.close()
            return
        self.send_response({"403": 403, "404": 404, "redirect": 302, "garbage": 200}[kind])
        if kind == "redirect":
            self.send_header("Location", f"http://{USER}:{SECRET}@{self.headers['Host']}/403/y?token={SECRET}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@command
def view(argv: list[str] | None) -> None:
    assert argv is not None
    Followed(argv[0], argv[1:], CPU)


COMMANDS: dict[str, Callable[[str, str, Path], int]] = {
    "train, data": lambda url, recipe, out: train.main(["--config", recipe, f"data.root={url}", f"outputs={out}"]),
    "train, checkpoints": lambda url, recipe, out: train.main(
        ["--config", recipe, f"checkpoint.root={url}", f"outputs={out}"]
    ),
    "train, autoencoder": lambda url, recipe, out: train.main(
        ["--config", recipe, f"autoencoder={{path: '{url}'}}", f"outputs={out}"]
    ),
    "train, resume": lambda url, recipe, out: train.main(["--config", recipe, "--resume", url, f"outputs={out}"]),
    "train, outputs": lambda url, recipe, out: train.main(["--config", recipe, f"outputs={url}"]),
    "train, configuration": lambda url, recipe, out: train.main(["--config", url]),
    "fit": lambda url, recipe, out: fit.main([f"model={url}", f"data.root={out}", f"outputs={out}"]),
    "evaluate": lambda url, recipe, out: evaluate.main(["--checkpoint", url, "--output", str(out)]),
    "export": lambda url, recipe, out: export.main([url, str(out / "export")]),
    "view": lambda url, recipe, out: view([url]),
    "pack, scenes": lambda url, recipe, out: pack.main(["--scenes", url, "--output", str(out / "p"), "--workers=1"]),
    "pack, images": lambda url, recipe, out: pack.main(["--images", url, "--output", str(out / "p"), "--workers=1"]),
    "pack, verify": lambda url, recipe, out: pack.main(["--verify", url]),
    "a typo": lambda url, recipe, out: train.main(["--config", recipe, f"data.rot={url}"]),
}


@pytest.mark.usefixtures("one_run_a_process")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_tells_credentials(
    name: str,
    kind: str,
    host: str,
    recipe_file: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for limit, value in {"total_seconds": 0.5, "attempt_seconds": 0.3, "attempts": 1, "first_wait": 0.01}.items():
        monkeypatch.setattr(LIMITS, limit, value)
    out = tmp_path / "out"
    for answer in ANSWERS if kind in ("password", "s3") else ANSWERS[:1]:
        url = KINDS[kind].format(user=USER, secret=SECRET, host=host, answer=answer.replace(" ", "-"))
        code = COMMANDS[name](url, recipe_file, out)
        said = "".join(capfd.readouterr())
        assert code in (1, 2), (answer, code, said)
        assert SECRET not in said and USER not in said and "Traceback" not in said, (answer, said)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "recipe.yaml"]
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []

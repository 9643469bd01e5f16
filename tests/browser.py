# SPDX-License-Identifier: Apache-2.0
"""A page in a headless Chromium (Chrome DevTools Protocol over pipes): what it asks for, what it complains of."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Chromium reads commands from descriptor 3 and writes answers to 4, each ended by a zero byte.
START = 'exec "$@" 3<&{0} 4>&{1}'


class Page:
    """Attributes: ``requests``, URLs of all that was asked for (the page itself and web sockets too); ``complaints``,
    warnings and errors in the console and uncaught exceptions; ``errors``, those of them that are no warnings."""

    def __init__(self, commands: int, answers: int, size: tuple[int, int]) -> None:
        self._commands, self._answers, self._data, self._last = commands, answers, b"", 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.errors: list[str] = []
        self._events: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self.resize(*size)

    def resize(self, width: int, height: int) -> None:
        """The window, in pixels."""
        window = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **window)

    def open(self, url: str) -> None:
        self._events.clear()
        self._call("Page.navigate", url=url)
        self._until(lambda: "Page.loadEventFired" in self._events)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression (of its promise)."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def click(self, selector: str) -> None:
        """A click of the mouse on the middle of an element, which is scrolled to."""
        box = self.run(
            f"(e => {{e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            f"return [b.x + b.width / 2, b.y + b.height / 2]}})(document.querySelector({json.dumps(selector)}))"
        )
        self.drag([box])

    def click_text(self, text: str) -> None:
        """A click on the smallest visible element with this text, which is waited for."""
        mark = (
            "(text => {const found = [...document.querySelectorAll('*')].filter(e => e.innerText?.trim() === text"
            " && e.getClientRects().length).at(-1); found?.setAttribute('data-found', ''); return found !== undefined})"
        )
        self.wait_for(f"{mark}({json.dumps(text)})")
        self.click("[data-found]")
        self.run("document.querySelector('[data-found]')?.removeAttribute('data-found')")

    def drag(self, points: list[list[float]]) -> None:
        """The left button is pressed at the first point (x, y in pixels), moved along the others and released."""

        def mouse(kind: str, point: list[float], held: int) -> None:
            place = {"x": point[0], "y": point[1], "button": "left", "buttons": held, "clickCount": 1}
            self._call("Input.dispatchMouseEvent", type=kind, **place)

        mouse("mousePressed", points[0], 1)
        for point in points[1:]:
            mouse("mouseMoved", point, 1)
        mouse("mouseReleased", points[-1], 0)

    def place_of(self, label: str, selector: str, x: float = 0.5, y: float = 0.5) -> list[float]:
        """A point of a control, which is scrolled to: in the element with a selector in the smallest box around its
        label, at fractions of its width and height."""
        found = self.run(
            "((label, selector, x, y) => {const texts = [...document.querySelectorAll('label, div')]"
            ".filter(e => e.childElementCount === 0 && e.innerText?.trim() === label && e.getClientRects().length);"
            "for (let e = texts.at(-1); e; e = e.parentElement) {const inside = e.querySelector(selector);"
            "if (inside) {inside.scrollIntoView({block: 'center'}); const b = inside.getBoundingClientRect();"
            f"return [b.x + x * b.width, b.y + y * b.height]}}}}}})({json.dumps([label, selector, x, y])[1:-1]})"
        )
        assert found is not None, f"there is no control {label}"
        return [float(value) for value in found]

    def hover(self, point: list[float]) -> None:
        """The mouse comes to a point."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=point[0], y=point[1])

    def press(self, key: str) -> None:
        """A key on the keyboard, such as Enter."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=13)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self._call("Input.insertText", text=text)

    def wait_for(self, script: str, seconds: float = 20) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < deadline, f"not true after {seconds} s: {script}"
            time.sleep(0.05)

    def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to an element that takes one."""
        root = self._call("DOM.getDocument")["root"]["nodeId"]
        node = self._call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def download_to(self, folder: Path) -> None:
        """Where files go that the page gives to be saved."""
        self._call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def screenshot(self, whole: bool = False) -> bytes:
        """A PNG of what is seen, or of the whole page."""
        answer = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        number, answers = self._last, []
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        self._until(lambda: bool(answers), number, answers)
        assert "error" not in answers[0], f"{method}: {answers[0]}"
        return dict(answers[0]["result"])

    def _until(self, done: Any, number: int = -1, answers: list[Any] | None = None) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, "Chromium does not answer"
            if select.select([self._answers], [], [], 1)[0]:
                data = os.read(self._answers, 1 << 20)
                assert data, "Chromium has ended"
                *messages, self._data = (self._data + data).split(b"\0")
                for message in map(json.loads, messages):
                    if message.get("id") == number and answers is not None:
                        answers.append(message)
                    self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, event: str, found: dict[str, Any]) -> None:
        self._events.append(event)
        if event == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif event == "Network.webSocketCreated":
            self.requests.append(found["url"])
        elif event == "Runtime.consoleAPICalled" and found["type"] in ("error", "assert", "warning"):
            self._complain(str(found["args"]), found["type"])
        elif event == "Runtime.exceptionThrown":
            self._complain(str(found["exceptionDetails"]), "error")
        elif event == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self._complain(found["entry"]["text"], found["entry"]["level"])

    def _complain(self, text: str, level: str) -> None:
        self.complaints.append(text)
        if level != "warning":
            self.errors.append(text)


@contextmanager
def page(scratch: Path, webgl: bool = False, size: tuple[int, int] = (1280, 900)) -> Iterator[Page]:
    """A page of a new Chromium, whose profile is in the folder ``scratch``.

    Args:
        webgl: have it, done by the processor.
        size: (width, height) of the window in pixels.
    """
    assert CHROMIUM is not None
    read_commands, commands = os.pipe()
    answers, write_answers = os.pipe()
    for descriptor in (read_commands, write_answers):
        os.set_inheritable(descriptor, True)
    graphics = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    arguments = [CHROMIUM, "--headless=new", "--no-sandbox", *(graphics if webgl else ["--disable-gpu"])]
    arguments += ["--remote-debugging-pipe"]
    arguments += [f"--user-data-dir={scratch}", "--no-first-run", "--disable-background-networking"]
    process = subprocess.Popen(
        ["bash", "-c", START.format(read_commands, write_answers), "chromium", *arguments],
        pass_fds=(read_commands, write_answers),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        yield Page(commands, answers, size)
    finally:
        os.close(commands)
        os.close(answers)
        process.terminate()
        process.wait(20)

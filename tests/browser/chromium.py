"""Chromium without a window, driven over two pipes by its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # which root cannot have
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--use-angle=swiftshader",  # WebGL without a graphics card, for the projector
    "--enable-unsafe-swiftshader",
    "--window-size=1400,1000",
)

TEXT_OF_PAGE = """
(() => {
  const texts = [];
  const visit = node => {
    if (node.nodeType === Node.TEXT_NODE) texts.push(node.data);
    if (node.shadowRoot) visit(node.shadowRoot);
    if (node.tagName === 'IFRAME' && node.contentDocument?.body) visit(node.contentDocument.body);
    if (!['SCRIPT', 'STYLE'].includes(node.tagName)) node.childNodes.forEach(visit);
  };
  if (document.body) visit(document.body);
  return texts.join(' ').replace(/\\s+/g, ' ');
})()
"""
"""All text of the page, that in shadow trees and frames of its own origin too."""


def find_chromium() -> str | None:
    """Returns the path of a Chromium, or None where there is none."""
    return next((path for path in map(shutil.which, NAMES) if path is not None), None)


@dataclass
class Page:
    """A page of the browser.

    Attributes:
        requests: URLs that the page asked for.
        errors: what its scripts failed with, and what the console shows as an error.
    """

    reader: int
    writer: int
    session: str = ""
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _rest: bytes = b""
    _number: int = 0

    def open(self, url: str) -> None:
        """Goes to a page."""
        self.call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> Any:
        """Waits until an expression is true, and returns its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"{expression}\n{self.text()[:3000]}\n{self.errors}"
            time.sleep(0.2)
        return value

    def text(self) -> str:
        """Returns all text of the page."""
        return str(self.evaluate(TEXT_OF_PAGE))

    def wait_for_text(self, text: str, seconds: float = 60) -> None:
        """Waits until the page shows a text."""
        self.wait_for(f"({TEXT_OF_PAGE.strip()}).includes({json.dumps(text)})", seconds)

    def screenshot(self, path: Path) -> None:
        """Keeps what the page looks like, as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result; events that come before it are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            received = self._receive()
            if received.get("id") == self._number:
                assert "error" not in received, (method, received["error"])
                result: dict[str, Any] = received["result"]
                return result
            self._note(received)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self.reader], [], [], 60)
            block = os.read(self.reader, 1 << 16) if ready else b""
            assert block, "Chromium does not answer"
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        loaded: dict[str, Any] = json.loads(message)
        return loaded

    def _note(self, event: dict[str, Any]) -> None:
        method, told = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.errors.append(str(details.get("exception", {}).get("description", details["text"])))
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")


@contextmanager
def open_page(program: str, folder: Path) -> Iterator[Page]:
    """Starts Chromium, with `folder` for its profile, and yields an empty page of it."""
    to_read, to_write = os.pipe(), os.pipe()
    theirs = to_write[0], to_read[1]
    # Chromium reads commands from file 3 and answers on file 4.
    redirected = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
    process = subprocess.Popen(
        ["bash", "-c", redirected, "bash", program, *OPTIONS, f"--user-data-dir={folder}", "about:blank"],
        pass_fds=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(folder)},
    )
    for descriptor in theirs:
        os.close(descriptor)
    page = Page(to_read[0], to_write[1])
    try:
        target = page.call("Target.createTarget", url="about:blank")["targetId"]
        page.session = page.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        yield page
        page.session = ""
        page.call("Browser.close")
    finally:
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        os.close(to_read[0])
        os.close(to_write[1])

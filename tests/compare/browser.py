"""A headless Chromium, driven through chromedriver by the W3C WebDriver protocol, without a package for it.

Pages come from a server in this process, which keeps a list of what was asked for.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id in WebDriver responses


def find_browser() -> tuple[str, str] | None:
    """Paths of the browser and the driver; None if one is missing."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """One WebDriver session."""

    def __init__(self, session: str) -> None:
        self._session = session

    def call(self, path: str, body: Any = None, method: str | None = None) -> Any:
        return ask(f"{self._session}{path}", body, method)

    def open(self, url: str) -> None:
        self.call("/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a JavaScript function body returns."""
        return self.call("/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> str:
        element: str = self.call("/element", {"using": "css selector", "value": selector})[ELEMENT]
        return element

    def click(self, selector: str) -> None:
        self.call(f"/element/{self.find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self.call(f"/element/{self.find(selector)}/value", {"text": text})

    def point_at(self, selector: str) -> None:
        """Moves the mouse to the middle of an element."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        origin = {ELEMENT: self.find(selector)}
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": origin}
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
        self.call("/actions", {"actions": [mouse]})

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.call("/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Every URL that the browser's network layer requested since the last call, but those of its own pages."""
        events = [json.loads(e["message"])["message"] for e in self.call("/se/log", {"type": "performance"})]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("chrome://")]  # its new tab may still be loading


def ask(url: str, body: Any = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode(errors="replace")[:2000]) from error


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in `profile`."""
    programs = find_browser()
    assert programs is not None
    browser, driver = programs
    with subprocess.Popen(
        [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if "started successfully on port" in line)
            base = f"http://127.0.0.1:{line.rsplit(' ', 1)[1].strip().rstrip('.')}"
            options = {"binary": browser, "args": [*FLAGS, f"--user-data-dir={profile}", "--window-size=1200,900"]}
            capabilities = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            session = ask(f"{base}/session", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]
            client = Browser(f"{base}/session/{session}")
            try:
                yield client
            finally:
                client.call("", method="DELETE")
        finally:
            process.terminate()


@contextmanager
def served(pages: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serves `pages` locally; yields the address and the list of requested paths."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content = pages.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""A headless Chromium for the test of report.html, spoken to over two pipes: no port, no driver, no package.

The protocol is the DevTools protocol (https://chromedevtools.github.io/devtools-protocol/): JSON messages, each ended
by a zero byte; Chromium reads them from file descriptor 3 and writes to 4.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe --hide-scrollbars"
).split()
TIMEOUT = 60  # seconds for an answer: a busy machine starts Chromium slowly


class Browser:
    """One tab. `requests` has the addresses of all that it asked for, `problems` what its console complained about."""

    def __init__(self, profile: Path, width: int = 1400, height: int = 1000) -> None:
        to_browser, ours_out = os.pipe()
        ours_in, from_browser = os.pipe()
        self.input, self.output, self.profile = ours_in, ours_out, profile
        arranged = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", arranged, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.number, self.received, self.session = 0, b"", None
        self.requests: list[str] = []
        self.problems: list[str] = []
        (target,) = (each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.call("Browser.close")
        self.process.kill()
        self.process.wait()
        os.close(self.input)
        os.close(self.output)

    def read(self, until: float) -> dict[str, Any]:
        while b"\0" not in self.received:
            if not select.select([self.input], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError("Chromium gives no answer")
            chunk = os.read(self.input, 1 << 20)
            if not chunk:
                raise ConnectionError("Chromium has ended")
            self.received += chunk
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.output, data) :]
        until = time.monotonic() + TIMEOUT
        while True:
            answer = self.read(until)
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.note(answer)

    def note(self, event: dict[str, Any]) -> None:
        name, details = event.get("method"), event.get("params", {})
        if name == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        elif name == "Log.entryAdded":
            self.problems.append(details["entry"]["text"])
        elif name == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(details["exceptionDetails"].get("exception", details)))
        elif name == "Runtime.consoleAPICalled":
            self.problems.append(json.dumps(details["args"]))

    def open(self, page: Path, dark: bool = False) -> float:
        """Returns after how many seconds the page had loaded."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        began = time.monotonic()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.until(f"location.href == {json.dumps(page.resolve().as_uri())} && document.readyState == 'complete'")
        return time.monotonic() - began

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails'].get('exception', {}).get('description')}")
        return result["result"].get("value")

    def until(self, condition: str, seconds: float = TIMEOUT) -> None:
        end = time.monotonic() + seconds
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(condition)
            time.sleep(0.02)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if kind == "keyDown" and len(key) == 1 else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **text)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """kind: mousePressed, mouseMoved (with the button held) or mouseReleased."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def screenshot(self, path: Path, clip: tuple[float, float, float, float] | None = None) -> None:
        """Of what is in sight, or of a rectangle (left, top, width, height) of the page."""
        more = {}
        if clip is not None:
            more = {
                "clip": dict(zip(("x", "y", "width", "height"), clip)) | {"scale": 1},
                "captureBeyondViewport": True,
            }
        data = self.call("Page.captureScreenshot", format="png", **more)["data"]
        path.write_bytes(base64.b64decode(data))

"""A small client of Chromium's DevTools protocol: opens pages, clicks, hovers, and keeps what the console says.

It speaks through a pipe (--remote-debugging-pipe), so it needs no WebSocket and no package.
"""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless=new",
    "--no-sandbox",  # a container's root has no other way
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--allow-file-access-from-files",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
# Chromium reads commands from file descriptor 3 and writes to 4.
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """A headless Chromium with its own profile in `folder`; use it in a `with` statement."""

    def __init__(self, folder: Path):
        command_read, command_write = _pipe()
        answer_read, answer_write = _pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(command_read), str(answer_write), EXECUTABLE]  # noqa: RUF005
            + [*FLAGS, f"--user-data-dir={folder}"],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        self._commands = os.fdopen(command_write, "wb", buffering=0)
        self._numbers = itertools.count(1)
        self._answers: dict[int, queue.Queue] = {}
        self._pages: dict[str, Page] = {}
        self._reader = threading.Thread(target=self._read, args=(os.fdopen(answer_read, "rb"),), daemon=True)
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(OSError, AssertionError):
            self.send("Browser.close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(20)
        self._commands.close()

    def open(self, path: Path | str, *, width=1280, height=900, dark=False, script="") -> "Page":
        """Opens a local file, or a URL, in a page of its own; `script` runs before the page's own."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        page.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        if script:
            page.send("Page.addScriptToEvaluateOnNewDocument", source=script)
        page.send("Page.navigate", url=path if isinstance(path, str) else path.resolve().as_uri())
        page.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page

    def send(self, method: str, session: str | None = None, **parameters):
        """Sends a command and gives its result; fails with Chromium's message."""
        number = next(self._numbers)
        answer = self._answers[number] = queue.Queue()
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        self._commands.write(json.dumps(message).encode() + b"\0")
        try:
            reply = answer.get(timeout=30)
        except queue.Empty:
            raise AssertionError(f"Chromium did not answer to {method}") from None
        finally:
            del self._answers[number]
        assert "error" not in reply, f"{method}: {reply.get('error')}"
        return reply["result"]

    def _read(self, pipe):
        rest = b""
        with pipe:
            while chunk := pipe.read1(1 << 16):
                *messages, rest = (rest + chunk).split(b"\0")
                for message in map(json.loads, messages):
                    if "id" in message:
                        waiting = self._answers.get(message["id"])
                        if waiting is not None:
                            waiting.put(message)
                    elif message.get("sessionId") in self._pages:
                        self._pages[message["sessionId"]].note(message["method"], message["params"])


class Page:
    """A page that is open. complaints: console errors, exceptions, refused requests; requests: addresses asked for."""

    def __init__(self, browser: Browser, session: str, target: str):
        self._browser, self._session, self._target = browser, session, target
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.loads = 0

    def note(self, method, event):
        if method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console.{event['type']}: {[a.get('value') for a in event['args']]}")
        elif method == "Log.entryAdded":
            self.complaints.append(f"{event['entry']['level']}: {event['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loads += 1
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {event['message']}")
            threading.Thread(target=self.send, args=("Page.handleJavaScriptDialog",), kwargs={"accept": True}).start()

    def send(self, method, **parameters):
        return self._browser.send(method, self._session, **parameters)

    def js(self, expression: str):
        """The value of a JavaScript expression in the page."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 10.0) -> None:
        """Returns when an expression holds; a page that is being loaded again is asked once more."""

        def holds():
            with contextlib.suppress(AssertionError):
                return self.js(expression)

        self.until(holds, expression, seconds)

    def until(self, holds, what="", seconds: float = 10.0) -> None:
        """Returns when `holds()`."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"never {what}\n{self.complaints}"
            time.sleep(0.02)

    def place(self, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
        """A point of the first element of a CSS selector, scrolled into view; (0, 0) is its upper left corner."""
        box = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            " return [b.x, b.y, b.width, b.height] })()"
        )
        assert box and box[2] and box[3], f"{selector} can't be seen"
        return box[0] + x * box[2], box[1] + y * box[3]

    def click(self, selector: str) -> None:
        """Clicks with the mouse, where the element really is."""
        x, y = self.place(selector)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Moves the mouse over a point of an element."""
        left, top = self.place(selector, x, y)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=left, y=top)

    def press(self, key: str) -> None:
        """Presses a key where the focus is."""
        codes = {"Enter": 13, "Tab": 9, "End": 35, "ArrowLeft": 37, "ArrowRight": 39, " ": 32}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        kind = {"key": key, "windowsVirtualKeyCode": codes[key], "code": key}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **kind)
        self.send("Input.dispatchKeyEvent", type="keyUp", **kind)

    def screenshot(self, path: Path, *, whole=True) -> None:
        """Writes a PNG of the page, all of it or what the window shows."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}} if whole else {}
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self._browser.send("Target.closeTarget", targetId=self._target)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends lie above 9, so that Chromium's 3 and 4 are free in the process that becomes it."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high

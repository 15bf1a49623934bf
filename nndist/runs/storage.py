"""Where a run is kept besides its folder: nowhere, or in a store, whose process this starts, hears and ends."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import machine
from ..errors import UserError
from ..files import PACKAGE
from ..stores import redacted
from .sending import STALLED

SILENT_SECONDS = 1.5
"""Of waiting at the end of a run before the user is told why."""
IDLE_SECONDS = 120.0
"""At the end: a store that takes nothing for so long is given up."""
WAIT_SECONDS = 3600.0
PREEMPTED_SECONDS = 30.0
"""Whoever stops a run does not wait long."""
FIRST_PAUSE_SECONDS = 2.0
MAX_PAUSE_SECONDS = 300.0


class NoStorage:
    """A run that is kept in its folder alone."""

    url = ""
    say: Callable[[str], None] = print

    def fetch(self, folder: Path) -> list[str]:
        """Brings what the run is resumed from into its folder; returns notes. Raises UserError."""
        return []

    def holds(self, step: int) -> bool:
        """Whether the checkpoint of this step was in the store at the start."""
        return False

    def end(self, status: str, most_seconds: float = WAIT_SECONDS) -> None:
        """Waits, for a bounded time, until the rest is sent."""


class Storage(NoStorage):
    """A run that a separate process sends to a store, from `fetch` on. For the main process.

    url: of the run's folder in the store. A process that ends before its time is started again.
    """

    def __init__(self, url: str):
        self.url = redacted(url)  # for people
        self._given = url
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path()
        self._steps: set[int] = set()
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._heard = time.monotonic()
        self._last: int | None = None
        self._why = ""  # why not everything is sent
        self._ended = False  # the training has
        self._over = threading.Event()  # the process has, for good

    def fetch(self, folder: Path) -> list[str]:
        self._folder = folder
        self._start(fetch=True)
        threading.Thread(target=self._hear, name="storage", daemon=True).start()
        answer = self._answers.get()
        if "error" in answer:
            raise UserError(answer["error"])
        self._steps = set(answer["ready"]["steps"])
        return list(answer["ready"]["notes"])

    def holds(self, step: int) -> bool:
        return step in self._steps

    def end(self, status: str, most_seconds: float = WAIT_SECONDS) -> None:
        if self._process is None:
            return
        self._ended = True
        self._say_to_process({"status": status})
        most = min(most_seconds, PREEMPTED_SECONDS if status == "preempted" else WAIT_SECONDS)
        began = self._heard = time.monotonic()
        try:
            if not self._over.wait(SILENT_SECONDS):
                self.say(f"{self.url}: waiting for the rest to be sent, {most:g} s at most; Ctrl-C skips it")
            while not self._over.wait(0.2):
                now = time.monotonic()
                if now - began > most or now - self._heard > IDLE_SECONDS:
                    self._why = self._why or f"not sent within {now - began:.0f} s"
                    break
        except KeyboardInterrupt:
            self._why = "interrupted"
        self._over.set()
        self._process.kill()
        if self._why:
            last = "nothing" if self._last is None else f"step {self._last:,}"
            self.say(
                f"{self.url}: not everything was sent ({self._why}; last sent: {last}); the run is whole in "
                f"{self._folder}: nndist push {self._folder} {self.url.rsplit('/', 2)[0]} sends the rest"
            )

    def _start(self, *, fetch: bool) -> None:
        path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from nndist.runs.sending import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # clients write keys and whole requests there
            env={**os.environ, "PYTHONPATH": path},
            **machine.own_group(),  # Ctrl-C goes to the training, which then ends this process itself
        )
        self._say_to_process({"url": self._given, "shown": self.url, "folder": str(self._folder), "fetch": fetch})

    def _say_to_process(self, what: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone: `_hear` notices
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()

    def _hear(self) -> None:
        pause, began = FIRST_PAUSE_SECONDS, False
        while True:
            assert self._process is not None and self._process.stdout is not None
            for line in self._process.stdout:
                self._heard = time.monotonic()
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                    began = began or "ready" in message
                    if "sent" in message:
                        self._last, self._why, pause = max(message["sent"], default=None), "", FIRST_PAUSE_SECONDS
                    self._take(message, began)
            code = self._process.wait()
            if self._over.is_set():
                return
            why = f"its process ended with code {code}" if code != STALLED else "it took nothing for minutes"
            if not began:
                self._answers.put({"error": f"{self.url}: {why} before the run began"})
                return
            if not self._ended:
                self.say(f"{self.url}: {why}; checkpoints are kept locally, and it is started again")
            self._why = why
            if self._over.wait(pause):
                return
            pause = min(2 * pause, MAX_PAUSE_SECONDS)
            self._start(fetch=False)
            if self._ended:
                self._say_to_process({"status": "again"})

    def _take(self, message: dict[str, Any], began: bool) -> None:
        """What the process says: a line, an answer to `fetch`, a failure, its end."""
        if "say" in message:
            self.say(message["say"])
        if "failing" in message:
            self._why = message["failing"]
        if "done" in message:
            self._why = ""
            self._over.set()
        if "error" in message and began:
            self._why = message["error"]
            self.say(f"{self._why}; nothing more is sent")
            self._over.set()
        elif "ready" in message or "error" in message:
            self._answers.put(message)
            if "error" in message:
                self._over.set()

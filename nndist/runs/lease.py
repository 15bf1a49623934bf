"""Who trains a run in a store: a small object that the holder renews.

Stores have no locks that fsspec knows, so this notices a second launch as well as files can: it reads whose lease there
is, watches whether that is renewed, writes its own and reads it back after a moment. Two launches whose writes cross
within that moment may both begin; the lease is read again before each manifest, so one of them is then told and sends
nothing more. A holder that is cut off from the store for longer than EXPIRY_SECONDS loses the lease in the same way.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import parse_json, read_bytes, write_whole
from ..stores import Store

NAME = "lease.json"
TOKEN = ".lease"
"""The file in the local folder with the name under which this folder takes leases."""
KIND = {"holder": str, "host": str, "process": int, "since": str, "renewed": int}
RENEW_SECONDS = 15.0
EXPIRY_SECONDS = 45.0
"""A lease that was not renewed for so long is a dead process's. It is watched that long, as machines' clocks differ."""
POLL_SECONDS = 3.0
SETTLE_SECONDS = 1.0
"""Between writing a lease and reading it back."""


class LostLease(Exception):
    """A different launch has taken the run over; the message names it."""


class Lease:
    """The lease of the run in a store for a local folder, whose own lock keeps other processes of this machine out."""

    def __init__(self, store: Store, folder: Path, say: Callable[[str], None]):
        self._store, self._say = store, say
        self._holder = _own_name(folder / TOKEN)
        self._renewed = 0
        self._since = datetime.now().isoformat(timespec="seconds")

    def claim(self) -> None:
        """Takes the lease, after watching a different holder's; raises UserError if that is alive, and StoreError."""
        found = self._found()
        if found is not None and found["holder"] != self._holder:
            self._say(f"{self._store.url}: was trained on {_holder_of(found)}; waiting to see whether it still is")
            deadline = time.monotonic() + EXPIRY_SECONDS
            while time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                now = self._found()
                if now is None:
                    break
                if now != found:
                    raise UserError(self._taken(now))
        self.renew()
        time.sleep(SETTLE_SECONDS)
        found = self._found()
        if found is not None and found["holder"] != self._holder:
            raise UserError(self._taken(found))

    def renew(self) -> None:
        """Tells others that this process still trains the run; raises StoreError."""
        self._renewed += 1
        lease = {"holder": self._holder, "host": socket.gethostname(), "process": os.getppid()}
        lease |= {"since": self._since, "renewed": self._renewed}
        self._store.write(NAME, json.dumps(lease).encode())

    def check(self) -> None:
        """Raises LostLease if it is a different launch's now, and StoreError."""
        found = self._found()
        if found is not None and found["holder"] != self._holder:
            raise LostLease(self._taken(found))

    def release(self) -> None:
        """Gives the lease up, if it is still held; raises StoreError."""
        found = self._found()
        if found is not None and found["holder"] == self._holder:
            self._store.remove(NAME)

    def _found(self) -> dict[str, Any] | None:
        try:
            return parse_json(self._store.read(NAME), KIND)
        except (FileNotFoundError, ValueError):  # none, or one that was cut while it was written
            return None

    def _taken(self, lease: dict[str, Any]) -> str:
        return f"{self._store.url}: is being trained on {_holder_of(lease)}; wait for it, or give another --run"


def _holder_of(lease: dict[str, Any]) -> str:
    return f"{lease['host'][:80]!r} (process {lease['process']}, since {lease['since'][:19]})"


def _own_name(path: Path) -> str:
    """The name in a file, which is made if there is none: it stays the same for all launches in a folder."""
    try:
        return str(parse_json(read_bytes(path, 100), str))
    except (OSError, ValueError):
        name = uuid.uuid4().hex
        write_whole(path, json.dumps(name).encode())
        return name

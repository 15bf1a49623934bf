"""Sending a run's folder to a store while it is trained: in a process of its own, which only reads the folder.

The training never waits for a store: it writes to its disk, and this process sends what it finds there, the newest
checkpoint first. A client that fails is tried again after a pause; one that hangs ends this process, and the training
starts it again.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from .. import machine
from ..errors import UserError
from ..files import open_regular, open_to_append, read_bytes
from ..stores import Store, StoreError, is_url, reason
from .fetching import ABOUT, CHECKPOINTS, Fetching, is_page, steps_of
from .lease import RENEW_SECONDS, Lease, LostLease
from .manifest import MANIFEST, DamagedCheckpoint, folder_name, parse_manifest
from .reading import checkpoints_in
from .records import FILE

POLL_SECONDS = 0.5
FIRST_PAUSE_SECONDS = 2.0
"""Before a store that failed is tried again; it doubles up to MAX_PAUSE_SECONDS."""
MAX_PAUSE_SECONDS = 300.0
ATTEMPTS_AT_START = 4
PAGES_SECONDS = 30.0
"""The least time between two versions of a page in the store, also ten times what sending them took."""
STALL_SECONDS = 300.0
"""A client that transfers no part for so long hangs: more than one of 16 MiB takes at 60 kB/s."""
PROGRESS_SECONDS = 5.0
SMALL_BYTES = 64 << 20
SAID_BYTES = 256 << 20
"""Between two lines of a push."""
STALLED = 4
"""Exit code of the process if its client hangs."""


class Sender:
    """Sends what a folder holds and a store lacks; the steps that are whole there are in `complete`.

    say: shows a line to the user. told: see stores. `all` raises StoreError, and LostLease if a different launch has
    the run now.
    """

    def __init__(
        self, store: Store, folder: Path, lease: Lease, say: Callable[[str], None], told: Callable[[int], None]
    ):
        self.store, self.folder, self.lease, self.say, self.told = store, folder, lease, say, told
        self.root = folder / CHECKPOINTS
        self.complete: set[int] = set()
        self._names: list[str] | None = None  # in the store
        self._pages: dict[str, tuple[int, int]] = {}  # time and size of each page as it was sent
        self._snapshots: set[str] = set()
        self._next_pages = 0.0

    @property
    def last(self) -> int | None:
        """The newest step that is whole in the store, as far as this process knows."""
        return max(self.complete, default=None)

    def all(self, *, final: bool = False) -> None:
        """Sends the newest checkpoint with what it needs, then older ones that are kept, then pages that are due."""
        found = checkpoints_in(self.root)
        if found and found[-1][0] not in self.complete:
            newest = self._send_checkpoint(found[-1][0])
            if newest is not None:
                self._pages_now()
                self._remove_all_but({newest["step"], *_steps(newest["state"].get("saved"))})
                for step in reversed(_steps(newest["state"].get("saved"))):
                    if checkpoints_in(self.root)[-1:] == found[-1:]:  # else there is something newer to do
                        self._send_checkpoint(step)
        if final or time.monotonic() >= self._next_pages:
            self._pages_now()

    def _send_checkpoint(self, step: int) -> dict[str, Any] | None:
        """Sends a checkpoint unless it is there; returns its manifest, or None if it is gone or damaged here."""
        path, there = self.root / folder_name(step), f"{CHECKPOINTS}/{folder_name(step)}"
        with contextlib.ExitStack() as stack:
            try:
                data = read_bytes(path / MANIFEST)
                manifest = parse_manifest(data, path.name)
                # opened now: what is removed while it is sent stays readable
                opened = {name: stack.enter_context(open_regular(path / name)) for name in manifest["files"]}
                records = stack.enter_context(open_regular(self.folder / FILE))
            except (OSError, DamagedCheckpoint):
                return None
            if step in self.complete:
                return manifest
            before = self._read(f"{there}/{MANIFEST}")
            if before == data:
                self.complete.add(step)
                return manifest
            best = manifest["state"].get("best")
            if isinstance(best, dict) and best.get("step") not in (None, step) and best["step"] not in self.complete:
                self._send_checkpoint(best["step"])
            if before is not None:
                self.store.remove(f"{there}/{MANIFEST}")  # never one beside files that it does not name
            self._send_snapshots(step)
            sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
            for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
                self.store.send(f"{there}/{name}", opened[name], sizes[name], self.told)
            self.store.send(f"{there}/{FILE}", records, int(manifest["state"].get("metrics_bytes", 0)), self.told)
            self._send_file(self.folder / ABOUT, f"{there}/{ABOUT}")
            self.lease.check()
            self.store.write(f"{there}/{MANIFEST}", data)
            self.complete.add(step)
            return manifest

    def _read(self, name: str) -> bytes | None:
        try:
            return self.store.read(name)
        except FileNotFoundError:
            return None

    def _send_snapshots(self, last: int) -> None:
        for path in sorted((self.folder / "snapshots").glob("step-*.safetensors")):
            number = path.stem.removeprefix("step-")
            if path.name not in self._snapshots and number.isdecimal() and int(number) <= last:
                self._send_file(path, f"snapshots/{path.name}")
                self._snapshots.add(path.name)

    def _remove_all_but(self, kept: set[int]) -> None:
        """Removes older checkpoints, and parts of some, once a newer one is whole; the manifest of each first."""
        names = self.store.names(CHECKPOINTS)
        folders = {name.split("/")[1] for name in names if name.count("/") == 2}
        for folder in sorted(folders - {folder_name(step) for step in kept}):
            if not folder.startswith("step-"):
                continue
            self.store.remove(f"{CHECKPOINTS}/{folder}/{MANIFEST}")
            self.store.remove_folder(f"{CHECKPOINTS}/{folder}")
        self.complete &= kept

    def _pages_now(self) -> None:
        began = time.monotonic()
        # not by rglob, which fails if a checkpoint is removed while its folder is listed
        found = [Path(place, name) for place, _, names in os.walk(self.folder) for name in names]
        pages = sorted(filter(is_page, (path.relative_to(self.folder).as_posix() for path in found if path.is_file())))
        # run.json says which records there are, and so comes after them
        for name in sorted(pages, key=lambda name: (name == ABOUT, name)):
            self._send_page(name)
        now = time.monotonic()
        self._next_pages = now + max(PAGES_SECONDS, 10 * (now - began))

    def _send_page(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            status = (self.folder / name).stat()
            version = (status.st_mtime_ns, status.st_size)
            if self._pages.get(name) != version:
                self._send_file(self.folder / name, name)
                self._pages[name] = version

    def _send_file(self, path: Path, name: str) -> None:
        with contextlib.ExitStack() as stack:
            try:
                file: BinaryIO = stack.enter_context(open_regular(path, follow=False))
                size = os.fstat(file.fileno()).st_size
                if size <= SMALL_BYTES:  # not held open while it is sent: on Windows it could not be replaced meanwhile
                    data = file.read(size)
                    stack.close()
                    file, size = io.BytesIO(data), len(data)
            except OSError:
                return  # a link, or removed since it was listed
            self.store.send(name, file, size, self.told)


def _steps(saved: Any) -> list[int]:
    return sorted(step for step in saved if isinstance(step, int)) if isinstance(saved, list) else []


def push(folder: Path, url: str, *, say: Callable[[str], None]) -> bool:
    """Sends what a store lacks of a run that is not being trained; returns whether all of it was sent.

    url: of all runs in the store. Raises UserError.
    """
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder}: not a run; name a run's folder, such as runs/mnist_cnn/first")
    if not is_url(url):
        raise UserError(f"{url}: not a URL; name where all runs are kept, such as s3://bucket/runs")
    folder = folder.absolute()
    with open_to_append(folder / "lock") as lock:
        try:
            machine.lock(lock, wait=False)
        except OSError as error:
            raise UserError(f"{folder}: is being trained, which sends it too; wait for its end") from error
        store = Store("/".join([url.rstrip("/"), *folder.parts[-2:]]))
        sent = reported = 0

        def told(count: int) -> None:
            nonlocal sent, reported
            sent += count
            if sent - reported >= SAID_BYTES:
                reported = sent
                say(f"{sent / 2**20:,.0f} MiB sent")

        lease = Lease(store, folder, say)
        try:
            lease.claim()
            there, here = steps_of(store.names()), checkpoints_in(folder / CHECKPOINTS)
            if there and (not here or there[-1] > here[-1][0]):
                newest = f"step {here[-1][0]:,}" if here else "no checkpoint"
                lease.release()
                raise UserError(f"{store.url}: has step {there[-1]:,} and {folder} has {newest}; nothing was sent")
            sender = Sender(store, folder, lease, say, told)
            sender.all(final=True)
            lease.release()
        except (StoreError, LostLease) as error:
            say(f"{store.url}: not everything was sent ({error}); the same command sends the rest")
            return False
        say(f"{store.url}: {_step(sender.last)}, {sent / 2**20:,.1f} MiB sent")
        return True


# From here on: the process that runs alongside a training.


class Watch:
    """What the training says, and whether the client still does anything; ends this process if it is alone or hangs."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.bytes = 0
        self.busy = False
        self._active = time.monotonic()

    def begin(self) -> None:
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def told(self, count: int) -> None:
        """The client has transferred so many bytes."""
        self.bytes += count
        self._active = time.monotonic()

    @contextlib.contextmanager
    def working(self) -> Any:
        """Context manager: the client has something to do."""
        self._active, self.busy = time.monotonic(), True
        try:
            yield
        finally:
            self.busy = False

    def _listen(self) -> None:
        if not sys.stdin.readline():
            os._exit(1)  # the training was killed: whoever starts it again sends the rest
        self.ended.set()
        sys.stdin.read()
        os._exit(1)

    def _watch(self) -> None:
        shown, at = 0, time.monotonic()
        while True:
            time.sleep(0.5)
            now = time.monotonic()
            if self.busy and now - self._active > STALL_SECONDS:
                os._exit(STALLED)
            if self.ended.is_set() and self.bytes > shown and now - at > PROGRESS_SECONDS:
                shown, at = self.bytes, now
                tell(say=f"{shown / 2**20:,.1f} MiB sent")


def tell(**what: Any) -> None:
    """A line for the training."""
    print(json.dumps(what), flush=True)


def main() -> None:
    """Sends a run until its training has ended; exits with 0 if everything was sent."""
    machine.lower_priority()  # the training comes first
    machine.keep_stdin()
    machine.speak_utf8()
    task = json.loads(sys.stdin.readline())  # not from the command line, which others can read
    folder, watch = Path(task["folder"]), Watch()
    watch.begin()
    lock = open_to_append(folder / ".sending")
    machine.lock(lock)  # the process of a killed launch may not have ended yet

    def say(line: str) -> None:
        tell(say=line)

    try:
        store = Store(task["url"])
        lease = Lease(store, folder, say)
        sender = Sender(store, folder, lease, say, watch.told)
        if task["fetch"]:
            fetched = begin(Fetching(store, folder, say, watch.told), lease, watch)
            tell(ready=fetched)
        keep_sending(sender, watch)
    except (UserError, LostLease) as error:
        tell(error=str(error))
    except Exception as error:  # such as a full disk
        tell(error=f"{task['shown']}: {reason(error)}")
    os._exit(0)


def begin(fetching: Fetching, lease: Lease, watch: Watch) -> dict[str, Any]:
    """Takes the lease and fetches what the run is resumed from, with several attempts.

    Returns JSON values: notes, the steps in the store, and whether it has the run. If the store can't be used, a run of
    which this machine has a checkpoint continues without it; otherwise raises UserError.
    """
    where = fetching.store.url
    for attempt in range(1, ATTEMPTS_AT_START + 1):
        try:
            with watch.working():
                if not fetching.store.is_lasting:
                    raise UserError(f"{where}: exists in one process only; to try it out, give a file:// URL")
                lease.claim()
                names = fetching.store.names()
                step = fetching.resumable(names)
            notes = [] if step is None else [f"step {step:,} was fetched from {where}"]
            return {"notes": notes, "steps": steps_of(names), "exists": "run.json" in names}
        except StoreError as error:
            why = reason(error)
            if attempt < ATTEMPTS_AT_START:
                time.sleep(FIRST_PAUSE_SECONDS * attempt)
                with contextlib.suppress(StoreError):
                    fetching.store.renew()
    if not checkpoints_in(fetching.root):
        raise UserError(
            f"{where}: can't be used ({why}); check the address and the credentials, or train with a local --runs-dir "
            "and send the run later with nndist push"
        )
    return {"notes": [f"{where}: can't be used ({why}); the run continues from the local copy"], "steps": []}


def keep_sending(sender: Sender, watch: Watch) -> None:
    """Sends until the training has ended and everything is sent; a failure is one line, until it works again."""
    pause, failing, claimed = FIRST_PAUSE_SECONDS, False, False
    told: int | None = None
    stop = threading.Event()
    renewer = threading.Thread(target=renewing, args=(sender.lease, stop), daemon=True)
    while True:
        ended = watch.ended.wait(POLL_SECONDS)
        try:
            with watch.working():
                if not claimed:
                    sender.lease.check()
                    sender.lease.renew()
                    claimed = True
                    renewer.start()
                sender.all(final=ended)
            if failing:
                sender.say(f"{sender.store.url}: works again; sent: {_step(sender.last)}")
            pause, failing = FIRST_PAUSE_SECONDS, False
            if sender.last != told:
                told = sender.last
                tell(sent=sorted(sender.complete))
        except StoreError as error:
            if not failing:
                sender.say(
                    f"{sender.store.url}: can't be written ({reason(error)}); checkpoints are kept locally, last sent: "
                    f"{_step(sender.last)}; it is tried again"
                )
                tell(failing=reason(error))
            failing = True
            watch.ended.wait(pause) if not ended else time.sleep(min(pause, 10.0))
            pause = min(2 * pause, MAX_PAUSE_SECONDS)
            with contextlib.suppress(UserError, StoreError):
                sender.store.renew()
            continue
        if ended:
            stop.set()
            renewer.join(STALL_SECONDS)  # else it might write the lease once more
            with contextlib.suppress(StoreError):
                sender.lease.release()
            tell(done=True)
            return


def renewing(lease: Lease, stop: threading.Event) -> None:
    """Renews a lease until it is lost, which is noticed before the next manifest."""
    while not stop.wait(RENEW_SECONDS):
        try:
            lease.check()
            lease.renew()
        except StoreError:
            continue
        except LostLease:
            return


def _step(step: int | None) -> str:
    return "nothing" if step is None else f"step {step:,}"

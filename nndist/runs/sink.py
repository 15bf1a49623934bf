"""A sink: a separate process that reads a run's folder and hands what is written there to somebody else's program.

The training never calls that program: one that hangs, dies or is stopped can't hold it up, and metrics.jsonl stays the
source of truth. A resumed run is handed over from its first record, so what arrives is always the complete run, without
what an interrupted launch recorded past its last save.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from .. import machine
from ..errors import UserError
from ..files import PACKAGE, WINDOWS, Each, open_regular, open_to_append, read_json
from .records import parsed

Mode = Literal["online", "offline"]

PATIENCE_SECONDS = {"online": 120.0, "offline": 15.0}  # to send the rest after a run has ended
SILENT_SECONDS = 1.5  # of waiting at the end of a run before the user is told why
POLL_SECONDS = 0.5
BLOCK_BYTES = 1 << 20
SAID = 3  # exit code of the sink's process if it has already reported why it gave up
DESCRIPTION_KIND = {
    "recipe": str,
    "fields?": dict,
    "scores?": (None, Each((float, None))),
    "best?": (None, {"step": int, "scores": Each((float, None))}),
}
"""What is sent of run.json (see files.check)."""


def patience_of(mode: Mode, status: str) -> float | None:
    """Seconds to send the rest after a run has ended with `status`; None, no limit, for a sync."""
    if status == "synced":
        return None
    # whoever stopped the run won't wait long; the sink continues on its own for a while
    return 2.0 if status == "preempted" else PATIENCE_SECONDS[mode]


class SinkProcess:
    """The training's side of a sink: starts the process, shows its output, and ends it within a bounded time.

    name: before its lines. place: its folder in the run's. main: the module of what runs in the process. task: of that,
    as JSON. environment: of the process.
    """

    name, place, main = "", "", ""

    def __init__(
        self,
        folder: Path,
        mode: Mode,
        say: Callable[[str], None],
        task: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> None:
        self.folder, self.mode, self.say = folder, mode, say
        task = {"folder": str(folder), "mode": mode, "pid": os.getpid(), **task}
        (folder / self.place).mkdir(exist_ok=True)
        path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [environment.get("PYTHONPATH")])])
        with open_to_append(folder / self.place / "sink.log") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {self.main} import main; main()", json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**environment, "PYTHONPATH": path},
                **machine.own_group(),  # Ctrl-C goes to the training, which then ends this process itself
            )
        self._reader = threading.Thread(target=self._show, name=f"{self.name} messages", daemon=True)
        self._reader.start()

    def close(self, status: str) -> bool:
        """Waits for the rest to be sent; returns whether it was, and reports a failure. `status`: the run's."""
        process, patience = self._process, patience_of(self.mode, status)
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # the process is gone already
            process.stdin.write(json.dumps({"status": status}).encode())
            process.stdin.close()
        reason = ""
        try:
            try:
                code = process.wait(SILENT_SECONDS)
            except subprocess.TimeoutExpired:
                limit = "" if patience is None else f", {patience:g} s at most"
                what = "sent" if self.mode == "online" else "written"
                self.say(f"{self.name}: waiting for the remaining data to be {what}{limit}; Ctrl-C skips it")
                code = process.wait(patience)
            reason = f"its process ended with code {code}" if code not in (0, SAID) else ""
        except subprocess.TimeoutExpired:
            reason = f"it did not finish within {patience:g} s"
        except KeyboardInterrupt:
            reason = "interrupted"
        if reason and status != "preempted":
            process.kill()
        self._reader.join(1.0)
        if reason and status != "preempted":
            self.say(f"{self.name}: dropped, {reason}; {remedy(self.place, self.folder)}")
        return process.returncode == 0

    def _show(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.say(line.decode(errors="replace").rstrip("\r\n"))


@contextmanager
def at_rest(folder: Path) -> Iterator[None]:
    """Context manager: nobody trains the run meanwhile; raises UserError if there is no run, or it is being trained."""
    if not (folder / "run.json").is_file() or not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: not a run; name a run's folder, such as runs/mnist_cnn/first")
    description_of(folder)
    with open_to_append(folder / "lock") as lock:
        try:
            machine.lock(lock, wait=False)
        except OSError as error:
            raise UserError(f"{folder}: is being trained, which sends it too; wait for its end") from error
        yield


def remedy(place: str, folder: Path) -> str:
    """What to do for a run that a sink has dropped."""
    how = "" if place == "wandb" else f" --track {place}"
    log = folder / place / "sink.log"
    return f"the run itself is intact: nndist sync {folder}{how} sends it (details: {log})"


# From here on: what runs in the sink's process.


def run_sink(name: str, place: str, send: Callable[[Path, dict[str, Any], Ended], None]) -> None:
    """Hands a run over until its training has ended; exits with 0, or otherwise if something was not handed over.

    name, place: as of SinkProcess. send: does it; gets the run's folder and the task, and raises if it gives up.
    """
    machine.lower_priority()  # the training comes first
    machine.keep_stdin()
    machine.speak_utf8()
    task = json.loads(sys.argv[1])
    folder = Path(task["folder"])
    ended = Ended(task["mode"])
    lock = open_to_append(folder / place / "lock")
    machine.lock(lock)  # the sink of a killed launch may still be finishing
    try:
        send(folder, task, ended)
    except Exception as error:
        import traceback

        traceback.print_exc()
        reason = (str(error).splitlines() or [""])[0]
        print(f"{name}: dropped ({type(error).__name__}: {reason}); {remedy(place, folder)}", flush=True)
        os._exit(SAID)
    sys.stdout.flush()
    os._exit(0)  # W&B's exit handlers wait for its service forever


class Ended:
    """Whether the training has ended; after that, this process ends within a bounded time."""

    def __init__(self, mode: str):
        self.status: str | None = None
        self._event = threading.Event()
        self._patience = PATIENCE_SECONDS[mode]
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        message = sys.stdin.read()  # returns once the training closes it, or dies
        self.status = json.loads(message)["status"] if message else "killed"
        self._event.set()
        if self.status != "synced":
            time.sleep(self._patience + 5.0)
            os._exit(1)

    def wait(self, seconds: float) -> bool:
        """Waits at most this long for the training's end; returns whether it has ended."""
        return self._event.wait(seconds)


def until_under_way(metrics: Path, ended: Ended) -> None:
    """Waits for the first record, 5 s at most: loading a client takes seconds of CPU."""
    size, waited = metrics.stat().st_size, 0
    while metrics.stat().st_size == size and waited < 50 and not ended.wait(0.1):
        waited += 1


def description_of(folder: Path) -> dict[str, Any]:
    """What run.json says of a run; raises UserError if it can't be read."""
    try:
        return read_json(folder / "run.json", DESCRIPTION_KIND)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}/run.json: can't be read ({why}); restore it from a copy") from error


def records(path: Path, ended: Ended) -> Iterator[dict[str, Any]]:
    """The records of metrics.jsonl, including those yet to be written, until the training has ended."""
    rest = b""
    file = open_regular(path)
    try:
        while True:
            last_round = ended.wait(POLL_SECONDS)
            with contextlib.suppress(OSError):
                if (
                    not WINDOWS and path.stat().st_ino != os.fstat(file.fileno()).st_ino
                ):  # rewritten, with the same beginning
                    anew = open_regular(path)
                    anew.seek(file.tell())
                    file.close()
                    file = anew
            while block := file.read(BLOCK_BYTES):
                *lines, rest = (rest + block).split(b"\n")
                yield from (record for record in parsed(lines) if isinstance(record.get("step"), int))
            if last_round:
                return
    finally:
        file.close()

"""When a run stops before its end: a signal, or the end of its time. And who is told."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .. import machine
from ..config import RunConfig
from ..errors import UserError, first_line

MARGIN_SECONDS = 60.0  # before the end of the time, for what comes after the last step
SLURM_END = "SLURM_JOB_END_TIME"
NOTIFY_SECONDS = 30.0
_UNITS = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
_PART = r"(\d+(?:\.\d+)?)\s*(days?|d|hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s)(?![a-z])\s*"
_SLURM_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+)(?::(\d+))?)?")  # days-hours:minutes:seconds, the last two optional
_SLURM_CLOCK = re.compile(r"()(?:(\d+):)?(\d+):(\d+)")  # hours:minutes:seconds or minutes:seconds


def seconds_of(text: str) -> float:
    """The seconds of "8h", "1h30m", "90 minutes", or Slurm's "1-12:00:00", "1-12" and "30:00"; raises UserError."""
    plain = text.strip().lower()
    if re.fullmatch(f"(?:{_PART})+", plain):
        seconds = sum(float(number) * _UNITS[unit[0]] for number, unit in re.findall(_PART, plain))
    elif match := _SLURM_DAYS.fullmatch(plain) or _SLURM_CLOCK.fullmatch(plain):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        seconds = days * 86_400 + hours * 3600 + minutes * 60 + rest
    else:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"--time {text!r}: give how long the run may take, such as 8h, 90m or 1-12:00:00")
    return seconds


class Deadline:
    """When a run must have stopped: `--time` after its start, or the end of the Slurm job that it runs in.

    source: what sets it, for a person; "" if nothing does.
    """

    def __init__(self, asked: str, environment: Mapping[str, str] = os.environ):
        self.source = ""
        self._end = float("inf")
        self._margin = MARGIN_SECONDS
        if asked not in ("auto", "none"):
            seconds = seconds_of(asked)
            self._end, self.source = time.monotonic() + seconds, f"--time {asked}"
            self._margin = min(MARGIN_SECONDS, 0.1 * seconds)
        elif asked == "auto":
            with contextlib.suppress(KeyError, ValueError):
                left = float(environment[SLURM_END]) - time.time()
                self._end, self.source = time.monotonic() + left, "the end of the Slurm job"

    def has_come(self, longest_save: float = 0.0) -> bool:
        """Whether the run must save and stop now; longest_save: seconds of a save so far."""
        # a clock that is set later, as on machines that start without the time, must not end the run
        return time.monotonic() >= self._end - self._margin - 2 * longest_save


def preempt_signal(name: str) -> signal.Signals | None:
    """The signal called "USR1" or "SIGUSR1"; None for "none"; raises UserError."""
    if name.lower() == "none":
        return None
    full = name.upper() if name.upper().startswith("SIG") else f"SIG{name.upper()}"
    number = getattr(signal, full, None)
    if full == "SIGUSR1" and number is None:  # the default, which Windows lacks
        return None
    if not isinstance(number, signal.Signals) or full in ("SIGKILL", "SIGSTOP"):
        raise UserError(f"--preempt-signal {name!r}: not a signal that a program can catch; give USR1, USR2 or none")
    return number


def check_stopping(config: RunConfig) -> None:
    """Raises UserError for an invalid `--time` or `--preempt-signal`."""
    Deadline(config.time)
    preempt_signal(config.preempt_signal)


@contextlib.contextmanager
def signals(preempt: str, receive: Callable[[int], None], received: Callable[[], int | None]) -> Iterator[None]:
    """Context manager: SIGTERM, SIGINT and the preempt signal call `receive` with their number.

    A second SIGINT ends the process at once. received: returns the latest signal, if one has come.
    """

    def handle(number: int, frame: Any) -> None:
        if number == signal.SIGINT and received() == signal.SIGINT:
            os._exit(128 + number)
        receive(number)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python's handlers belong to the main thread
        return
    numbers = {*machine.SAVE_SIGNALS, *filter(None, [preempt_signal(preempt)])}
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def notify(command: str, say: Callable[[str], None], **about: str) -> None:
    """Runs the user's command when a run has ended; one that fails or hangs costs one line.

    about: given to it in the environment, as NNDIST_STATUS, NNDIST_RUN, ...
    """
    if not command:
        return
    environment = {**os.environ, **{f"NNDIST_{name.upper()}": value for name, value in about.items()}}
    nothing = subprocess.DEVNULL
    try:
        with tempfile.TemporaryFile() as said:  # no pipe, which a program that the command has started may hold open
            process = subprocess.Popen(command, shell=True, env=environment, stdin=nothing, stdout=nothing, stderr=said)
            try:
                code = process.wait(NOTIFY_SECONDS)
            except BaseException:
                machine.kill_tree(process.pid)
                process.wait()
                raise
            said.seek(0)
            why = "" if code == 0 else f"code {code}: {said.read(800).decode(errors='replace')[:200]}"
    except subprocess.TimeoutExpired:
        why = f"did not end within {NOTIFY_SECONDS:g} s"
    except OSError as error:
        why = first_line(error)
    if why:
        say(f"--notify: the command failed ({' '.join(why.split())})")

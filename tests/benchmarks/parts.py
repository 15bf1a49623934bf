"""A benchmark of several parts: each in a process of its own, with a time limit, its rows in one table and one file.

A part that fails, hangs or dies costs a row that says so, and the others go on; what there is no time for is said too.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nndist import machine
from nndist.errors import UserError

TROUBLES = ("failed", "stopped", "left out")


@dataclass
class Row:
    """A line of the table. bar: "met" or "missed", where there is one and it can be judged here."""

    part: str
    what: str
    milliseconds: float | None = None  # of a step
    ratio: float | None = None  # to the part's first row, or to the raw loop
    seconds: float | None = None  # of a whole training
    note: str = ""
    bar: str = ""


@dataclass
class Part:
    """One of the measurements, with the seconds after which it is stopped, about three times what it takes."""

    name: str
    seconds: float
    measure: Callable[..., None]
    arguments: dict[str, Any] = field(default_factory=dict)


class Bench:
    """What a part is given: the options, a folder of its own, and where its rows go."""

    def __init__(self, part: Part, options: argparse.Namespace, rows: Path):
        self.part, self.options, self.rows = part, options, rows
        self.folder = Path(tempfile.mkdtemp(dir=options.scratch))

    def add(self, what: str, **figures: Any) -> None:
        """Prints a row, and writes it where it outlives this process."""
        row = Row(self.part.name, what, **figures)
        print(line_of(row), flush=True)
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def failed(self, what: str, error: BaseException) -> None:
        """Adds the row of something that failed."""
        self.add(what, note=f"failed: {cause_of(error)}")
        if self.options.traceback:
            traceback.print_exc()


def cause_of(error: BaseException) -> str:
    """One line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return (first if isinstance(error, UserError) else f"{type(error).__name__}: {first}".strip(": "))[:250]


def run_parts(
    parts: list[Part],
    options: argparse.Namespace,
    folder: Path,
    kind: Callable[[Part, argparse.Namespace, Path], Bench],
    rows: Path | None = None,
) -> list[Row]:
    """All rows, in order. options: minutes, of all parts; only, the names of some; traceback.

    kind: makes what a part is given. rows: the file that each row is written to at once. The first part is always run:
    where it fails there is no other.
    """
    options.scratch = folder
    rows = rows or folder / "rows.jsonl"
    rows.write_text("")
    deadline = time.monotonic() + 60 * options.minutes - 10  # for the table, and for what ends slowly
    for part in parts:
        is_first = part is parts[0]
        if options.only and not is_first and part.name not in options.only:
            continue
        left = deadline - time.monotonic()
        if left < part.seconds / 3 and not is_first:  # about what it takes
            found = f"left out: of {options.minutes:g} minutes {max(0.0, left):.0f} s are left"
        else:
            began = time.monotonic()
            found = outcome(partial(run_part, part, options, rows, kind), min(max(left, 10.0), part.seconds))
            print(f"{'':12}({described(part)}: {time.monotonic() - began:.1f} s)", flush=True)
        if found:
            Bench(part, options, rows).add(described(part), note=found)
        read = [Row(**json.loads(line)) for line in rows.read_text(encoding="utf-8").splitlines()]
        if is_first and any(row.note.startswith(TROUBLES) for row in read):
            break
    return read


def outcome(function: Callable[[], None], seconds: float) -> str:
    """Calls a function in a process that is forked, for so long; what to say of how it ended, "" where that is well."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    try:
        process.join(seconds)
    finally:
        if running := process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)  # and what it has started
            process.join()
    if running:
        return f"stopped after {seconds:.0f} s"
    return f"failed: ended by signal {-process.exitcode}" if (process.exitcode or 0) < 0 else ""


def run_part(part: Part, options: argparse.Namespace, rows: Path, kind: Callable[..., Bench]) -> None:
    """In a process of its own: measures; what goes wrong is a row."""
    os.setsid()
    machine.end_with_parent()  # a session that is cut off leaves none behind
    bench = kind(part, options, rows)
    try:
        part.measure(bench, **part.arguments)
    except BaseException as error:
        bench.failed(described(part), error)
    sys.stdout.flush()
    os._exit(0)  # what is left, such as threads of loaders, is of no use


def described(part: Part) -> str:
    """Its function and what that is about."""
    about = [str(value) for value in part.arguments.values() if isinstance(value, str)]
    return " ".join([part.measure.__name__.replace("_", " "), *about])


def line_of(row: Row) -> str:
    """A row as a line of the table."""
    step = "" if row.milliseconds is None else f"{row.milliseconds:.4f}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    seconds = "" if row.seconds is None else f"{row.seconds:,.2f}"
    return f"{row.part:<12}{row.what:<62}{step:>10}{ratio:>7}{seconds:>11}  {row.bar:<7}{row.note}".rstrip()


def heading() -> str:
    """The names of the table's columns."""
    return f"{'part':<12}{'what':<62}{'ms a step':>10}{'ratio':>7}{'seconds':>11}  {'bar':<7}note"

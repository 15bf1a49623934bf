"""What a run records: metrics.jsonl is the source of truth; the console and the progress bar show it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable
from itertools import compress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import TrainingError, UserError
from ..files import WINDOWS, finite, flush_to_disk, open_to_append, replacing
from ..progress import bar, fitted, layout, watched
from .checkpoint import read_tensors
from .checkpoint_writer import publish_file
from .records import FILE, Record, Records, sealed

# metrics first: at 80 columns the drawn bar gives way
WIDE = 100  # columns that a bar needs for its figures beside the name of the data
LAYOUT = "{desc} {percentage:.0f}% {n_fmt}/{total_fmt} {remaining}{postfix} {bar}"


class History:
    """The records of a run in order of step, and what `Recipe.snapshot` returned at the evaluations.

    records: dicts with "step" (optimizer steps done), "epoch" (fractional) and metrics such as "train/loss", "lr",
    "examples_per_second", "test/accuracy"; a new list each time, since they are stored as columns.
    snapshots: (step, tensors by name).
    outputs: the last evaluation's `metrics.Output` values for the first test examples, in order, by name; empty if this
    launch of the run has evaluated nothing.
    """

    def __init__(
        self,
        records: Iterable[Record] | Records = (),
        snapshots: list[tuple[int, dict[str, Tensor]]] | None = None,
        outputs: dict[str, Tensor] | None = None,
    ):
        self.columns = records if isinstance(records, Records) else Records(records)
        self.snapshots = [] if snapshots is None else snapshots
        self.outputs = {} if outputs is None else outputs

    @property
    def records(self) -> list[Record]:
        return self.columns.rows()

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, where it was recorded."""
        steps, values = self.columns.columns("step", name)
        known = [value is not None and value == value for value in values]
        return [*compress(steps, known)], [*compress(values, known)]

    def names(self) -> list[str]:
        """The recorded metrics, in order of first appearance."""
        return self.columns.figures()


class NullTracker:
    """Tracks nothing: used by every process but the main one."""

    def __init__(self) -> None:
        self.history = History()
        self.problems: list[str] = []  # what can't be read of earlier launches' files

    def say(self, line: str) -> None:
        """Shows a line to the user."""

    def log(self, record: Record) -> None:
        """Writes a record."""

    def keep_snapshot(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Stores what `Recipe.snapshot` returned."""

    @property
    def chain(self) -> str:
        """The hash that covers every record (see records)."""
        return ""

    def sync(self) -> int:
        """Flushes every record to disk; returns the length of metrics.jsonl in bytes."""
        return 0

    def advance(self, steps: int) -> None:
        """Advances the progress bar by this many optimizer steps."""

    def show(self, **figures: str) -> None:
        """Shows the latest metrics in the progress bar."""

    def activity(self, text: str) -> None:
        """Shows in the progress bar what is being done other than steps; "" for nothing."""

    def close(self) -> None:
        """Closes the bar and the file."""


class Tracker(NullTracker):
    """Tracks a run on the main process.

    folder: where metrics.jsonl is appended to. title: the bar's. steps: of the whole run. done: steps that a resumed
    run has taken; `metrics_bytes` of its records, which end with the hash `chain`, and its snapshots up to `done` are
    kept, later ones are dropped, so that the run reads as one.

    Raises UserError if metrics.jsonl can't be written, and in use TrainingError if its folder is gone.
    """

    def __init__(
        self,
        folder: Path,
        *,
        title: str,
        steps: int,
        done: int = 0,
        metrics_bytes: int = 0,
        chain: str = "",
        progress: bool = True,
    ):
        super().__init__()
        self._title = title
        self._snapshots = folder / "snapshots"
        self._path = folder / FILE
        self._chain = chain
        self.history, self.problems = read_history(folder, done, metrics_bytes)
        try:
            self._file = open_to_append(self._path)
        except OSError as error:
            raise UserError(f"{self._path}: {error.strerror}; remove it, or choose another --runs-dir") from error
        self._identity = _identity(os.fstat(self._file.fileno()))
        self._size = metrics_bytes
        self._watched = watched()
        self._bar: Any = None
        self._progress = progress
        self._steps, self._done = steps, done

    def _begun_bar(self) -> Any:
        """The bar, first drawn at the first step, so that the plan before it has the terminal to itself."""
        if self._bar is None and self._progress:
            if self._watched and shutil.get_terminal_size().columns < WIDE:
                self._title = self._title.partition(" [")[0]  # the plan has named the data
            self._bar = bar(
                self._steps, self._title, leave=self._watched, initial=self._done, unit="step", bar_format=LAYOUT
            )
        return self._bar

    @property
    def chain(self) -> str:
        return self._chain

    def say(self, line: str) -> None:
        if self._bar is not None and self._watched:
            self._bar.write(fitted(line), file=sys.stdout)
        else:  # in a log file there is no bar to move aside
            print(fitted(line), flush=True)

    def log(self, record: Record) -> None:
        record = finite(record)
        self.history.columns.append(record)
        line, self._chain = sealed(self._chain, record)
        self._file.write(line)
        self._file.flush()
        self._size += len(line)
        self._check_file()

    def _check_file(self) -> None:
        """Rewrites metrics.jsonl if it was removed; raises TrainingError if that is impossible."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            found = None
        if found is not None and found.st_size >= self._size and _identity(found) == self._identity:
            return
        if not self._path.parent.is_dir():
            raise folder_is_gone(self._path.parent)
        if os.fstat(self._file.fileno()).st_size < self._size:
            raise TrainingError(
                f"{self._path}: was truncated during training; the weights of the last save are intact: start "
                "the same command again with --resume rebuild"
            )
        old = self._file
        with (
            replacing(self._path) as part,
            part.open("wb") as file,
            os.fdopen(os.dup(old.fileno()), "rb") as removed,
        ):
            removed.seek(0)  # a removed file exists as long as it is open
            shutil.copyfileobj(removed, file)
        self._file = open_to_append(self._path)
        self._identity = _identity(os.fstat(self._file.fileno()))
        old.close()
        self.say(f"{self._path}: was removed during training; rewritten, nothing is lost")

    def keep_snapshot(self, step: int, tensors: dict[str, Tensor]) -> None:
        self._check_file()  # checks the folder too
        self._snapshots.mkdir(exist_ok=True)
        publish_file(self._snapshots / f"step-{step:08d}.safetensors", tensors, sealed=True)
        self.history.snapshots.append((step, tensors))

    def sync(self) -> int:
        self._check_file()
        flush_to_disk(self._file)
        return os.fstat(self._file.fileno()).st_size

    def advance(self, steps: int) -> None:
        if (begun := self._begun_bar()) is not None:
            begun.update(steps)

    def show(self, **figures: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)

    def activity(self, text: str) -> None:
        if self._bar is not None:
            self._bar.bar_format = layout(LAYOUT if not text else LAYOUT.replace("{postfix}", ""))  # so that it fits
            self._bar.set_description(f"{self._title}, {text}" if text else self._title, refresh=self._watched)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._file.close()


def folder_is_gone(folder: Path) -> TrainingError:
    """The error for a run's folder that is no longer there."""
    return TrainingError(
        f"{folder}: the run's folder was removed or moved during training; put it back and start the same command "
        "again, or a new run with a different --run"
    )


def read_history(folder: Path, done: int, metrics_bytes: int) -> tuple[History, list[str]]:
    """The records and snapshots of a run up to step `done`, and a line for each snapshot that can't be read.

    Removes what came later from the files. The records have been verified before (see `records.verified`). Raises
    UserError if they can't be truncated.
    """
    path = folder / FILE
    try:
        with open_to_append(path) as file:
            file.truncate(metrics_bytes)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; remove it, or choose another --runs-dir") from error
    snapshots, problems = read_snapshots(folder, done, remove=True)
    return History(Records.of_file(path, metrics_bytes), snapshots), problems


def read_snapshots(
    folder: Path, done: int | None = None, *, remove: bool = False
) -> tuple[list[tuple[int, dict[str, Tensor]]], list[str]]:
    """(step, tensors) of a run's snapshots up to step `done`, and a line for each that can't be read.

    remove: whether to delete those of later steps.
    """
    found, problems = [], []
    for path in sorted((folder / "snapshots").glob("step-*.safetensors")):
        match = re.fullmatch(r"step-(\d+)", path.stem)
        if match is None:
            continue
        step = int(match.group(1))
        try:
            if done is None or step <= done:
                found.append((step, read_tensors(path)))
            elif remove:
                path.unlink()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            problems.append(f"snapshots/{path.name}: can't be read ({why}); figures omit it")
    return found, problems


def _identity(status: os.stat_result) -> tuple[int, int]:
    # on Windows an open file can't be removed, and some disks number it differently for each who asks
    return (0, 0) if WINDOWS else (status.st_dev, status.st_ino)

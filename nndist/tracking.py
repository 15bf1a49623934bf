"""What a run writes down: metrics.jsonl is the truth; the console and the progress bar show it."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from .checkpoint import publish_file
from .errors import UserError

Record = dict[str, Any]


@dataclass
class History:
    """The records of a run in the order of their steps, and what `Recipe.snapshot` gave at the evaluations.

    records: dicts with "step" (optimizer steps done), "epoch" (as a fraction) and figures such as "train/loss", "lr",
    "examples_per_second", "test/accuracy".
    snapshots: (step, tensors by name).
    outputs: what the last evaluation's `metrics.Output` were for the first test examples, in their order, by name;
    empty where this launch of the run has evaluated nothing.
    """

    records: list[Record] = field(default_factory=list)
    snapshots: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one figure, where it was recorded."""
        pairs = [(r["step"], r[name]) for r in self.records if r.get(name) is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def names(self) -> list[str]:
        """The figures that were recorded, in the order of their first appearance."""
        return list(dict.fromkeys(k for r in self.records for k, v in r.items() if isinstance(v, int | float)))


class NullTracker:
    """Tracks nothing: what every process but the main one has."""

    def __init__(self) -> None:
        self.history = History()

    def say(self, line: str) -> None:
        """Shows a line to the user."""

    def log(self, record: Record) -> None:
        """Writes a record down."""

    def keep_snapshot(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Keeps what `Recipe.snapshot` gave."""

    def sync(self) -> int:
        """Has every record on disk; the length of metrics.jsonl in bytes."""
        return 0

    def advance(self, steps: int) -> None:
        """So many optimizer steps are done."""

    def show(self, **figures: str) -> None:
        """Puts the latest figures into the progress bar."""

    def activity(self, text: str) -> None:
        """Says in the progress bar what goes on besides steps; empty: nothing."""

    def close(self) -> None:
        """Ends the bar and the file."""


class Tracker(NullTracker):
    """Tracks a run on the main process.

    folder: where metrics.jsonl is appended to. title: what the bar is called. steps: of the whole run. done: steps that
    a run which goes on has behind it; `metrics_bytes` of its records and its snapshots up to there are kept, what came
    later is dropped, so that the run reads as one.
    """

    def __init__(
        self, folder: Path, *, title: str, steps: int, done: int = 0, metrics_bytes: int = 0, progress: bool = True
    ):
        super().__init__()
        self._title = title
        self._snapshots = folder / "snapshots"
        self.history = read_history(folder, done, metrics_bytes)
        self._file: TextIO = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._terminal = sys.stderr.isatty() or in_notebook()  # somebody looks on while it is drawn
        self._bar = _bar(title, steps, done, self._terminal) if progress else None

    def say(self, line: str) -> None:
        if self._bar is not None and self._terminal:
            self._bar.write(line, file=sys.stdout)
        else:  # in a log file the bar need not make room
            print(line, flush=True)

    def log(self, record: Record) -> None:
        record = {key: _finite(value) for key, value in record.items()}
        self.history.records.append(record)
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def keep_snapshot(self, step: int, tensors: dict[str, Tensor]) -> None:
        self._snapshots.mkdir(exist_ok=True)
        publish_file(self._snapshots / f"step-{step:08d}.safetensors", tensors)
        self.history.snapshots.append((step, tensors))

    def sync(self) -> int:
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def advance(self, steps: int) -> None:
        if self._bar is not None:
            self._bar.update(steps)

    def show(self, **figures: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)

    def activity(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_description(f"{self._title}, {text}" if text else self._title, refresh=self._terminal)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._file.close()


def read_history(folder: Path, done: int, metrics_bytes: int) -> History:
    """The records and snapshots of a run up to step `done`; cuts what came later off the files.

    Raises UserError where metrics.jsonl is shorter than the checkpoint says: records would be missing in silence.
    """
    from safetensors.torch import load

    path = folder / "metrics.jsonl"
    path.touch()
    if path.stat().st_size < metrics_bytes:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes where the checkpoint counts on {metrics_bytes:,}")
    os.truncate(path, metrics_bytes)
    history = History([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    for snapshot in sorted((folder / "snapshots").glob("step-*.safetensors")):
        step = int(snapshot.stem.removeprefix("step-"))
        if step > done:
            snapshot.unlink()
        else:
            history.snapshots.append((step, load(snapshot.read_bytes())))
    return history


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite is recorded as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def in_notebook() -> bool:
    """Whether this is a notebook's kernel."""
    kernel = sys.modules.get("ipykernel.zmqshell")
    shell = sys.modules.get("IPython")
    return kernel is not None and shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"


def _bar(title: str, steps: int, done: int, terminal: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a notebook without ipywidgets; the bar is then one of characters
        from tqdm.auto import tqdm

    return tqdm(
        total=steps,
        initial=done,
        desc=title,
        unit="step",
        # figures first: at 80 columns it is the drawn bar that gives way
        bar_format="{desc} {percentage:.0f}% {n_fmt}/{total_fmt} {remaining}{postfix} {bar}",
        dynamic_ncols=True,
        mininterval=0.2 if terminal else 30.0,  # a log file gets a line now and then
        leave=terminal,
    )

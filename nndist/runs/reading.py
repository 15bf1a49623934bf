"""Reads a run's folder, tolerating what is missing, truncated or of the wrong type."""

from __future__ import annotations

import contextlib
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..directions import direction_of
from ..errors import UserError
from ..files import read_bytes, read_json
from .records import FILE, Records

LAST_PANELS = {
    "lr": "learning rate",
    "gradient_norm": "gradient norm before clipping",
    "examples_per_second": "examples per second",
    "seconds_per_epoch": "seconds per epoch, of training alone",
    "seconds": "seconds per step",
    "load": "load, %",
    "memory": "memory, GiB",
    "traffic": "traffic, MiB per second",
}
MACHINE_PANELS = ("seconds_per_epoch", "seconds", "load", "memory", "traffic")
"""Those about the machine, not the training."""
MAX_HEADLINE_BYTES = 1 << 16
PLOT_MARK = "nndist: a plot, whose colours may be inverted"
"""What the PNG of a figure without photographs says of itself, so that a dark page can show it in dark colours."""


@dataclass
class Series:
    """One metric over the run; values that were not finite are None."""

    name: str
    steps: Sequence[int] = ()
    epochs: Sequence[float | None] = ()
    values: Sequence[float | None] = ()

    def extreme(self, lowest: bool | None) -> tuple[int, float] | None:
        """(step, value) of the best finite value; None if there is none or the direction is unknown (None)."""
        if lowest is None:
            return None
        known = [(step, v) for step, v in zip(self.steps, self.values, strict=True) if v is not None]
        return (min if lowest else max)(known, key=lambda pair: pair[1], default=None)

    def thinned(self, most: int) -> Series:
        """Downsampled to about `most` points: the minimum and maximum of each stretch, in order of step."""
        count = len(self.steps)
        if count <= most:
            return self
        stretches = max(1, most // 2 - 1)
        keep = {0, count - 1}
        for number in range(stretches):
            start, end = number * count // stretches, (number + 1) * count // stretches
            if isinstance(self.values, Numbers) and (found := self.values.extremes(start, end)):
                keep.update(found)  # the same places, at the speed of array.array
                continue
            known = [place for place in range(start, end) if self.values[place] is not None]
            if known:
                keep.add(min(known, key=self.values.__getitem__))  # type: ignore[arg-type]
                keep.add(max(known, key=self.values.__getitem__))  # type: ignore[arg-type]
        places_kept = sorted(keep)
        columns = ([column[place] for place in places_kept] for column in (self.steps, self.epochs, self.values))
        return Series(self.name, *columns)  # type: ignore[arg-type]

    def drawn(self, factor: float = 1.0) -> dict[str, Any]:
        """As page.js reads it; six digits are more than a screen shows."""
        values = [None if v is None else float(f"{v * factor:.6g}") for v in self.values]
        return {"step": list(self.steps), "epoch": list(self.epochs), "value": values}


@dataclass
class Run:
    """The contents of a run's folder, without values of the wrong type."""

    folder: Path
    about: dict[str, Any]
    series: dict[str, Series]
    last_step: int
    last_epoch: float | None
    updated: float | None
    problem: str = ""  # what is wrong with its records

    @property
    def status(self) -> str:
        return str(self.about.get("status", "unknown"))

    @property
    def running(self) -> bool:
        return self.status == "running"

    @property
    def recipe(self) -> str:
        return str(self.about.get("recipe", self.folder.absolute().parent.name))

    @property
    def name(self) -> str:
        return self.folder.absolute().name

    @property
    def source(self) -> str:
        return str(mapping(self.about.get("data")).get("source", "unknown"))

    @property
    def scores(self) -> list[Series]:
        """The metrics of the evaluations, losses last."""
        found = [s for name, s in self.series.items() if "/" in name and panel_of(name) not in LAST_PANELS]
        scores = [s for s in found if not s.name.startswith("train/")]
        return sorted(scores, key=lambda s: "loss" in s.name)

    @property
    def headline(self) -> Series | None:
        """The main score: the recipe's headline, else the one that selects the best model, else the first.

        The first of the test set or, if that is evaluated at the end only, of the validation set.
        """
        wanted = [*self.headline_names, str(mapping(self.about.get("fields")).get("best"))]
        if chosen := next((self.series[name] for name in wanted if name in self.series), None):
            return chosen
        first = "val/" if mapping(self.about.get("data")).get("at_end") else "test/"
        return next((s for s in self.scores if s.name.startswith(first)), next(iter(self.scores), None))

    @property
    def headline_names(self) -> list[str]:
        """What the report leads with, as the recipe names it: scores, or figures that are texts."""
        names = self.about.get("headline")
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def headline_texts(self) -> dict[str, str]:
        """Those of `headline_names` that are texts, by name, as far as they have been written."""
        found = {}
        for name in self.headline_names:
            path = self.folder / "figures" / f"{name}.txt"
            if name not in self.series and "/" not in name:
                with contextlib.suppress(OSError):
                    found[name] = read_bytes(path, MAX_HEADLINE_BYTES).decode("utf-8", "replace").strip()
        return found

    @property
    def ended(self) -> str:
        """How it ended, if before its last step."""
        return str(self.about.get("ended") or "")

    @property
    def why_it_failed(self) -> str:
        """The line that it ended with, if it failed; without its full stop."""
        return str(self.about.get("problem") or "").rstrip(".") if self.status == "failed" else ""

    def lowest_is_best(self, name: str) -> bool | None:
        """Whether lower is better for a score; None if neither the recipe nor the score's name tells."""
        fields = mapping(self.about.get("fields"))
        if fields.get("best") == name and fields.get("best_is"):
            return fields["best_is"] == "lowest"
        direction = direction_of(name)
        return None if direction is None else direction == "lowest"

    @property
    def speed(self) -> float | None:
        """Median examples per second, which ignores pauses and a slow first step."""
        known = [v for v in self.series.get("examples_per_second", Series("")).values if v is not None]
        return sorted(known)[len(known) // 2] if known else None

    @property
    def epochs_text(self) -> str:
        """The number of epochs trained."""
        return "" if self.last_epoch is None else f"{self.last_epoch:,.3g} epoch{'s' * (self.last_epoch != 1)}"


def read_run(folder: Path) -> Run:
    """Reads a run's folder; raises UserError if it is not one or its run.json can't be read."""
    about = read_about(folder)
    path = folder / FILE
    records = Records.of_file(path).load()
    series = {}
    for name in records.names():
        if name not in ("step", "epoch"):
            one = series_of(records, name)
            if len(one.steps):
                series[name] = one
    last = records.last()
    times = [stamp(about.get("updated"))]
    with contextlib.suppress(OSError):
        times.append(path.stat().st_mtime)
    known = [number(about.get("step")), number(last.get("step"))]
    return Run(
        folder=folder,
        about=about,
        series=series,
        last_step=int(max((step for step in known if step is not None), default=0)),
        last_epoch=number(last.get("epoch")),
        updated=max((time for time in times if time is not None), default=None),
        problem=records.compare(about),
    )


def read_about(folder: Path) -> dict[str, Any]:
    """The contents of run.json; raises UserError if it can't be read."""
    try:
        about = read_json(folder / "run.json")
    except OSError as error:
        raise UserError(f"{folder}/run.json: {error.strerror}; name the folder of a run") from error
    except ValueError as error:
        raise UserError(f"{folder}/run.json: not JSON ({error}); restore it from a copy") from error
    if not isinstance(about, dict):
        raise UserError(f"{folder}/run.json: holds no description of a run; restore it from a copy")
    return about


class Numbers(Sequence[float | None]):
    """A column whose values are None where they are not finite."""

    def __init__(self, column: array[Any]):
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [number(value) for value in self.column[place]]
        return number(self.column[place])

    def extremes(self, start: int, end: int) -> tuple[int, int] | None:
        """Positions of the minimum and maximum of a stretch; None if some of it may not be finite."""
        some = self.column[start:end]
        if not some or not math.isfinite(sum(some)):
            return None
        return start + some.index(min(some)), start + some.index(max(some))

    def __iter__(self) -> Iterator[float | None]:
        return (value if -math.inf < value < math.inf else None for value in self.column)


def series_of(records: Records, name: str) -> Series:
    """A metric, from the records that have both it and a step."""
    steps, values = records.columns("step", name)
    epochs = records.columns("step", name, "epoch")[2]
    whole = isinstance(steps, array) and steps.typecode == "q" and len(epochs) == len(steps)
    if whole and isinstance(values, array) and isinstance(epochs, array):
        return Series(name, steps, Numbers(epochs), Numbers(values))
    one: tuple[list[int], list[float | None], list[float | None]] = ([], [], [])
    with_epochs = epochs if len(epochs) == len(steps) else [None] * len(steps)
    for step, epoch, value in zip(steps, with_epochs, values, strict=True):
        if type(step) is int and number(step) is not None and (value is None or type(value) in (int, float)):
            for column, item in zip(one, (step, number(epoch), number(value)), strict=True):
                column.append(item)  # type: ignore[attr-defined]
    return Series(name, *one)


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if type(value) not in (int, float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def stamp(value: Any) -> float | None:
    """Seconds since 1970 of a local time in run.json's format."""
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def panels_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Metrics grouped by the panel they share, by its name: "loss" first, LAST_PANELS last."""
    panels: dict[str, list[str]] = {"loss": []}
    last: dict[str, list[str]] = {panel: [] for panel in LAST_PANELS}
    for name in names:
        if name not in ("step", "epoch"):
            panel = panel_of(name)
            (last if panel in last else panels).setdefault(panel, []).append(name)
    return {panel: members for panel, members in (panels | last).items() if members}


def panel_of(name: str) -> str:
    """The panel of a metric: "loss" for train/loss and test/loss/generator."""
    first, _, kind = name.partition("/")
    return first if first in LAST_PANELS or not kind else kind.split("/")[0]


def network_of(name: str) -> str:
    """What follows the panel in a metric's name: "generator" of test/loss/generator."""
    first, *rest = name.split("/")
    return "/".join(rest if first in LAST_PANELS else rest[1:])


def set_of(name: str) -> str:
    """The set of examples that a metric belongs to: "test" of test/loss/generator; "train" for lr."""
    return name.split("/")[0] if "/" in name and panel_of(name) not in LAST_PANELS else "train"


def is_share(series: Series) -> bool:
    """Whether the values are fractions, usually shown in percent."""
    return "accuracy" in series.name.split("/") and all(v is None or 0 <= v <= 1 for v in series.values)


def launch_list(run: Run) -> list[dict[str, Any]]:
    return list_of_mappings(run.about.get("launches"))


def list_of_mappings(value: Any) -> list[dict[str, Any]]:
    """The JSON objects of a list; [] if it is not a list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def run_folders(runs_dir: Path) -> list[Path]:
    """The run folders RUNS_DIR/<recipe>/<run>/; raises UserError if there are none."""
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir}: no such folder; name the folder of all runs, such as runs")
    found = [folder for folder in sorted(runs_dir.glob("*/*")) if is_run(folder) and not hidden(folder, runs_dir)]
    if not found:
        nearer = any(is_run(folder) for folder in runs_dir.glob("*"))
        hint = f"name its parent folder, {runs_dir.absolute().parent}" if nearer else "train a recipe first"
        raise UserError(f"{runs_dir}: holds no runs (<recipe>/<run>/run.json); {hint}")
    return found


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every published checkpoint in numerical order, the newest last."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)


def is_run(folder: Path) -> bool:
    """Whether a folder is, or was, that of a run."""
    return any((folder / name).exists() for name in ("run.json", "metrics.jsonl", "checkpoints"))


def hidden(folder: Path, above: Path) -> bool:
    """Whether a folder is temporary, such as that of `--check`."""
    return any(part.startswith(".") for part in folder.relative_to(above).parts)

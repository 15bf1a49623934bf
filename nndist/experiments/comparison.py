"""Runs side by side: what differs between them, one table with the spread over seeds, one figure of all curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..directions import direction_of
from ..errors import UserError
from ..runs.reading import LAST_PANELS, Run, mapping, number, panel_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 80
MAX_LOSS_PANELS = 3
# Student's t, 97.5 %, for 1 to 30 degrees of freedom
STUDENT_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass
class Group:
    """The runs of one row, which differ only in the seed.

    label: what they have in common, such as "lr=0.1". failures: a line for each run without a score, with the reason.
    """

    label: str
    runs: list[Run] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation and range of a few numbers."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation, with divisor n - 1; None for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def record(self) -> dict[str, Any]:
        """The values and their statistics, for the JSON file."""
        ends = {"min": min(self.values), "max": max(self.values)}
        return {"mean": self.mean, "std": self.deviation, **ends, "values": list(self.values)}


@dataclass
class Row:
    """A row of the table: final score, best score and seconds of a group's runs; None if no run has a score."""

    label: str
    runs: list[Run]
    failures: list[str]
    final: Spread | None
    best: Spread | None
    seconds: Spread | None


@dataclass
class Comparison:
    """Groups of runs compared by one score; the group with the best mean leads: of what its runs end with or keep.

    score: such as "test/accuracy". lowest: whether the lowest value is best; None if unknown. title: of the figure and
    the JSON file. over: what the runs of a group differ in.
    """

    groups: list[Group]
    score: str
    lowest: bool | None
    title: str
    over: str = "seeds"

    def rows(self) -> list[Row]:
        """One row per group, in order."""
        return [self._row(group) for group in self.groups]

    @property
    def judged_by(self) -> Literal["best", "final"]:
        """Which score of each run counts: the best, if all runs keep the weights that have it, else the last."""
        kept = {mapping(run.about.get("fields")).get("best") for group in self.groups for run in group.runs}
        return "best" if kept == {self.score} else "final"

    def leader(self, rows: Sequence[Row]) -> Row | None:
        """The row with the best mean of the score that counts; None if it is unknown whether high or low is best."""
        if self.lowest is None:
            return None
        sign = 1 if self.lowest else -1
        means = {number: spread.mean for number, row in enumerate(rows) if (spread := self._judged(row)) is not None}
        return rows[min(means, key=lambda number: sign * means[number])] if means else None

    def _judged(self, row: Row) -> Spread | None:
        return row.best if self.judged_by == "best" else row.final

    def _row(self, group: Group) -> Row:
        """A group's row; a run whose last score is missing or not finite counts as a failure."""
        final, best, seconds, failures = [], [], [], list(group.failures)
        for run in group.runs:
            series = run.series.get(self.score)
            extreme = series.extreme(self.lowest) if series else None
            last = series.values[-1] if series else None
            if last is None:
                failures.append(f"{run.name}: its last {self.score} is not a finite number")
                continue
            final.append(last)
            if extreme is not None:
                best.append(extreme[1])
            seconds.append(number(run.about.get("seconds")) or 0.0)
        spreads = [Spread(tuple(found)) if found else None for found in (final, best, seconds)]
        return Row(group.label, group.runs, failures, *spreads)

    def table(self) -> str:
        """The table for a terminal of 80 columns, with the verdict below it."""
        rows = self.rows()
        leader = self.leader(rows)
        head = (self.over if len(self.over) < 6 else "runs", "final", "std", "min", "max", "best", "std", "time")
        widths = (5, 8, 8, 8, 8, 8, 8, 7)
        label_width = max(len(row.label) for row in rows)
        own_line = 2 + label_width + sum(widths) + len(widths) > COLUMNS
        start = "" if own_line else " " * (label_width + 2)
        lines = [start + "".join(f" {name:>{width}}" for name, width in zip(head, widths, strict=True))]
        for row in rows:
            mark = "* " if row is leader and len(rows) > 1 else "  "
            cells = "".join(f" {cell:>{width}}" for cell, width in zip(cells_of(row), widths, strict=True))
            if own_line:
                lines += [mark + row.label, cells]
            else:
                lines.append(f"{mark}{row.label:<{label_width}}{cells}")
        direction = "not known which" if self.lowest is None else "lower" if self.lowest else "higher"
        lines += ["", f"final and best {self.score} of each run ({direction} is better): mean over {self.over},"]
        lines += ["standard deviation (n - 1), and range of the final ones"]
        if "folds" in self.over:
            lines += ["folds share training examples, so their spread understates how much is chance"]
        lines += self.verdict(rows)
        lines += [f"failed   {failure}" for row in rows for failure in row.failures]
        lines += [f"note     {run.name}: {run.problem}" for row in rows for run in row.runs if run.problem]
        return "\n".join(lines)

    def verdict(self, rows: Sequence[Row]) -> list[str]:
        """Lines that name the rows whose difference to the leader is within the spread over seeds."""
        leader = self.leader(rows)
        others = [row for row in rows if row is not leader and self._judged(row) is not None]
        if self.lowest is None and len(rows) > 1:
            return ["no row is marked as best: train with --best-is highest or --best-is lowest to say which is"]
        if leader is None or not others:
            return []
        judged = self._judged(leader)
        if judged is None or len(judged.values) < 2:
            return ["* best mean; one seed can't show how much of a difference is chance: --seeds 3"]
        alike = [row.label for row in others if not told_apart(judged, self._judged(row))]
        lines = [f"* best mean of the {self.judged_by} score"]
        if alike:
            lines += wrapped(f"within the spread over {self.over}, so perhaps not better than: {'; '.join(alike)}")
        else:
            lines.append(f"the difference to every other row exceeds the spread over {self.over} (Welch's t, 95 %)")
        return lines

    def record(self) -> dict[str, Any]:
        """All numbers, for the JSON file."""
        rows = self.rows()
        leader = self.leader(rows)
        judged = self._judged(leader) if leader else None
        return {
            "title": self.title,
            "score": self.score,
            "lowest_is_best": self.lowest,
            "judged_by": self.judged_by,
            "best": leader.label if leader else None,
            "not_told_apart_from_best": [
                row.label
                for row in rows
                if leader and row is not leader and (other := self._judged(row)) and not told_apart(judged, other)
            ],
            "rows": [
                {
                    "label": row.label,
                    "runs": [str(run.folder) for run in row.runs],
                    "seeds": [mapping(run.about.get("settings")).get("seed") for run in row.runs],
                    **{
                        name: spread.record() if spread else None
                        for name, spread in (("final", row.final), ("best", row.best), ("seconds", row.seconds))
                    },
                    "failures": row.failures,
                }
                for row in rows
            ],
        }

    def figure(self) -> Figure:
        """The curves of the score and the training losses: a colour per group, thin per run, thick for their mean."""
        from .. import figures

        names = {name for group in self.groups for run in group.runs for name in run.series}
        losses = sorted(name for name in names if name.startswith("train/") and panel_of(name) not in LAST_PANELS)
        panels = [self.score, *losses[:MAX_LOSS_PANELS]]
        columns = min(2, len(panels))
        rows = -(-len(panels) // columns)
        figure = figures.new_figure(5.2 * columns, 0.9 + 3.6 * rows)
        axes_of = [figure.add_subplot(rows, columns, place) for place in range(1, len(panels) + 1)]
        for axes, name in zip(axes_of, panels, strict=True):
            self._draw(axes, name)
        handles, labels = axes_of[0].get_legend_handles_labels()
        if labels:
            per_row = 1 if max(map(len, labels)) > 40 else 2 if max(map(len, labels)) > 20 else 4
            figure.legend(
                handles, labels, loc="outside lower center", ncols=min(per_row, len(labels)), fontsize="small"
            )
        figure.suptitle(self.title)
        return figure

    def _draw(self, axes: Axes, name: str) -> None:
        import matplotlib

        batch_sizes = {mapping(run.about.get("fields")).get("batch_size") for g in self.groups for run in g.runs}
        by_epoch = len(batch_sizes) > 1  # a step then has a different number of examples

        count = len(self.groups)
        colors: list[Any] = [f"C{place}" for place in range(count)]
        if count > 10:  # neighbours in the grid get neighbouring colours
            colors = [matplotlib.colormaps["viridis"](place / (count - 1)) for place in range(count)]
        drawn: list[float] = []
        for color, group in zip(colors, self.groups, strict=True):
            curves = []
            for run in group.runs:
                if name in run.series:
                    series = run.series[name]
                    pairs = zip(series.epochs if by_epoch else series.steps, series.values, strict=True)
                    curves.append({x: value for x, value in pairs if x is not None and value is not None})
            for curve in curves:
                axes.plot(list(curve), list(curve.values()), color=color, linewidth=0.7, alpha=0.5)
                drawn += curve.values()
            # where a run ends, a mean over the others would jump
            shared = [x for x in curves[0] if all(x in curve for curve in curves)] if curves else []
            means = [statistics.fmean(curve[x] for curve in curves) for x in shared]
            marker = "o" if len(shared) < 20 else None
            axes.plot(shared, means, color=color, linewidth=2.2, marker=marker, markersize=4, label=group.label)
        if direction_of(name) == "lowest" and drawn and min(drawn) > 0 and max(drawn) > 20 * min(drawn):
            axes.set_yscale("log")
        axes.set_xlabel("epoch" if by_epoch else "optimizer step")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)


def told_apart(first: Spread | None, second: Spread | None) -> bool:
    """Whether two means differ at the 95 % level (Welch 1947); False if either is of one value."""
    if first is None or second is None or first.deviation is None or second.deviation is None:
        return False
    parts = [spread.deviation**2 / len(spread.values) for spread in (first, second) if spread.deviation is not None]
    difference, error = abs(first.mean - second.mean), math.sqrt(sum(parts))
    if error == 0:
        return difference > 0
    sizes = (len(first.values), len(second.values))
    freedom = sum(parts) ** 2 / sum(part**2 / (size - 1) for part, size in zip(parts, sizes, strict=True))
    return difference > student_t(freedom) * error


def student_t(freedom: float) -> float:
    """The 97.5 % quantile of Student's t; interpolated between integers, which is slightly too large; 30 at most."""
    freedom = min(max(freedom, 1.0), float(len(STUDENT_T)))
    below = min(int(freedom), len(STUDENT_T) - 1)
    return STUDENT_T[below - 1] + (freedom - below) * (STUDENT_T[below] - STUDENT_T[below - 1])


def cells_of(row: Row) -> list[str]:
    """The eight cells of a row as texts."""
    failed = len(row.failures)
    if row.final is None or row.seconds is None:
        return ["0" if failed else "none", *["-"] * 7]
    counted = f"{len(row.final.values)}/{len(row.final.values) + failed}" if failed else str(len(row.final.values))
    final, best = row.final, row.best
    shown: list[float | None] = [
        final.mean,
        final.deviation,
        min(final.values),
        max(final.values),
        best.mean if best else None,
        best.deviation if best else None,
    ]
    return [counted, *("-" if value is None else digits(value) for value in shown), seconds_text(row.seconds.mean)]


def digits(value: float) -> str:
    """A number with four digits, at most eight characters."""
    text = f"{value:.4g}"
    return text if len(text) <= 8 else f"{value:.1e}"


def seconds_text(seconds: float) -> str:
    """A duration, at most seven characters."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} m" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def wrapped(text: str) -> list[str]:
    """A text as lines of 80 columns."""
    import textwrap

    return textwrap.wrap(text, COLUMNS, subsequent_indent="  ")


def choose_score(runs: Sequence[Run], wanted: str | None) -> tuple[str, bool | None]:
    """The score to compare by, and whether its lowest value is best (None: unknown).

    Raises UserError if the runs have no score in common.
    """
    shared = [score.name for score in runs[0].scores if all(score.name in run.series for run in runs)] if runs else []
    if wanted is None:
        headline = runs[0].headline if runs else None
        name = headline.name if headline is not None and headline.name in shared else next(iter(shared), None)
        if name is None:
            damaged = next((f"{run.folder}: {run.problem}; " for run in runs if run.problem), "")
            raise UserError(
                f"{damaged}the runs have no score in common; give runs of one recipe that have been evaluated"
            )
        return name, runs[0].lowest_is_best(name)
    if wanted not in shared:
        raise UserError(f"--score {wanted}: the runs have no such score in common; choose from {', '.join(shared)}")
    return wanted, runs[0].lowest_is_best(wanted)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups runs by the settings in which they differ; runs that differ only in seed and fold share a row."""

    def settings(run: Run) -> dict[str, Any]:
        chosen = mapping(run.about.get("settings"))
        compressed = ("gradient_compression", "weight_compression")
        more = {name: chosen.get(name) for name in ("precision", "accumulate", *compressed, "max_steps")}
        fields = {name: value for name, value in mapping(run.about.get("fields")).items() if name != "fold"}
        return {"recipe": run.recipe, **fields, **more, "data": run.source}

    def repetition(run: Run) -> tuple[Any, Any]:
        return mapping(run.about.get("settings")).get("seed"), mapping(run.about.get("fields")).get("fold")

    said = [settings(run) for run in runs]
    names = list(dict.fromkeys(name for one in said for name in one))
    differing = [name for name in names if len({repr(one.get(name)) for one in said}) > 1]
    if "recipe" in differing:  # different recipes have different fields
        differing = ["recipe", *(["data"] if "data" in differing else [])]
    sources = [(run.about.get("source_sha256"), repr(run.about.get("modules") or {})) for run in runs]
    groups: dict[str, Group] = {}
    for run, one, source in zip(runs, said, sources, strict=True):
        label = " ".join(f"{name}={one.get(name)}" for name in differing)
        versions = list(dict.fromkeys(s for s, other in zip(sources, said, strict=True) if other == one))
        if len(versions) > 1:
            label += f" source {versions.index(source) + 1}"
        label = label.strip() or "all runs"
        group = groups.setdefault(label, Group(label))
        if any(repetition(other) == repetition(run) for other in group.runs):
            label = f"{label} ({run.name})"  # a repetition is not a further seed
            group = groups.setdefault(label, Group(label))
        group.runs.append(run)
    return list(groups.values())


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes comparison.json, table.txt and curves.png into a folder and returns their paths; raises OSError."""
    from .. import figures
    from ..files import write_json, write_text

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", comparison.record())
    table = write_text(folder / "table.txt", comparison.table() + "\n")
    return [table, folder / "comparison.json", *figures.save({"curves": comparison.figure()}, folder)]

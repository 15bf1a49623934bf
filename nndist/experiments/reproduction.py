"""Trains every recipe as documented, and makes the table of its results beside the documents' figures."""

from __future__ import annotations

import platform
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import machine
from ..errors import UserError
from ..files import Each, read_json, write_json, write_whole
from ..recipe.loading import load_recipe
from ..report.markup import duration, figure_text
from ..runs.reading import Run, Series, mapping, number
from .audit import outcome_of_audit
from .members import Member, plan
from .sweep import Sweep

BEGIN, END = "<!-- made by: python launch/reproduce.py --write -->", "<!-- end of the reproduction -->"
RESULTS = "tests/benchmarks/results/reproduction.json"
PAGE_COLUMNS = 120
BUSY = 0.25  # cores: if other programs use more, the time is reported as a busy machine's
USAGE_KIND = {"cpu_seconds?": float, "others?": float}
RESULT_KIND = {
    **dict.fromkeys(("recipe", "documented", "data", "device", "machine", "torch"), str),
    "epochs": float,
    "scores": Each([(float, None)]),
    "texts": Each([str]),
    "seeds": [int],
    "seconds": [float],
    "cpu_seconds": [(float, None)],
    "others": [(float, None)],
    "dates": [str],
    "quick?": bool,
    "audited?": str,
    "source_sha256?": str,
}
"""The format of the results file (see files.check)."""
QUICK = ["--data-source", "sample", "--max-steps", "30"]


@dataclass
class Result:
    """What one recipe reached, one value per seed.

    scores: final values by name. texts: figures that are texts and stand for scores. seconds: of the training with its
    evaluations, without the start of the process and the figures. cpu_seconds: of all threads of the process, start and
    figures included. others: how many cores other programs kept busy meanwhile; None if unknown. audited: the outcome
    of `--audit`.
    """

    recipe: str
    documented: str
    data: str
    epochs: float
    scores: dict[str, list[float | None]]
    texts: dict[str, list[str]]
    seeds: list[int]
    seconds: list[float]
    cpu_seconds: list[float | None]
    others: list[float | None]
    device: str
    machine: str
    torch: str
    dates: list[str]
    quick: bool = False
    audited: str = ""
    source_sha256: str = field(default="", repr=False)

    def ours(self) -> str:
        """The scores; for several seeds medians with their range."""
        said = [value_text(name, values) for name, values in self.scores.items()]
        said += [values[0] + " (first seed)" * (len(values) > 1) for values in self.texts.values()]
        return "; ".join(said)

    def seeds_text(self) -> str:
        return f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else "1 seed"

    def time(self) -> str:
        """The median time over the seeds, and whether the machine was busy with other work."""
        busy = any(others is None or others > BUSY for others in self.others)
        seconds = statistics.median(self.seconds)
        known = [value for value in self.cpu_seconds if value is not None]
        if not busy or not known:
            return duration(seconds)
        # CPU time includes the start of the process and its figures: most of it for a short training
        computing = f"; CPU time {duration(statistics.median(known))}" * (seconds >= 60)
        return f"{duration(seconds)} (busy machine{computing})"

    def where(self) -> str:
        """The device, the machine and the latest date."""
        return f"{self.device}, {self.machine}; {max(self.dates)}"


def value_text(name: str, values: Sequence[float | None]) -> str:
    """Such as "test/accuracy 98.55 %"; for several values their median and range."""
    series, known = Series(name), [value for value in values if value is not None]
    if len(known) < len(values):
        return f"{name} not finite for {len(values) - len(known)} of {len(values)} seeds"
    middle, *ends = [
        f"{100 * value:.4f} %" if (text := figure_text(series, value)) == "100.00 %" and value < 1 else text
        for value in (statistics.median(known), min(known), max(known))
    ]
    return f"{name} {middle}" + (f" ({ends[0]} to {ends[1]})" if len(known) > 1 else "")


def planned(recipes: Iterable[Path], *, seeds: int, runs_dir: str | Path, quick: bool) -> dict[Path, list[Member]]:
    """The trainings by recipe, all fields at the recipe's defaults; raises UserError."""
    flags = [*(QUICK if quick else []), "--figures"]
    found = {}
    for path in recipes:
        name = "quick" if quick else "documented"
        _, found[path] = plan(str(path), [], seeds, flags, name=name, runs_dir=runs_dir)
        for member in found[path]:
            member.label = path.stem
    return found


def reproduce(
    path: Path,
    members: list[Member],
    *,
    jobs: int,
    threads: int | None,
    gpus: list[str],
    quick: bool,
    say: Callable[[str], None],
    show: Callable[[float], None],
) -> Result:
    """Runs the unfinished trainings of one recipe and returns the result.

    Raises UserError if a training failed, sweep.Stopped if a signal stopped it.
    """
    sweep = Sweep(members, logs_of(members[0]), jobs=jobs, gpus=gpus, say=say, threads=threads)
    sweep.train(show)
    for member in members:
        if member.usage:
            write_json(usage_file(member), member.usage)
    failed = next((member for member in members if member.failure), None)
    if failed:
        raise UserError(f"{path}: {failed.failure}")
    runs = [run for group in sweep.groups() for run in group.runs]
    return result_of(path, members, runs, quick=quick)


def result_of(path: Path, members: list[Member], runs: list[Run], *, quick: bool) -> Result:
    """The result of finished runs of one recipe, which differ only in the seed."""
    kind = load_recipe(path)
    about = runs[0].about
    names = list(kind.headline) or [s.name for s in runs[0].scores if "loss" not in s.name][:3]
    names = names or [s.name for s in runs[0].scores][:1]
    texts = {n: [figure_text_of(member, n) for member in members] for n in names if n not in runs[0].series}
    usage = [read_usage(member) for member in members]
    return Result(
        recipe=path.stem,
        documented=kind.documented,
        data=runs[0].source,
        epochs=round(runs[0].last_epoch or 0.0, 2),
        scores={n: [run.series[n].values[-1] for run in runs] for n in names if n in runs[0].series},
        texts=texts,
        seeds=[member.seed for member in members],
        seconds=[number(run.about.get("seconds")) or 0.0 for run in runs],
        cpu_seconds=[number(one.get("cpu_seconds")) for one in usage],
        others=[number(one.get("others")) for one in usage],
        device=str(about.get("device")),
        machine=processor() if str(about.get("device")).startswith("CPU") else "",
        torch=str(mapping(about.get("versions")).get("torch")),
        dates=sorted({str(run.about.get("updated"))[:10] for run in runs}),
        quick=quick,
        source_sha256=str(about.get("source_sha256")),
    )


def audited(members: list[Member], result: Result) -> str:
    """Trains a random stretch of each training again and notes the outcome; raises UserError if one differs."""
    outcomes = [outcome_of_audit(member.folder, stretches=1) for member in members]
    for member, (outcome, holds) in zip(members, outcomes, strict=True):
        if not holds:
            raise UserError(f"{member.folder}: its audit fails: {outcome}")
    result.audited = "; ".join(dict.fromkeys(outcome for outcome, _ in outcomes))
    return result.audited


def logs_of(member: Member) -> Path:
    """The folder for the output and the usage files of one recipe's trainings."""
    return member.folder.parent / "logs"


def usage_file(member: Member) -> Path:
    return logs_of(member) / f"{member.folder.name}.json"


def read_usage(member: Member) -> dict[str, Any]:
    """A training's sweep.Member.usage from its file; empty if there is none. Raises UserError if it is damaged."""
    try:
        return read_json(usage_file(member), USAGE_KIND)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{usage_file(member)}: can't be read ({reason}); delete it: it only records CPU time"
        ) from None


def figure_text_of(member: Member, name: str) -> str:
    """A figure that is a text, on one line; raises UserError if the run has none of that name."""
    path = member.folder / "figures" / f"{name}.txt"
    try:
        return " ".join(path.read_text(encoding="utf-8").split())
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; the recipe's headline is neither a score nor a text figure"
        ) from None


def processor() -> str:
    """The CPU's name and the number of cores that this process may use, such as "AMD EPYC, 2 cores"."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {machine.cores()} cores"


def read_results(path: Path) -> dict[str, Result]:
    """The recorded results by recipe; empty if there is no file. Raises UserError if it can't be read."""
    try:
        recorded = read_json(path, Each(RESULT_KIND))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: not a record of reproduced recipes ({reason}); restore it or delete it") from None
    known = {field.name for field in fields(Result)}
    return {
        recipe: Result(**{name: value for name, value in one.items() if name in known})
        for recipe, one in recorded.items()
    }


def write_results(path: Path, results: dict[str, Result]) -> None:
    """Writes the results, sorted by recipe; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {name: asdict(results[name]) for name in sorted(results)})


def table(results: Iterable[Result]) -> str:
    """The table of recipes/README.md in Markdown, and below it where and when its rows were measured."""
    found = list(results)
    with_documents = any(result.documented for result in found)
    heads = ["recipe", *["the document's figure"] * with_documents, "here, at the end", "data", "time"]
    cells = [[f"`{r.recipe}`", *[r.documented or "none"] * with_documents, r.ours(), r.data, r.time()] for r in found]
    lines = [f"| {' | '.join(row)} |" for row in (heads, *cells)] + [""]
    lines.insert(1, f"|{'---|' * len(heads)}")
    wheres = [result.where() for result in found]
    for where in sorted(set(wheres), key=lambda where: (wheres.count(where), where)):
        there = [result for result in found if result.where() == where]
        names = "all" if len(there) == len(found) else ", ".join(f"`{result.recipe}`" for result in there)
        if len(there) > 2 and len(found) / 2 < len(there) < len(found):
            names = "the others"
        lines += textwrap.wrap(f"{where}: {names}.", PAGE_COLUMNS, break_on_hyphens=False)
    if names_of := [f"`{result.recipe}`" for result in found if result.audited]:
        said = f"Audited, a random stretch trained again to the same bits: {', '.join(names_of)}."
        lines += ["", *textwrap.wrap(said, PAGE_COLUMNS, break_on_hyphens=False)]
    return "\n".join(lines)


def listing(results: Iterable[Result], columns: int) -> str:
    """The results for a terminal, a paragraph per recipe."""
    lines = []
    for result in results:
        lines += [f"{result.recipe}{', 30 steps only' * result.quick}"]
        said = {"document": result.documented} if result.documented else {}
        said["here"] = result.ours()
        said |= {"data": result.data, "time": f"{result.time()} ({result.seeds_text()}, {result.where()})"}
        for name, text in said.items():
            lines += textwrap.wrap(
                text, columns - 1, initial_indent=f"    {name:<10}", subsequent_indent=" " * 14, break_long_words=False
            )
    return "\n".join(lines)


def write_table(path: Path, made: str) -> None:
    """Writes a table between the markers of a page; raises UserError if it has none."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path}: has no lines {BEGIN} and {END}; put them where the table belongs")
    whole = f"{before}{BEGIN}\n{made}\n{END}{after}"
    if whole != text:
        write_whole(path, whole.encode())

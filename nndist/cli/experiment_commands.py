"""The commands that train many times, compare and reproduce; in the form of `commands`."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import CHECKOUT, RECIPES
from ..progress import bar, watched
from .commands import Parser, mistakes_in_one_line
from .table import is_recipe

if TYPE_CHECKING:
    from ..experiments.comparison import Comparison


def compare_command(arguments: list[str]) -> None:
    """`nndist compare`: runs the missing trainings, prints the table; exits with 0, 1 (one failed) or 2."""
    parser = Parser("compare", "All other flags are the training's own (nndist train RECIPE --help).")
    parser.allow_abbrev = False
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a recipe, or the folders of runs")
    parser.add_argument(
        "--vary", action="append", default=[], metavar="FIELD=A,B,...", help="may be given several times"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train each with seeds 0 to N-1 (default: 1)")
    parser.add_argument("--jobs", type=int, metavar="N", help="trainings at a time (default: one per GPU or CPU core)")
    parser.add_argument("--name", help="the comparison's name (default: the varied fields)")
    parser.add_argument("--score", help="such as test/accuracy (default: the score that chooses the best model)")
    parser.add_argument("--runs-dir", default="runs", help="folder or URL of all runs (default: %(default)s)")
    with mistakes_in_one_line():
        options, flags = parser.parse_known_args(arguments)
        recipe = options.paths[0]
        if is_recipe(recipe):
            if len(options.paths) > 1:
                raise UserError(f"{options.paths[1]}: one recipe at a time, and only flags after it")
            sys.exit(compare_values(recipe, options, flags))
        unknown = [*flags, *(f"--vary {text}" for text in options.vary)]
        if unknown:
            raise UserError(f"{unknown[0]}: needs a recipe to train, and {recipe} is not one")
        from ..runs.fetching import folder_of

        compare_runs([folder_of(path, weights=False) for path in options.paths], options)


def compare_values(recipe: str, options: argparse.Namespace, flags: list[str]) -> int:
    """Trains a recipe with several values and seeds and prints the table; returns the exit code. Raises UserError."""
    from ..experiments.comparison import Comparison, choose_score
    from ..experiments.sweep import Stopped, Sweep, devices, plan
    from ..machine import cores

    name, members = plan(recipe, options.vary, options.seeds, flags, name=options.name, runs_dir=options.runs_dir)
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: must be at least 1")
    gpus = devices(members[0].config.cpu)
    jobs = min(len(members), options.jobs or len(gpus) or cores())
    folder = members[0].folder.parent / f"compare-{name}"
    with progress_bar(len(members), "trainings") as (show, say):
        sweep = Sweep(members, folder / "logs", jobs=jobs, gpus=gpus, say=say)
        if sweep.waiting:
            threads = max(1, cores() // jobs)
            each = "a GPU" if gpus else f"{threads} CPU thread{'s' * (threads > 1)}"
            done = f", {sweep.num_finished} of them done" * bool(sweep.num_finished)
            say(f"{len(members)} trainings{done}; {jobs} at a time with {each} each")
            say(f"logs     {folder / 'logs'}")
        try:
            sweep.train(show)
        except Stopped as stopped:
            print(f"error: {stopped}", file=sys.stderr, flush=True)
            return 128 + stopped.signal
    groups = sweep.groups()
    runs = [run for group in groups for run in group.runs]
    if not runs:
        raise UserError(f"every training failed; the first one: {members[0].failure}")
    score, lowest = choose_score(runs, options.score)
    show_comparison(Comparison(groups, score, lowest, f"{members[0].folder.parent.name}: {name}"), folder)
    return 1 if any(member.failure for member in members) else 0


def compare_runs(folders: list[Path], options: argparse.Namespace) -> None:
    """Compares existing runs; raises UserError."""
    from ..experiments.comparison import Comparison, choose_score, grouped
    from ..runs.reading import read_run

    if len({folder.absolute() for folder in folders}) < len(folders):
        raise UserError("a run is given twice; give each once")
    runs = [read_run(folder) for folder in folders]
    score, lowest = choose_score(runs, options.score)
    if len({run.source for run in runs}) > 1:
        sources = sorted({run.source for run in runs})
        print(f"note     the data differ ({', '.join(sources)}): their scores say little about each other")
    common = Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    name = options.name or "runs"
    show_comparison(Comparison(grouped(runs), score, lowest, f"{common.name}: {name}"), common / f"compare-{name}")


def show_comparison(comparison: Comparison, folder: Path) -> None:
    """Prints the table, and writes it with the numbers and the figure."""
    from ..experiments.comparison import write

    print(comparison.table())
    for path in write(comparison, folder):
        with contextlib.suppress(ValueError):
            path = path.relative_to(Path.cwd())
        print(f"written  {path}", flush=True)


@contextlib.contextmanager
def progress_bar(total: int, unit: str) -> Iterator[tuple[Callable[[float], None], Callable[[str], None]]]:
    """Context manager of a bar: yields a function that moves it and one that prints a line above it."""
    shown = bar(total, unit, bar_format="{desc} {percentage:.0f}% of {total_fmt} {elapsed}<{remaining} {bar}")

    def show(place: float) -> None:
        shown.update(place - shown.n)

    def say(line: str) -> None:
        if watched():
            shown.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    with shown:
        yield show, say


def reproduce_command(arguments: list[str]) -> None:
    """`nndist reproduce`: runs the missing trainings, prints the table; exits with 0, 1 (one failed) or 2."""
    parser = Parser("reproduce")
    parser.add_argument("recipes", nargs="*", help="names of recipes, or files (default: all)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train each with seeds 0 to N-1 (default: 1)")
    parser.add_argument("--quick", action="store_true", help="30 steps of each, on the data in the package")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings of a recipe at a time (default: 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="of each training (default: cores / jobs)")
    parser.add_argument("--runs-dir", default="runs/reproduced", help="default: %(default)s")
    parser.add_argument("--audit", action="store_true", help="train a random stretch of each again, bit for bit")
    parser.add_argument("--write", action="store_true", help="record the results, and their table in recipes/README.md")
    with mistakes_in_one_line():
        options = parser.parse_args(arguments)
        for name in ("seeds", "jobs", "threads"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
        if options.quick and options.write:
            raise UserError("--quick --write: recipes/README.md holds complete trainings only; leave out one")
        if options.write and CHECKOUT is None:
            raise UserError("--write: records results in the repository of nndist, and this nndist is in none")
        known = {path.stem: path for path in sorted(RECIPES.glob("*.py"))}
        paths = [known[name] if name in known else Path(name) for name in options.recipes] or list(known.values())
        missing = next((path for path in paths if not path.is_file()), None)
        if missing:
            raise UserError(f"{missing}: not a recipe; name one of {', '.join(known)}, or a recipe's file")
        sys.exit(reproduce_recipes(paths, options, CHECKOUT))


def reproduce_recipes(paths: list[Path], options: argparse.Namespace, root: Path | None) -> int:
    """Trains recipes one after the other and prints the results; returns the exit code. Raises UserError.

    root: the repository, which --write records the results in.
    """
    from ..experiments.reproduction import (
        RESULTS,
        audited,
        listing,
        planned,
        read_results,
        reproduce,
        table,
        write_results,
        write_table,
    )
    from ..experiments.sweep import Stopped, devices

    found = planned(paths, seeds=options.seeds, runs_dir=options.runs_dir, quick=options.quick)
    recorded = read_results(root / RESULTS) if root else {}
    results, failures = [], []
    with progress_bar(sum(map(len, found.values())), "trainings") as (show, say):
        done = 0

        def move(before: int, place: float) -> None:
            show(before + place)

        for path, members in found.items():
            try:
                result = reproduce(
                    path,
                    members,
                    jobs=options.jobs,
                    threads=options.threads,
                    gpus=devices(cpu=False),
                    quick=options.quick,
                    say=say,
                    show=partial(move, done),
                )
                if options.audit:
                    say(f"audit    {path.stem}: {audited(members, result)}")
            except Stopped as stopped:
                print(f"error: {stopped}", file=sys.stderr, flush=True)
                return 128 + stopped.signal
            except UserError as error:
                failures.append(str(error))
                continue
            finally:
                done += len(members)
            results.append(result)
            say(listing([result], min(100, shutil.get_terminal_size().columns)))
            if options.write and root:  # after each recipe, so that an interruption loses nothing
                recorded[result.recipe] = result
                write_results(root / RESULTS, recorded)
                write_table(root / "recipes/README.md", table(recorded.values()))
    for failure in failures:
        print(f"failed   {failure}")
    if results:
        print(table(results))
    return 1 if failures else 0

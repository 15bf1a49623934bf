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
    from ..experiments.comparison import Comparison, Group
    from ..experiments.sweep import Sweep


def compare_command(arguments: list[str]) -> None:
    """`nndist compare`: runs the missing trainings, prints the table; exits with 0, 1 (one failed) or 2."""
    parser = Parser("compare", "All other flags are the training's own (nndist train RECIPE --help).")
    parser.allow_abbrev = False
    parser.add_argument("paths", metavar="PATH", nargs="+", help="a recipe, or the folders of runs")
    parser.add_argument(
        "--vary", action="append", default=[], metavar="FIELD=A,B,...", help="may be given several times"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train each with seeds 0 to N-1 (default: 1)")
    help = "train each N times, with another Nth of the training examples as validation set"
    parser.add_argument("--folds", type=int, default=1, metavar="N", help=help)
    parser.add_argument("--jobs", type=int, metavar="N", help="trainings at a time (default: one per GPU or CPU core)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of each training (default: 1)")
    help = "let optuna choose the values of each training; --vary FIELD=A..B is a range"
    parser.add_argument("--search", choices=["optuna"], help=help)
    parser.add_argument("--trials", type=int, default=30, metavar="N", help="of the search (default: %(default)s)")
    parser.add_argument("--sampler", choices=["tpe", "random"], default="tpe", help="of the search (default: tpe)")
    help = "stop a trial that is worse than the median of those before it at the same evaluation"
    parser.add_argument("--prune", action="store_true", help=help)
    parser.add_argument("--search-seed", type=int, default=0, metavar="N", help="of the sampler (default: 0)")
    parser.add_argument("--name", help="the comparison's name (default: the varied fields)")
    parser.add_argument("--score", help="such as test/accuracy (default: the score that chooses the best model)")
    parser.add_argument("--runs-dir", default="runs", help="folder or URL of all runs (default: %(default)s)")
    with mistakes_in_one_line(arguments):
        options, flags = parser.parse_known_args(arguments)
        recipe = options.paths[0]
        if is_recipe(recipe):
            if len(options.paths) > 1:
                raise UserError(f"{options.paths[1]}: one recipe at a time, and only flags after it")
            if options.processes < 1:
                raise UserError(f"--processes {options.processes}: must be at least 1")
            if options.jobs is not None and options.jobs < 1:
                raise UserError(f"--jobs {options.jobs}: must be at least 1")
            sys.exit((search_values if options.search else compare_values)(recipe, options, flags))
        unknown = [*flags, *(f"--vary {text}" for text in options.vary)]
        if unknown:
            raise UserError(f"{unknown[0]}: needs a recipe to train, and {recipe} is not one")
        from ..runs.fetching import folder_of

        compare_runs([folder_of(path, weights=False) for path in options.paths], options)


def compare_values(recipe: str, options: argparse.Namespace, flags: list[str]) -> int:
    """Trains a recipe with several values and seeds and prints the table; returns the exit code. Raises UserError."""
    from ..experiments.comparison import choose_score
    from ..experiments.members import plan
    from ..experiments.sweep import Sweep, devices

    settings = {"name": options.name, "runs_dir": options.runs_dir, "folds": options.folds}
    name, members = plan(recipe, options.vary, options.seeds, flags, **settings)
    gpus = devices(members[0].config.cpu)
    jobs = min(len(members), jobs_of(options, gpus))
    folder = members[0].folder.parent / f"compare-{name}"
    with progress_bar(len(members), "trainings") as (show, say):
        sweep = Sweep(members, folder / "logs", jobs=jobs, gpus=gpus, say=say, processes=options.processes)
        if stopped := train(sweep, len(members), show):
            return stopped
    groups = sweep.groups()
    runs = [run for group in groups for run in group.runs]
    if not runs:
        raise UserError(f"every training failed; the first one: {members[0].failure}")
    score, lowest = choose_score(runs, options.score)
    show_comparison(titled(groups, score, lowest, folder, options), folder)
    return 1 if any(member.failure for member in members) else 0


def search_values(recipe: str, options: argparse.Namespace, flags: list[str]) -> int:
    """Trains the trials of a search and prints the table; returns the exit code. Raises UserError."""
    from ..config import RunConfig
    from ..experiments import members, search
    from ..experiments.sweep import devices
    from ..recipe.loading import load_recipe

    members.check_numbers(options.seeds, options.folds, options.name, flags)
    kind = load_recipe(recipe)
    space = search.space_of(options.vary, kind)
    ends = {name: choice.ends() for name, choice in space.items()}
    made, config = members.parsed(recipe, kind, {name: values[0] for name, values in ends.items()}, flags)
    for name, values in ends.items():
        for value in values:
            members.parsed(recipe, kind, {name: value}, flags)
    lowest = search.check(options, made)
    gpus = devices(config.cpu)
    jobs = jobs_of(options, gpus)
    name = options.name or f"search-{'-'.join(space)}"
    make = search.trial_members(recipe, kind, flags, name, options)
    folder = RunConfig(runs_dir=options.runs_dir).runs_folder / made.name / f"compare-{name}"
    study = search.Study(
        folder / search.FILE,
        space,
        sampler=options.sampler,
        seed=options.search_seed,
        window=jobs,
        prune=options.prune,
        lowest=lowest,
        score=options.score,
    )
    each = options.seeds * options.folds
    with progress_bar(options.trials * each, "trainings") as (show, say):
        settings = {"jobs": jobs, "gpus": gpus, "say": say, "processes": options.processes}
        found = search.Search(study, options.trials, options.score, make, folder / "logs", **settings)
        found.total = options.trials * each
        if options.score.startswith("test/"):
            say(
                f"note     {options.score} chooses the values, so it does not test them: --hold-out 0.1 --score val/..."
            )
        if stopped := train(found, options.trials * each, show):
            return stopped
    groups = found.groups()
    pruned = sum(trial.state == "pruned" for trial in study.trials[: options.trials])
    if not any(group.runs for group in groups):
        raise UserError(f"every trial failed ({folder / 'logs'}); remove {study.path} to begin again")
    show_comparison(titled(groups, options.score, lowest, folder, options), folder)
    print(f"trials   {options.trials}, {pruned} of them pruned; the best of many is also the luckiest")
    return 1 if any(trial.state == "failed" for trial in study.trials[: options.trials]) else 0


def jobs_of(options: argparse.Namespace, gpus: list[str]) -> int:
    """How many trainings run at a time."""
    from ..machine import cores

    return options.jobs or max(1, (len(gpus) or cores()) // options.processes)


def train(sweep: Sweep, total: int, show: Callable[[float], None]) -> int:
    """Runs all trainings; returns 0, or the exit code if a signal stopped them."""
    from ..experiments.sweep import Stopped

    if sweep.waiting or sweep.num_finished < total:
        each = f"{sweep.threads} CPU thread{'s' * (sweep.threads > 1)}"
        each = "a GPU" if sweep.gpus else each
        each = each if sweep.processes == 1 else f"{sweep.processes} processes of {each}"
        done = f", {sweep.num_finished} of them done" * bool(sweep.num_finished)
        sweep.say(f"{total} trainings{done}; {sweep.jobs} at a time with {each} each")
        sweep.say(f"logs     {sweep.logs}")
    try:
        sweep.train(show)
    except Stopped as stopped:
        print(f"error: {stopped}", file=sys.stderr, flush=True)
        return 128 + stopped.signal
    return 0


def titled(
    groups: list[Group], score: str, lowest: bool | None, folder: Path, options: argparse.Namespace
) -> Comparison:
    """The comparison of a recipe's trainings."""
    from ..experiments.comparison import Comparison

    over = " and ".join([*(["folds"] * (options.folds > 1)), *(["seeds"] * (options.seeds > 1 or options.folds == 1))])
    return Comparison(groups, score, lowest, f"{folder.parent.name}: {folder.name.removeprefix('compare-')}", over)


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
    parents = [folder.absolute().parent for folder in folders]
    try:
        common = Path(os.path.commonpath(parents))
    except ValueError:  # on several drives of Windows
        common = parents[0]
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
    parser = Parser("reproduce").with_traceback()
    parser.add_argument("recipes", nargs="*", help="names of recipes, or files (default: all)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train each with seeds 0 to N-1 (default: 1)")
    parser.add_argument("--quick", action="store_true", help="30 steps of each, on the data in the package")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings of a recipe at a time (default: 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="of each training (default: cores / jobs)")
    parser.add_argument("--runs-dir", default="runs/reproduced", help="default: %(default)s")
    parser.add_argument("--audit", action="store_true", help="train a random stretch of each again, bit for bit")
    parser.add_argument("--write", action="store_true", help="record the results, and their table in recipes/README.md")
    with mistakes_in_one_line(arguments):
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

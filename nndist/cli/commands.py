"""The commands other than training: each parses its arguments, calls the library and exits with 0, 1 or 2.

Their names and examples are in `table`. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from ..errors import UserError, first_line
from ..files import LAUNCH, RECIPES, recipe_file
from .table import COMMANDS


class Parser(argparse.ArgumentParser):
    """The flags of a sub-command. --help prints its examples first; a mistake in the arguments is a UserError."""

    def __init__(self, command: str, epilog: str | None = None):
        super().__init__(prog=f"nndist {command}", epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.examples = COMMANDS[command].text

    def with_traceback(self) -> Parser:
        """Adds --traceback, which shows where an unexpected error comes from; returns itself."""
        self.add_argument("--traceback", action="store_true", help="show Python's traceback with an error")
        return self

    def format_help(self) -> str:
        return f"{self.examples}\n\n{super().format_help()}"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help shows examples)")


@contextlib.contextmanager
def mistakes_in_one_line(arguments: Sequence[str] = ()) -> Iterator[None]:
    """Context manager: an error ends the process with one line and exit code 2 (UserError, OSError), 130 (Ctrl-C) or 1.

    With --traceback in `arguments`, Python's traceback comes first.
    """
    try:
        yield
        return
    except UserError as error:
        message, code = str(error), 2
    except OSError as error:
        message, code = f"{error.filename}: {error.strerror}" if error.filename else first_line(error), 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except Exception as error:
        from .train import where_from

        if "--traceback" in arguments:
            traceback.print_exc()
        message, code = where_from(error, 0), 1
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def verify_command(arguments: list[str]) -> None:
    """`nndist verify`: prints the table and exits with 0, 1 (a promise is broken) or 2 (bad input)."""
    parser = Parser("verify", "All other flags are the training's own (nndist train RECIPE --help lists them).")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (default: 40)")
    parser.add_argument("--kills", type=int, default=4, help="kills of the run on one process (default: 4)")
    parser.add_argument("--fault-seed", type=int, default=0, help="seed of the faults' places (default: 0)")
    parser.add_argument(
        "--elastic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="4, 2 and 3 processes, with a kill between each (default: yes)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    began = time.perf_counter()
    with mistakes_in_one_line(arguments):
        options, flags = parser.parse_known_args(arguments)
        from ..experiments.verify import table, verify
        from ..recipe.loading import load_recipe

        load_recipe(options.recipe)  # a mistake in it is one line here, not one for each training
        if options.steps < 20:
            raise UserError(f"--steps {options.steps}: must be at least 20, to leave room for the faults")
        rows = verify(
            options.recipe,
            flags,
            steps=options.steps,
            kills=options.kills,
            seed=options.fault_seed,
            say=lambda line: print(f"  {line}", file=sys.stderr if options.json else sys.stdout, flush=True),
            elastic=options.elastic,
        )
    broken = sum(not row.kept for row in rows)
    if options.json:
        print(json.dumps({"kept": not broken, "promises": [vars(row) for row in rows]}))
        sys.exit(1 if broken else 0)
    print("\n".join(table(rows)))
    print(f"{len(rows) - broken} of {len(rows)} promises kept, {time.perf_counter() - began:.0f} s")
    sys.exit(1 if broken else 0)


def checkpoint_command(arguments: list[str]) -> None:
    """`nndist checkpoint`: show, verify or convert; exits with 0, 1 (a checkpoint is damaged) or 2 (bad input)."""
    parser = Parser("checkpoint").with_traceback()
    parser.add_argument("action", choices=["show", "verify", "convert"])
    parser.add_argument("run", help="the run's folder or URL, such as runs/mnist_cnn/first")
    parser.add_argument("output", type=Path, nargs="?", help="the file that convert writes")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest; for verify: all)")
    parser.add_argument("--ema", action="store_true", help="convert the EMA of the weights")
    with mistakes_in_one_line(arguments):
        options = parser.parse_args(arguments)
        from ..runs import inspection
        from ..runs.fetching import folder_of

        options.run = folder_of(options.run)
        if options.action == "convert":
            if options.output is None:
                raise UserError("convert: say which file to write, such as weights.safetensors")
            print(inspection.convert(options.run, options.output, step=options.step, ema=options.ema))
            return
        lines, damaged = inspection.show(options.run, step=options.step, verify=options.action == "verify")
    print("\n".join(lines))
    sys.exit(1 if damaged else 0)


def sync_command(arguments: list[str]) -> None:
    """`nndist sync`: sends a run to W&B as one; exits with 0, 1 (not sent) or 2 (bad input)."""
    parser = Parser("sync").with_traceback()
    parser.add_argument("run", help="the run's folder or URL")
    parser.add_argument("--offline", action="store_true", help="write an offline run instead of sending it")
    parser.add_argument("--project", default=os.environ.get("WANDB_PROJECT") or "nndist", help="default: %(default)s")
    parser.add_argument("--artifact", action="store_true", help="send the newest checkpoint too")
    help = "instead of W&B: write it for tensorboard or trackio"
    parser.add_argument("--track", metavar="NAME", nargs="+", default=[], help=help)
    with mistakes_in_one_line(arguments):
        options = parser.parse_args(arguments)
        from ..runs import trackers
        from ..runs.fetching import folder_of
        from ..runs.wandb import choose_mode, sync

        trackers.check_installed(options.track)
        options.run = folder_of(options.run, weights=options.artifact)
        if options.track:
            arrived = [trackers.sync(name, options.run, say=partial(print, flush=True)) for name in options.track]
            sys.exit(0 if all(arrived) else 1)
        mode = choose_mode("offline" if options.offline else "auto", options.run)[0] or "offline"
        sent = sync(
            options.run,
            mode,
            project=options.project,
            artifact=options.artifact,
            say=lambda line: print(line, flush=True),
        )
    sys.exit(0 if sent else 1)


def push_command(arguments: list[str]) -> None:
    """`nndist push`: sends a run to a store; exits with 0, 1 (not everything was sent) or 2 (bad input)."""
    parser = Parser("push").with_traceback()
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("url", help="the URL of all runs in the store, as --runs-dir would have it")
    with mistakes_in_one_line(arguments):
        options = parser.parse_args(arguments)
        from ..runs.sending import push

        sent = push(options.run, options.url, say=lambda line: print(line, flush=True))
    sys.exit(0 if sent else 1)


def report_command(arguments: list[str]) -> None:
    """`nndist report`: writes the pages and prints their paths; exits with 0 or 2 (bad input)."""
    parser = Parser("report").with_traceback()
    parser.add_argument("path", metavar="PATH", help="the folder or URL of all runs, or of one run")
    help = "instead of pages write the metrics, a row per record: of the run, or of all runs"
    parser.add_argument("--csv", metavar="FILE.csv", type=Path, help=help)
    with mistakes_in_one_line(arguments):
        options = parser.parse_args(arguments)
        from .. import report
        from ..runs.fetching import folder_of

        folder = folder_of(options.path, weights=False)
        if options.csv is not None:
            print(report.write_csv(folder, options.csv), flush=True)
            return
        for page in report.write_pages(folder):
            print(page, flush=True)


def watch_command(arguments: list[str]) -> None:
    """`nndist watch`: serves the pages until Ctrl-C; exits with 0 or 2 (bad input)."""
    parser = Parser("watch").with_traceback()
    parser.add_argument("path", metavar="PATH", help="the folder of all runs, or of one run")
    parser.add_argument("--host", default="127.0.0.1", help="address to answer at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7433, help="0 is a free one (default: %(default)s)")
    with mistakes_in_one_line(arguments):
        options = parser.parse_args(arguments)
        from ..machine import lower_priority
        from ..report.live import Pages, Server
        from ..stores import is_url, plain_urls

        if is_url(options.path):
            place = plain_urls(options.path)
            raise UserError(f"{place}: only folders of this machine are watched; nndist report {place} makes its page")
        with Server(Pages(Path(options.path)), options.host, options.port) as server:
            lower_priority()  # what is watched comes first
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                if not server.is_local:
                    print("note     whoever reaches this machine can see these runs", flush=True)
                print(f"watch    {server.url}   (Ctrl-C ends it)", flush=True)
                server.serve_forever()
            except KeyboardInterrupt:
                print("watch    ended", flush=True)


def recipes_command(arguments: list[str]) -> None:
    """`nndist recipes`: prints the list or the table of recipes/README.md; exits with 0 or 2 (bad input)."""
    parser = Parser("recipes").with_traceback()
    parser.add_argument("folder", type=Path, nargs="?", default=RECIPES, help="folder of recipes")
    parser.add_argument("--markdown", action="store_true", help="print a table as recipes/README.md has it")
    with mistakes_in_one_line(arguments):
        options = parser.parse_args(arguments)
        from .recipe_list import entries, listing, markdown

        found = entries(options.folder)
    print(markdown(found) if options.markdown else listing(found, min(100, shutil.get_terminal_size().columns)))


def new_command(arguments: list[str]) -> None:
    """`nndist new`: writes a recipe and prints the next command; exits with 0 or 2 (bad input)."""
    parser = Parser("new").with_traceback()
    parser.add_argument("path", type=Path, help="the file to write, such as my_net.py")
    parser.add_argument("--like", metavar="RECIPE", help="a shipped recipe's name, or a recipe's file")
    with mistakes_in_one_line(arguments):
        options = parser.parse_args(arguments)
        from .new_recipe import shown, write_recipe

        write_recipe(options.path, options.like)
        print(f"written  {options.path}\nnext     nndist train {shown(options.path)} --check")


def submit_command(arguments: list[str]) -> None:
    """`nndist submit`: submits a job to Slurm or prints its script; exits with 0 or 2 (bad input)."""
    parser = Parser("submit", "All other flags are the training's own (nndist train RECIPE --help).")
    parser.allow_abbrev = False  # --cpu is the training's, not short for --cpus-per-task
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--nodes", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--gpus-per-node", type=int, default=1, help="and processes per node (default: %(default)s)")
    parser.add_argument("--processes-per-node", type=int, default=1, help="without GPUs (default: %(default)s)")
    parser.add_argument("--cpus-per-task", type=int, default=8, help="CPU cores of a node (default: %(default)s)")
    parser.add_argument("--time", default="24:00:00", help="time limit of one start of the job (default: %(default)s)")
    parser.add_argument("--name", help="name of the job, and with its number of the run (default: the recipe's)")
    parser.add_argument("--runs-dir", default="runs", help="on a shared disk, or a URL (default: %(default)s)")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="as in --sbatch=--partition=a")
    parser.add_argument("--dry-run", action="store_true", help="print the script instead of submitting it")
    with mistakes_in_one_line(arguments):
        options, flags = parser.parse_known_args(arguments)
        script = slurm_script(options, flags)
        if options.dry_run:
            print(script, end="")
            return
        try:
            done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError("sbatch: not found; submit where Slurm is installed, or use --dry-run") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"Slurm rejected the job: {lines[-1].removeprefix('sbatch: error: ')}")
    job = done.stdout.strip().split(";")[0]
    name = options.name or options.recipe.stem
    print(f"job      {job}\nlog      {name}-{job}.log\nrun      {options.runs_dir}/*/{name}-{job}")


def slurm_script(options: argparse.Namespace, flags: list[str]) -> str:
    """launch/slurm/train.sbatch with the options, the recipe and the training's flags; raises UserError."""
    if not recipe_file(options.recipe)[0].is_file():
        raise UserError(f"recipe {options.recipe}: no such file; name one, such as mnist_cnn, or a recipe's file")
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("processes_per_node", 1), ("cpus_per_task", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least {least}")
    taken = next((flag for flag in flags if re.match(r"--run(-name)?(=|$)", flag)), None)
    if taken:
        raise UserError(f"{taken}: the run is named after the job, so that a requeue resumes it; give --name")
    name = options.name or options.recipe.stem
    if not re.fullmatch(r"[\w-][\w.-]*", name):
        raise UserError(f"--name {name!r}: give a plain name of letters, digits, '-', '_' and '.'")
    wanted = {"job-name": name, "time": options.time}
    wanted |= {key: str(getattr(options, key.replace("-", "_"))) for key in ("nodes", "gpus-per-node", "cpus-per-task")}
    lines = (LAUNCH / "slurm/train.sbatch").read_text().splitlines()
    for number, line in enumerate(lines):
        key = line.removeprefix("#SBATCH --").partition("=")[0]
        if line.startswith("#SBATCH") and key in wanted:
            lines[number] = f"#SBATCH --{key}={wanted[key]}"
    if not options.gpus_per_node:
        lines.remove("#SBATCH --gpus-per-node=0")  # a Slurm without GPUs rejects the option itself
    end = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH")) + 1
    processes = options.processes_per_node
    settings = {"PYTHON": sys.executable, "RUNS_DIR": options.runs_dir, "PROCESSES_PER_NODE": processes}
    given = ["", "# From the command that submitted it:"]
    given += [f"{key}={shlex.quote(str(value))}" for key, value in settings.items()]
    given.append(shlex.join(["set", "--", str(options.recipe), *flags]))
    lines[end:end] = [*(f"#SBATCH {option}" for option in options.sbatch), *given]
    return "\n".join(lines) + "\n"


def shard_command(arguments: list[str]) -> None:
    """`nndist shard`: writes tar files and their lists; exits with 0 or 2 (bad input)."""
    parser = Parser("shard").with_traceback()
    parser.add_argument("folder", type=Path, help="folder of images: train/<class>/*.JPEG and val/<class>/*.JPEG")
    parser.add_argument("out", type=Path, help="folder that the shards are written to")
    parser.add_argument("--shard-size", type=float, default=100.0, help="megabytes per shard (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the examples (default: 0)")
    with mistakes_in_one_line(arguments):
        options = parser.parse_args(arguments)
        if not options.shard_size > 0:
            raise UserError(f"--shard-size {options.shard_size:g}: must be above 0 megabytes")
        from ..datasets.imagenet import shard_folder

        size = round(1e6 * options.shard_size)
        shards = shard_folder(options.folder, options.out, shard_bytes=size, seed=options.seed)
    examples, size = sum(shard.examples for shard in shards), sum(shard.bytes for shard in shards)
    print(f"{options.out}: {examples:,} images in {len(shards):,} shards, {size / 1e6:,.1f} MB")

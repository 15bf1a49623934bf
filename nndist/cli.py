"""From a recipe's path and flags to a recipe and a run's settings: the one place that parses and exits."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import difflib
import inspect
import io
import json
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from . import usage
from .config import RunConfig
from .errors import (
    Preempted,
    ShortOfMemory,
    TrainingError,
    UserError,
    first_line,
    lost_a_process,
    of_the_disk,
    out_of_memory,
    place_of,
    timed_out,
)
from .recipe import Recipe, load_recipe


def train(recipe: str | Path | Recipe, **settings: Any) -> Any:
    """Trains a recipe (its path, or an instance) from Python or a notebook and returns a `run.Result`.

    `settings` are the flags of the command line with underscores: the recipe's fields and those of `RunConfig`, such as
    `train("recipes/mnist_cnn.py", epochs=1, data_source="sample")`. Raises UserError or TrainingError, and Preempted
    where a signal stopped it after a save.
    """
    from .run import run
    from .runtime import forget_devices

    run_fields = {field.name for field in dataclasses.fields(RunConfig)}
    for_run = {name: value for name, value in settings.items() if name in run_fields}
    for_recipe = {name: value for name, value in settings.items() if name not in run_fields}
    kind = type(recipe) if isinstance(recipe, Recipe) else load_recipe(recipe)
    recipe_fields = {field.name for field in dataclasses.fields(kind)}
    for name in for_recipe:
        if name not in recipe_fields:
            near = difflib.get_close_matches(name, [*recipe_fields, *run_fields], n=1)
            if other := OTHER_NAMES.get(name.replace("_", "-")):
                near = [other.replace("-", "_")]
            raise UserError(f"{name}={for_recipe[name]!r}: no such setting" + (f"; {near[0]}?" if near else ""))
    for name in ("data_dir", "runs_dir"):
        if name in for_run:
            for_run[name] = Path(for_run[name])
    if not isinstance(recipe, Recipe):
        made = kind(**for_recipe)
    elif for_recipe:
        made = dataclasses.replace(recipe, **for_recipe)
        vars(made).update({name: value for name, value in vars(recipe).items() if name not in recipe_fields})
    else:
        made = recipe  # itself: what else was set on it holds, and can be looked at afterwards
    try:
        return run(made, RunConfig(**for_run))
    finally:
        forget_devices()


def train_command(arguments: list[str]) -> None:
    """`launch/train.py`: parses, trains, and leaves the process with 0, 2 (bad input) or 1 (training failed)."""
    rank = int(os.environ.get("RANK", 0))
    die_with_launcher()
    try:
        recipe, config = parse(arguments, quiet=rank != 0)
        if config.find_lr:
            from .tuning import find_lr

            find_lr(recipe, config)
        elif config.find_batch:
            from .throughput import find_batch

            find_batch(recipe, config)
        else:
            from .run import run

            run(recipe, config)
    except Preempted as stopped:
        if rank == 0:
            print(f"stopped  {str(stopped).removeprefix('stopped ')}", file=sys.stderr, flush=True)
        leave(128 + stopped.signal)
    except KeyboardInterrupt:
        fail("interrupted before the training began", rank, 130, title="stopped ")
    except Exception as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        if isinstance(error, UserError | TrainingError):
            fail(str(error), rank, 2 if isinstance(error, UserError) else 1)
        message = of_the_disk(error) or where_from(error, rank)
        if lost_a_process(error):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if not timed_out(error):
                time.sleep(10.0)  # the process that was lost says why, and the launcher then ends this one
            rank = int(os.environ.get("LOCAL_RANK", rank))  # the other machine can't be asked: each says it once
        fail(message, rank, 1)
    leave()


def parse(arguments: list[str], *, quiet: bool = False) -> tuple[Recipe, RunConfig]:
    """The recipe named first, with its fields, and the run's settings. Raises UserError; exits for --help.

    --help is one screen; --help-all explains each flag.
    """
    if not arguments or arguments[0] in ("-h", "--help", "--help-all"):
        if not quiet:
            print(usage.COMMAND)
        if not arguments:
            raise UserError("no recipe given: name a recipe's file, such as recipes/mnist_cnn.py")
        raise SystemExit(0)
    if arguments[0].startswith("-"):
        raise UserError(f"{arguments[0]}: the recipe's file comes first, then the flags")
    kind = load_recipe(arguments[0])
    run_fields = {field.name for field in dataclasses.fields(RunConfig)}
    clash = next((field.name for field in dataclasses.fields(kind) if field.name in run_fields), None)
    if clash:
        raise UserError(f"recipe {arguments[0]}: its field {clash!r} is also a setting of every run; rename the field")
    if {"-h", "--help"} & set(arguments):
        if not quiet:
            print(usage.overview(kind, arguments[0]))
        raise SystemExit(0)
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    return parse_flags(kind, arguments, quiet=quiet)


def parse_flags(kind: type[Recipe], arguments: list[str], *, quiet: bool) -> tuple[Recipe, RunConfig]:
    """Flags as typed fields, by tyro; its boxes of several lines become one line."""
    import tyro

    both = dataclasses.make_dataclass("Flags", [("recipe", kind), ("run", RunConfig)], kw_only=True)
    module = inspect.getmodule(kind)
    # torchrun takes --run for a short form of its own --run-path, wherever it stands
    given = [re.sub(r"^--run-name(?==|$)", "--run", argument) for argument in arguments[1:]]
    errors = io.StringIO()
    columns = os.environ.get("COLUMNS")
    try:
        if not {"-h", "--help"} & set(arguments):
            os.environ["COLUMNS"] = "1000"  # an error must not be broken into lines before it is read
        with contextlib.redirect_stderr(errors):
            flags = tyro.cli(
                tyro.conf.OmitArgPrefixes[both],  # type: ignore[misc, valid-type]
                args=given,
                prog=f"train.py {arguments[0]}",
                description=inspect.cleandoc((module and module.__doc__) or kind.__doc__ or ""),
                console_outputs=not quiet,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(one_line(errors.getvalue(), arguments[0])) from None
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return flags.recipe, flags.run


OTHER_NAMES = {
    **dict.fromkeys(("learning-rate", "learningrate", "alpha", "eta"), "lr"),
    **dict.fromkeys(("bs", "batch", "batchsize", "train-batch-size"), "batch-size"),
    **dict.fromkeys(("num-epochs", "n-epochs", "max-epochs", "nepochs", "ep"), "epochs"),
    **dict.fromkeys(("steps", "num-steps", "iterations", "max-iters"), "max-steps"),
    **dict.fromkeys(("workers", "dataloader-num-workers"), "num-workers"),
    **dict.fromkeys(("output-dir", "out-dir", "log-dir", "logdir"), "runs-dir"),
    **dict.fromkeys(("random-seed", "manual-seed"), "seed"),
    **dict.fromkeys(("clip", "max-grad-norm", "gradient-clip-val", "grad-clip"), "clip-norm"),
    **dict.fromkeys(("gradient-accumulation-steps", "accumulate-grad-batches"), "accumulate"),
    **dict.fromkeys(("early-stopping", "early-stopping-patience"), "patience"),
    **dict.fromkeys(("no-cuda", "use-cpu"), "cpu"),
}
"""What other programs call a flag -> the flag here."""


def one_line(box: str, recipe: str) -> str:
    """tyro's message about a flag, without its frame: the first paragraph, and the flag that was perhaps meant."""
    lines = [line.strip("│ \t") for line in box.splitlines()]
    title = next((number for number, line in enumerate(lines) if line), 0)
    paragraphs: list[list[str]] = [[]]
    for line in lines[title + 1 :]:
        if set(line) - set("─╰╯-"):  # not a rule, which ends a paragraph
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    first = " ".join(paragraphs[0]) or "the flags can't be read"
    meant = next((p for p in paragraphs[1:] if p and p[0].startswith("Perhaps")), [])
    names = re.findall(r"--[a-z][\w-]*", " ".join(meant))
    unknown = re.search(r"--([a-z][\w-]*)", first)
    if unknown and unknown.group(1).replace("_", "-") in OTHER_NAMES:
        names = [f"--{OTHER_NAMES[unknown.group(1).replace('_', '-')]}"]
    hint = f"; did you mean {names[0]}?" if names else ""
    return f"{first[0].lower()}{first[1:].rstrip('.')}{hint} (train.py {recipe} --help lists all flags)"


def die_with_launcher() -> None:
    """Has the system stop this process as SIGTERM does when the launcher that started it dies, where it can (Linux).

    `accelerate launch` with one process does not pass SIGTERM on, and no launcher can pass on its own SIGKILL.
    """
    if any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "NNDIST_COMPARISON")):
        pr_set_pdeathsig = 1
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").prctl(pr_set_pdeathsig, signal.SIGTERM)


def where_from(error: BaseException, rank: int) -> str:
    """One line for an error that nobody foresaw: the process, the error, and the line of the user's code it is from."""
    place = place_of(error)
    lines = str(error).strip().splitlines()
    if out_of_memory(error):
        remedy = "use a smaller batch or network, or a device with more memory"
        if isinstance(error, ShortOfMemory):
            remedy = "a larger --accumulate takes a step in smaller parts"
        return f"process {rank}: out of memory ({first_line(error)}){place}; {remedy}; --traceback shows more"
    if lost_a_process(error):
        return f"process {rank}: lost another process: {lines[0]}; start the same command again to go on"
    return f"process {rank}: {type(error).__name__}: {lines[0] if lines else ''}{place}; --traceback shows more"


def fail(message: str, rank: int, code: int, title: str = "error:") -> NoReturn:
    """Prints one line, once for all processes, and leaves."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's word to end is from now on final
    if rank != 0:
        # All processes meet the same error and the first one says it; the launcher then ends the others. One that still
        # lives after this met an error of its own.
        time.sleep(5.0)
    print(f"{title} {message}", file=sys.stderr, flush=True)
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:  # torch's launcher ends its report with what stands there
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    leave(code)


def leave(code: int = 0) -> NoReturn:
    """Ends the process.

    With several processes it must end at once: gloo drops a work object while the interpreter finalises and aborts in
    about 1 of 15 exits, after everything has been done and written (pytorch/pytorch, ProcessGroupGloo).
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        if code == 0:
            dist.barrier()  # the first to leave takes the rendezvous' store with it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

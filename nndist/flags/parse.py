"""Parses a recipe's path and flags into a recipe and a run's settings."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re

from ..config import RunConfig
from ..errors import UserError
from ..recipe.contract import Recipe
from ..recipe.loading import load_recipe
from . import usage


def parse(arguments: list[str], *, quiet: bool = False) -> tuple[Recipe, RunConfig]:
    """The recipe that the first argument names, and the run's settings. Raises UserError; exits for --help.

    --help prints one screen; --help-all explains every flag.
    """
    if not arguments:
        raise UserError("no recipe given: name one, such as mnist_cnn, or a recipe's file")
    if arguments[0].startswith("-"):
        raise UserError(f"{arguments[0]}: the recipe comes first, then the flags")
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
    """Parses the flags by tyro; its boxed messages become one-line UserErrors."""
    import tyro

    both = dataclasses.make_dataclass("Flags", [("recipe", kind), ("run", RunConfig)], kw_only=True)
    module = inspect.getmodule(kind)
    # torchrun reads --run anywhere as an abbreviation of its own --run-path
    given = [re.sub(r"^--run-name(?==|$)", "--run", argument) for argument in arguments[1:]]
    errors = io.StringIO()
    columns = os.environ.get("COLUMNS")
    try:
        if not {"-h", "--help"} & set(arguments):
            os.environ["COLUMNS"] = "1000"  # keeps tyro from wrapping an error message
        with contextlib.redirect_stderr(errors):
            flags = tyro.cli(
                tyro.conf.OmitArgPrefixes[both],  # type: ignore[misc, valid-type]
                args=given,
                prog=f"nndist train {arguments[0]}",
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
    **dict.fromkeys(("val-split", "validation-split", "val-fraction", "valid-size"), "hold-out"),
    **dict.fromkeys(("no-cuda", "use-cpu"), "cpu"),
}
"""A flag's name in other programs -> its name here."""


def one_line(box: str, recipe: str) -> str:
    """tyro's message without its box: the first paragraph, and the flag that was perhaps meant."""
    lines = [line.strip("│ \t") for line in box.splitlines()]
    title = next((number for number, line in enumerate(lines) if line), 0)
    paragraphs: list[list[str]] = [[]]
    for line in lines[title + 1 :]:
        if set(line) - set("─╰╯-"):  # a rule ends a paragraph
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
    return f"{first[0].lower()}{first[1:].rstrip('.')}{hint} (nndist train {recipe} --help lists all flags)"

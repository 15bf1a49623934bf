"""Commands as documents have them: taken apart, and held against the flags and files that there are, without a run."""

import argparse
import contextlib
import dataclasses
import io
import re
import runpy
import shlex
import sys
import typing
from functools import cache
from pathlib import Path

import pytest
from launching import ROOT

from nndist.cli import train as cli
from nndist.cli.main import main
from nndist.cli.table import COMMANDS
from nndist.config import RunConfig
from nndist.recipe.contract import Recipe
from nndist.recipe.loading import load_recipe

LAUNCH = {path.name: path for path in (ROOT / "launch").glob("*.py")}
BENCHMARKS = {path.name: path for path in (ROOT / "tests/benchmarks").glob("*.py")}
ANY_RECIPE = ROOT / "recipes/mnist_cnn.py"
# Programs of others: of their words only the project's files are looked up.
OTHERS = {"bash", "cmp", "ip", "kubectl", "mypy", "pre-commit", "ruff", "scancel", "scontrol", "sysctl", "wandb"}
PYTEST_FLAGS = {"-k", "-m", "-n", "-q", "--dist", "--collect-only"}
PROJECT_PATH = re.compile(
    r"(?:(?:launch|nndist|recipes|tests)/[\w./*-]*[\w*]|\.ci/run|\.github/[\w./-]+|pyproject\.toml|setup\.cfg)(?![\w<])"
)
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


class Wrong(AssertionError):
    """What a document says and what there is differ."""


class Parsed(BaseException):
    """Ends a command after its arguments have been read; those it leaves to the training are `rest`."""

    def __init__(self, options: argparse.Namespace, rest: list[str]):
        self.options, self.rest = options, rest


def check(command: str, folder: Path = ROOT) -> None:
    """Raises Wrong where a command line names a file or a flag that there is not, or a value that a flag does not take.

    folder: where the files lie that the document has the reader write. "..." stands for what the reader adds.
    """
    for part in re.split(r"&&|;|(?<=\s)\|(?=\s)", command):
        words = [word for word in shlex.split(part, comments=True) if word != "..."]
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            check_words(words, folder)


def check_words(words: list[str], folder: Path) -> None:
    """`check` of one program with its arguments."""
    program, *arguments = words
    for path in PROJECT_PATH.findall(" ".join(words)):
        found = [base for base in (ROOT, folder) if list(base.glob(path))]
        if not found:
            raise Wrong(f"{shlex.join(words)}: there is no {path}")
    if program in LAUNCH or program in BENCHMARKS:
        check_script(program, arguments, folder)
    elif program == "nndist":
        if arguments[0] not in COMMANDS:
            raise Wrong(f"{shlex.join(words)}: nndist has no command {arguments[0]}")
        if f"{arguments[0]}.py" in LAUNCH:
            check_script(f"launch/{arguments[0]}.py", arguments[1:], folder)
        else:
            parsed(None, arguments)
    elif program == "python":
        check_python(arguments, folder)
    elif program == "accelerate":
        check_accelerate(arguments, folder)
    elif program == "torchrun":
        check_torchrun(arguments, folder)
    elif program == "pytest":
        check_pytest(arguments)
    elif program == "pip":
        if arguments[:1] != ["install"]:
            raise Wrong(f"{shlex.join(words)}: pip install is all that is said of pip")
    elif program not in OTHERS and not (ROOT / program).is_file():
        raise Wrong(f"{shlex.join(words)}: what is {program}?")


def check_python(arguments: list[str], folder: Path) -> None:
    """`python SCRIPT FLAGS`, or `python -m MODULE ...`."""
    if arguments[:1] == ["-m"]:
        import importlib.util

        for module in [arguments[1], *(a for a in arguments[2:3] if arguments[1] == "pydoc")]:
            if importlib.util.find_spec(module) is None:
                raise Wrong(f"python {shlex.join(arguments)}: there is no module {module}")
        return
    check_script(arguments[0], arguments[1:], folder)


def check_script(script: str, arguments: list[str], folder: Path) -> None:
    """A script of launch/ or tests/benchmarks/, by its path or its name alone."""
    name = Path(script).name
    if name == "train.py":
        check_training(arguments, folder)
    elif name in LAUNCH and not script.startswith("tests"):
        options, rest = parsed(LAUNCH[name], arguments)
        paths = [str(path) for path in getattr(options, "paths", [getattr(options, "recipe", None)]) if path]
        if rest and name == "evaluate.py":
            known = {f"--{field.name.replace('_', '-')}" for field in recipe_fields()}
            if unknown := set(FLAG.findall(" ".join(rest))) - known:
                raise Wrong(f"{script} {shlex.join(arguments)}: no recipe has a field {unknown.pop()}")
        elif rest:
            check_training([*paths[:1], *rest], folder)
    else:
        places = [BENCHMARKS[name]] if name in BENCHMARKS else [ROOT / script, folder / script]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise Wrong(f"there is no {script}")
        text = path.read_text()
        for flag in FLAG.findall(" ".join(arguments)):
            if f'"{flag}"' not in text:
                raise Wrong(f"{script} {shlex.join(arguments)}: {name} has no {flag}")


def parsed(script: Path | None, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What a script of launch/ makes of its arguments, by its own parser, and what it leaves to the training.

    script: None for a command of nndist that has none; its name comes first among the arguments.
    """
    depth = 0

    def reading(name):
        original = getattr(argparse.ArgumentParser, name)

        def read(self, args=None, namespace=None):
            nonlocal depth
            depth += 1
            self.allow_abbrev = False
            try:
                found = original(self, args, namespace)
            finally:
                depth -= 1
            if depth:
                return found
            raise Parsed(*(found if name == "parse_known_args" else (found, [])))

        return read

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, reading(name))
        patch.setattr(sys, "argv", [script.name if script else "nndist", *arguments])
        try:
            if script is None:
                main(arguments)
            else:
                runpy.run_path(str(script), run_name="__main__")
        except Parsed as done:
            return done.options, done.rest
        except SystemExit as stop:
            if not stop.code:  # --help
                return argparse.Namespace(), []
    raise Wrong(f"{script.name if script else 'nndist'} {shlex.join(arguments)}: {said.getvalue().strip()}")


def check_training(arguments: list[str], folder: Path) -> None:
    """The recipe and the flags of a training, values too; where a recipe is yet to be written, any recipe's."""
    words = [re.sub(r"\$\w+", "1", word) for word in arguments]
    recipe = words[0] if words and not words[0].startswith("-") else ""
    places = [base / recipe for base in (folder, ROOT)] + [ROOT / f"recipes/{recipe}.py"]
    place = next((str(place) for place in places if recipe and place.is_file()), str(ANY_RECIPE))
    if not {"-h", "--help", "--help-all"} & set(words):
        try:
            made, config = cli.parse([place, *words[1 if recipe else 0 :]], quiet=True)
            made.validate()
            config.validate()
        except cli.UserError as error:
            raise Wrong(f"train.py {shlex.join(arguments)}: {error}") from None


def check_accelerate(arguments: list[str], folder: Path) -> None:
    """`accelerate launch FLAGS SCRIPT FLAGS`, by Accelerate's parser."""
    if arguments[:1] != ["launch"]:
        raise Wrong(f"accelerate {shlex.join(arguments)}: launch is all that is said of accelerate")
    found = by_parser(launcher(), ["accelerate", *arguments], [*arguments[1:], *[str(LAUNCH["train.py"])]])
    if found.config_file is not None and not (ROOT / found.config_file).is_file():
        raise Wrong(f"accelerate {shlex.join(arguments)}: there is no {found.config_file}")
    check_launched(found, folder)


def check_torchrun(arguments: list[str], folder: Path) -> None:
    """`torchrun FLAGS SCRIPT FLAGS`, by torch's parser."""
    from torch.distributed.run import get_args_parser

    found = by_parser(get_args_parser(), ["torchrun", *arguments], [*arguments, str(LAUNCH["train.py"])])
    check_launched(found, folder)


def check_launched(found: argparse.Namespace, folder: Path) -> None:
    """What a launcher is to start: a script, or with -m the command `nndist`; nothing where only its flags are said."""
    if found.module:
        check_words([found.training_script, *found.training_script_args[:-1]], folder)
    elif found.training_script != str(LAUNCH["train.py"]):
        check_script(found.training_script, found.training_script_args[:-1], folder)


def by_parser(parser: argparse.ArgumentParser, said: list[str], arguments: list[str]) -> argparse.Namespace:
    """What a launcher's parser makes of arguments."""
    errors = io.StringIO()
    parser.allow_abbrev = False
    with contextlib.redirect_stderr(errors):
        try:
            return parser.parse_args(arguments)
        except SystemExit:
            raise Wrong(f"{shlex.join(said)}: {errors.getvalue().strip().splitlines()[-1]}") from None


@cache
def launcher() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def check_pytest(arguments: list[str]) -> None:
    """pytest's flags that are in use here; each word of -k is in the name of some test."""
    flags = {word.partition("=")[0] for word in arguments if word.startswith("-")}
    if unknown := flags - PYTEST_FLAGS:
        raise Wrong(f"pytest {shlex.join(arguments)}: {unknown.pop()} is not in use here")
    files = [ROOT / word for word in arguments if word.startswith("tests/")] or (ROOT / "tests").rglob("test_*.py")
    names = re.findall(r"def (test_\w+)", "\n".join(file.read_text() for file in files))
    if "-k" in arguments:
        for word in set(re.findall(r"\w+", arguments[arguments.index("-k") + 1])) - {"and", "or", "not"}:
            if not any(word in name for name in names):
                raise Wrong(f"pytest {shlex.join(arguments)}: no test's name has {word!r} in it")


# Flags that stand alone, such as `--keep 3`.


@cache
def recipe_fields() -> tuple[dataclasses.Field, ...]:
    """The fields of every shipped recipe."""
    kinds = [Recipe, *(load_recipe(path) for path in sorted((ROOT / "recipes").glob("*.py")))]
    return tuple(field for kind in kinds for field in dataclasses.fields(kind))


@cache
def known_flags() -> dict[str, frozenset[str]]:
    """Every flag of the training, its commands, the launchers and the benchmarks; with its values if few."""
    found: dict[str, frozenset[str]] = {}
    for kind in (RunConfig, Recipe):
        for name, hint in typing.get_type_hints(kind).items():
            found[f"--{name.replace('_', '-')}"] = (
                frozenset(map(str, typing.get_args(hint)))
                if (typing.get_origin(hint) is typing.Literal)
                else frozenset()
            )
    for field in recipe_fields():
        found.setdefault(f"--{field.name.replace('_', '-')}", frozenset())
    from torch.distributed.run import get_args_parser

    for parser in (launcher(), get_args_parser()):
        for option in (option for action in parser._actions for option in action.option_strings):
            found.setdefault(option, frozenset())
    for path in [*BENCHMARKS.values(), *(ROOT / "nndist/cli").glob("*.py")]:
        for flag in re.findall(r'add_argument\(\s*"(--[a-z][\w-]*)"', path.read_text()):
            found.setdefault(flag, frozenset())
    for extra in ("--run-name", "--help", "--help-all"):
        found[extra] = frozenset()
    return found


def check_flags(text: str) -> None:
    """Raises Wrong where a piece of text names a flag that there is not, or a value that its flag does not take."""
    for flag, value in re.findall(r"(?<![\w-])(--[a-z][\w-]*)(?:[ =]([\w|.-]+))?", text):
        plain = flag.replace("--no-", "--", 1)
        if flag not in known_flags() and plain not in known_flags():
            raise Wrong(f"{text}: nothing has a flag {flag}")
        choices = known_flags().get(flag, frozenset())
        if choices and value and not value.startswith("-") and not set(value.split("|")) <= choices:
            raise Wrong(f"{text}: {flag} takes {', '.join(sorted(choices))}")

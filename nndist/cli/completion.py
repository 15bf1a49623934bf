"""Completion in a shell: sub-commands, recipes by their names and the flags of a training, written by tyro."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Any, Union

from .commands import Parser, mistakes_in_one_line

SHELLS = ("bash", "zsh")


def completion_command(arguments: list[str]) -> None:
    """`nndist completion`: prints the script for a shell; exits with 0 or 2 (bad input)."""
    parser = Parser("completion").with_traceback()
    parser.add_argument("shell", choices=SHELLS)
    with mistakes_in_one_line(arguments):
        shell = parser.parse_args(arguments).shell
        import tyro

        tyro.extras.subcommand_cli_from_dict(
            _subcommands(),
            prog="nndist",
            args=["--tyro-print-completion", shell],
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )


def _subcommands() -> dict[str, Any]:
    """For each sub-command a function whose arguments are to be completed."""
    import tyro

    from ..config import RunConfig
    from ..files import RECIPES
    from ..recipe.loading import load_recipe
    from .table import COMMANDS

    def one_of(kinds: dict[str, Any]) -> Any:
        # tyro completes sub-commands by name, but no positional arguments: each recipe is one
        found = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds.items()]
        return Union[tuple(found)]  # noqa: UP007

    def command(name: str, kind: Any) -> Any:
        def called(**given: Any) -> None: ...

        called.__name__ = name
        called.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter("given", inspect.Parameter.KEYWORD_ONLY, annotation=kind)]
        )
        called.__annotations__ = {"given": kind}
        return called

    names = sorted(path.stem for path in RECIPES.glob("*.py"))
    trainings = {
        name: dataclasses.make_dataclass(
            f"Training_{name}", [("fields", load_recipe(RECIPES / f"{name}.py")), ("settings", RunConfig)]
        )
        for name in names
    }
    plain = {name: dataclasses.make_dataclass(f"Recipe_{name}", []) for name in names}
    kinds = {"train": one_of(trainings), **dict.fromkeys(("verify", "compare", "reproduce", "submit"), one_of(plain))}
    return {name: command(name, kinds.get(name, tyro.conf.Positional[Path])) for name in COMMANDS}

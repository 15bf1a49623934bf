"""The command `nndist`, which is `python -m nndist` and each script of launch/: finds the sub-command and calls it.

Nothing is imported before it is known which one it is.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib
import sys
from collections.abc import Iterator
from typing import Any

from ..files import RECIPES
from .table import COMMANDS, is_recipe


def main(arguments: list[str] | None = None) -> None:
    """Calls the sub-command that the arguments name, or lists them all; a recipe in its place is trained."""
    streams = [stream for stream in (sys.stdin, sys.stdout, sys.stderr) if stream is not None]
    if any((getattr(stream, "encoding", None) or "utf-8").lower() not in ("utf-8", "utf8") for stream in streams):
        from .. import machine  # which takes a moment

        machine.speak_utf8()
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        from .. import __version__

        print(f"nndist {__version__}")
        return
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        if not is_recipe(name):
            print(f"error: {name}: no such command{meant(name)}", file=sys.stderr, flush=True)
            sys.exit(2)
        name, rest = "train", words
    function(name)(rest)


def function(name: str) -> Any:
    """The function of a sub-command; its module is imported now."""
    module, _, called = COMMANDS[name].function.partition(":")
    with uncollected():
        return getattr(importlib.import_module(f".{module}", __package__), called)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Context manager around imports: what they make lives as long as the process, so it is never searched for garbage.

    Of torch's imports a fifth of the time is such a search otherwise. Not for code of a recipe: its garbage is freed.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def meant(word: str) -> str:
    """Which sub-command or recipe was perhaps meant, as an error says it."""
    near = difflib.get_close_matches(word, [*COMMANDS, *(path.stem for path in RECIPES.glob("*.py"))], n=1)
    if not near:
        return "; nndist --help lists them"
    return f"; did you mean nndist {near[0] if near[0] in COMMANDS else f'train {near[0]}'}?"


def overview() -> str:
    """All sub-commands, a line each."""
    lines = [f"  {name:<12}{command.help.rstrip('.')}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Trains a tutorial's network as a real run, and shows what came of it.",
            "",
            "nndist train mnist_cnn --epochs 1    # a shipped recipe, by its name",
            "nndist train my_net.py --check       # your own, by its file",
            "accelerate launch -m nndist train mnist_cnn",
            "",
            "usage: nndist COMMAND ...",
            *lines,
            "nndist COMMAND --help shows examples. nndist RECIPE is nndist train RECIPE.",
        ]
    )

"""The list of recipes, made from the recipes themselves, for the terminal and for recipes/README.md."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..flags.usage import first_sentence
from ..recipe.loading import load_recipe


@dataclass(frozen=True)
class Entry:
    """One recipe: what it is, its document, the document's figure, and the one measured here."""

    name: str
    about: str
    document: str
    documented: str
    measured: str


def entries(folder: Path) -> list[Entry]:
    """The recipes of a folder, sorted by name; raises UserError if there are none."""
    paths = sorted(folder.glob("*.py"))
    if not paths:
        raise UserError(f"{folder}: holds no recipes; give a folder of recipe files, such as recipes")
    return [entry(path) for path in paths]


def entry(path: Path) -> Entry:
    """The entry of a recipe: the first sentence of its docstring, and the first one after "Measured:"."""
    kind = load_recipe(path)
    docstring = inspect.getdoc(inspect.getmodule(kind)) or ""
    paragraphs = [" ".join(part.split()) for part in docstring.split("\n\n")]
    measured = next((part.partition("Measured: ")[2] for part in paragraphs if "Measured: " in part), "")
    about = re.sub(r" \(document [^)]*\)$", "", first_sentence(paragraphs[0]))
    return Entry(path.stem, about, kind.document, kind.documented, first_sentence(measured))


def markdown(found: list[Entry]) -> str:
    """The table of recipes/README.md."""
    if not any(e.document for e in found):  # recipes of one's own
        rows = [f"| `{e.name}` | {e.about} |" for e in found]
        return "\n".join(["| recipe | what it is |", "|---|---|", *rows])
    rows = [f"| `{e.name}` | {e.about} | {e.document or 'none'} |" for e in found]
    return "\n".join(["| recipe | what it is | document |", "|---|---|---|", *rows])


def listing(found: list[Entry], columns: int) -> str:
    """The recipes for a terminal, a paragraph per recipe."""
    lines = []
    for e in found:
        lines += [e.name, *wrapped(e.about, columns)]
        said = f"{e.document}: {e.documented}" if e.documented else e.document
        lines += wrapped(f"document: {said}", columns) if e.document else []
        lines += wrapped(f"baseline: {e.documented}", columns) if e.documented and not e.document else []
        lines += wrapped(f"measured: {e.measured}", columns) if e.measured else []
    return "\n".join(lines)


def wrapped(text: str, columns: int) -> list[str]:
    """A text as indented lines."""
    return textwrap.wrap(text, columns - 1, initial_indent="    ", subsequent_indent="    ")

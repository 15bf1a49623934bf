"""The modules that a recipe imports from beside its file: found, kept with the run, and imported again from there."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

FOLDER = "modules"  # of a run's folder, that its recipe's helpers are copied to


def helpers_of(source: bytes, folder: Path) -> dict[str, bytes]:
    """The text of each module that a recipe imports from its folder, by its path there, and that these import.

    Imports within functions count, too; of a package, all its modules. What can't be parsed has none.
    """
    found: dict[str, bytes] = {}
    waiting = [source]
    while waiting:
        for name in _imported(waiting.pop()):
            for path in _files_of(name, folder):
                place = path.relative_to(folder).as_posix()
                if place in found:
                    continue
                try:
                    found[place] = path.read_bytes()
                except OSError:
                    continue
                waiting.append(found[place])
    return dict(sorted(found.items()))


def hashes(helpers: Mapping[str, bytes]) -> dict[str, str]:
    """The SHA-256 of each module's text."""
    return {place: hashlib.sha256(text).hexdigest() for place, text in helpers.items()}


def _imported(source: bytes) -> Iterator[str]:
    """The first part of the name of each module that a text imports."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _files_of(name: str, folder: Path) -> list[Path]:
    """The files of a module or package that lies in the folder; none for what Python or nndist itself brings."""
    if name in sys.stdlib_module_names or name == "nndist":
        return []
    if (folder / name / "__init__.py").is_file():
        return sorted((folder / name).rglob("*.py"))
    return [file] if (file := folder / f"{name}.py").is_file() else []


_folders: list[str] = []  # of recipes, at the end of sys.path: nothing there may hide a module of Python or a package


def make_importable(folder: Path, helpers: Mapping[str, bytes], *, anew: bool = False) -> None:
    """Has `import` find a recipe's modules in the folder, in what its methods import later, too.

    What has been imported under such a name from elsewhere, another recipe's helper, is forgotten; with `anew` also
    what has been imported from there, whose text may have changed since.
    """
    place = str(folder)
    for one in _folders:
        if one in sys.path:
            sys.path.remove(one)
    if place not in sys.path:
        _folders[:] = [place, *(one for one in _folders if one != place)]
    sys.path.extend(_folders)
    names = {Path(helper).parts[0].removesuffix(".py") for helper in helpers}
    for loaded in [one for one in sys.modules if one.partition(".")[0] in names]:
        file = getattr(sys.modules[loaded], "__file__", None)
        if anew or file is None or not Path(file).is_relative_to(folder):
            del sys.modules[loaded]


@contextlib.contextmanager
def folder_first(folder: Path) -> Iterator[None]:
    """Within it `import` looks into the folder before all others, as it does for a script."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()  # a module that has just been written would not be seen
    try:
        yield
    finally:
        sys.path.remove(str(folder))

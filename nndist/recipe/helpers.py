"""The modules that a recipe imports from its file's folder: found, copied into the run, and imported from there."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..files import read_bytes

FOLDER = "modules"  # in a run's folder, where its recipe's helpers are copied to
MAX_BYTES = 1 << 24  # of a module's source


def helpers_of(source: bytes, folder: Path) -> dict[str, bytes]:
    """The source of each module that a recipe imports from its folder, directly or not, by its path there.

    Imports within functions count too; a package counts with all its modules. Unparsable source imports nothing.
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
                    found[place] = read_bytes(path, MAX_BYTES)
                except OSError:
                    continue
                waiting.append(found[place])
    return dict(sorted(found.items()))


def hashes(helpers: Mapping[str, bytes]) -> dict[str, str]:
    """The SHA-256 of each module's source."""
    return {place: hashlib.sha256(text).hexdigest() for place, text in helpers.items()}


def _imported(source: bytes) -> Iterator[str]:
    """The top-level name of each module that a source imports."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two if it is nested too deeply
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _files_of(name: str, folder: Path) -> list[Path]:
    """The files of a module or package in the folder; none for the standard library's and nndist's."""
    if name in sys.stdlib_module_names or name == "nndist":
        return []
    if (folder / name / "__init__.py").is_file():
        return sorted((folder / name).rglob("*.py"))
    return [file] if (file := folder / f"{name}.py").is_file() else []


_folders: list[str] = []  # of recipes, at the end of sys.path, so that nothing there shadows an installed module


def make_importable(folder: Path, helpers: Mapping[str, bytes], *, anew: bool = False) -> None:
    """Make a recipe's modules in the folder importable, including for imports that its methods run later.

    Loaded modules of the same names from elsewhere (another recipe's helpers) are unloaded; with `anew` also those from
    the folder, whose source may have changed.
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
    """Context manager: `import` searches the folder first, as for a script."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()  # else a module that was just written would not be found
    try:
        yield
    finally:
        sys.path.remove(str(folder))

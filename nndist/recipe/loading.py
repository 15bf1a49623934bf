"""Load a recipe's class from its file, or from its source in a run's folder."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UserError, first_line
from ..files import RECIPES, near, recipe_file
from . import declaration, helpers
from .contract import Recipe


def load_recipe(path: str | Path) -> type[Recipe]:
    """The recipe class of the module at `path`; `path.py:Class` chooses among several. A shipped one's name will do.

    Raises UserError if the file is missing, has a syntax error, imports a missing module, or defines no recipe. Any
    other exception of the module's code propagates.
    """
    file, wanted = recipe_file(path)
    if not file.is_file():
        raise UserError(f"recipe {file}: no such file{_meant(file)}")
    if file.suffix != ".py":
        raise UserError(f"recipe {file}: a recipe is a Python module, so its name must end in .py")
    file = file.resolve()
    try:
        source = file.read_bytes()
    except OSError as error:
        raise UserError(f"recipe {file}: can't be read ({error.strerror}); fix it or name a different one") from error
    return recipe_of(source, file, wanted)


def _meant(file: Path) -> str:
    """A suggestion of which recipe was meant, for an error line."""
    for other in (file.with_suffix(".py"), Path("recipes", f"{file.stem}.py")):
        if other.is_file():
            return f"; did you mean {near(other)}?"
    for folder in (file.parent, RECIPES):
        if close := difflib.get_close_matches(file.stem, [path.stem for path in folder.glob("*.py")], n=1):
            return f"; did you mean {close[0] if folder == RECIPES else near(folder / f'{close[0]}.py')}?"
    near_by = sorted(path.name for path in file.parent.glob("*.py")) if file.parent.is_dir() else []
    return f"; {file.parent} holds {', '.join(near_by[:12])}" if near_by else "; nndist recipes lists some"


def recipe_of(source: bytes, file: Path, wanted: str = "", beside: Path | None = None) -> type[Recipe]:
    """The recipe class in the source of a module that is, or was, at `file`; raises UserError as `load_recipe` does.

    beside: the folder of its helper modules, if that is not the file's.
    """
    beside = beside or file.parent
    texts = helpers.helpers_of(source, beside)
    helpers.make_importable(beside, texts, anew=True)
    module = _module_of(source, file, beside)
    found = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Recipe) and value.__module__ == module.__name__
    }
    for kind in found.values():
        kind._source, kind._origin, kind._names = source, file, vars(module)
        kind._beside, kind._helpers = beside, texts
        try:
            declaration.completed(kind, Recipe)
        except UserError as error:
            raise UserError(f"recipe {file}: {error}") from error
    if wanted and wanted not in found:
        raise UserError(f"recipe {file}: has no recipe called {wanted}; it defines {', '.join(found) or 'none'}")
    if wanted:
        return found[wanted]
    if not found:
        raise UserError(f"recipe {file}: defines no subclass of nndist.Recipe; nndist new writes one")
    if len(found) > 1:
        raise UserError(f"recipe {file}: defines {', '.join(found)}; choose one with {file}:{next(iter(found))}")
    return next(iter(found.values()))


def make_importable(kind: type[Recipe]) -> None:
    """Make a loaded recipe class's helper modules importable again, whatever was loaded since."""
    if kind._beside is not None:
        helpers.make_importable(kind._beside, kind._helpers or {})


def _module_of(source: bytes, file: Path, beside: Path) -> Any:
    try:
        code = compile(source, str(file), "exec", dont_inherit=True)
    except SyntaxError as error:
        where = f"line {error.lineno}: " if error.lineno else ""
        raise UserError(f"recipe {file}: {where}{error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:  # a NUL, or nested too deeply
        raise UserError(f"recipe {file}: is not Python source ({first_line(error)})") from error
    name = f"nndist_recipe_{file.stem}"
    module = ModuleType(name)
    module.__file__ = str(file)
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        with helpers.folder_first(beside):
            exec(code, vars(module))
    except UserError as error:
        raise UserError(f"recipe {file}: {error}") from error
    except (SyntaxError, ImportError) as error:
        if before is not None:
            sys.modules[name] = before
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, SyntaxError) else str(error)
        remedy = "" if isinstance(error, SyntaxError) else "; install what it needs or fix the import"
        raise UserError(f"recipe {file}: {where}{remedy}") from error
    return module

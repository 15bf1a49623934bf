"""Rebuild a run's recipe from its folder: source, helper modules, fields, and what `data` set on it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..files import read_bytes, shown
from ..recipe import helpers, kept, trust
from ..recipe.contract import Recipe
from ..recipe.declaration import completed
from ..recipe.fields import from_json, hints_of
from ..recipe.loading import load_recipe, recipe_of
from ..runs import checkpoint
from ..runs.reading import mapping

About = Mapping[str, Any]
Given = str | Path | type[Recipe] | None
MAX_RECIPE_BYTES = 1 << 24


def rebuilt_recipe(folder: Path, about: About, given: Given, notes: list[str], *, trusted: bool = False) -> Recipe:
    """The recipe of the run in `folder`, with its fields and what `data` set on it.

    about: contents of run.json. given: the class or file that the user named. notes: what the user should know is
    appended. Raises UserError if the source that it was trained with is neither in the folder nor at its original path.
    """
    own_fields = mapping(about.get("fields"))
    kind = _recipe_class(folder, about, given, notes, trusted)
    hints = hints_of(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    fields = {name: from_json(value, hints.get(name)) for name, value in own_fields.items() if name in known}
    if unknown := sorted(own_fields.keys() - known):
        notes.append(f"the recipe given has no field {', '.join(unknown)}, which the run had")
    for name, value in fields.items():
        if not _has_type(value, hints.get(name)):
            raise UserError(
                f"{folder}/run.json: the recipe's field {name} is {shown(value)}, expected "
                f"{getattr(hints[name], '__name__', hints[name])}; restore it from a copy"
            )
    recipe = kind(**fields)
    vars(recipe).update(found_by_data(folder, about))
    return recipe


def found_by_data(folder: Path, about: About) -> dict[str, Any]:
    """What `data` set on the recipe in training, by attribute name."""
    tensors = found_tensors(folder)
    try:
        return kept.restored(mapping(about.get("found")), tensors)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / kept.FILE}: does not match run.json ({error}); restore it from a copy") from error


def found_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors among what `data` set, as stored; raises UserError if they can't be read."""
    path = folder / kept.FILE
    try:
        return checkpoint.read_tensors(path) if path.exists() else {}
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: can't be read ({why}); restore it from a copy") from error


def contradictions(folder: Path, about: About, state: Mapping[str, Any]) -> list[str]:
    """Notes on what run.json says of the recipe where the newest checkpoint says otherwise.

    The checkpoint is hashed by its manifest; run.json has no hash.
    """
    fields, then = mapping(about.get("fields")), state["fields"]

    def said(source: Mapping[str, Any], name: str) -> str:
        return shown(source[name]) if name in source else "missing"

    differing = [name for name in sorted({*fields, *then}) if _json(fields, name) != _json(then, name)]
    notes = [
        f"run.json: the field {shown(name)} is {said(fields, name)}, but in the newest checkpoint {said(then, name)}; "
        "restore it from a copy"
        for name in differing[:1]
    ]
    expected = state.get("found_sha256")  # runs before 2026-11-30 have none
    if expected and kept.digest(mapping(about.get("found")), found_tensors(folder)) != expected:
        notes.append(
            "run.json: what data() set is not what the newest checkpoint was trained with; restore run.json from a copy"
        )
    return notes


def _json(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], sort_keys=True) if name in values else ""


def _recipe_class(folder: Path, about: About, given: Given, notes: list[str], trusted: bool) -> type[Recipe]:
    wanted, copy = str(about.get("recipe_class", "")), folder / checkpoint.RECIPE
    if isinstance(given, type):
        completed(given, Recipe)
        return given
    if given is not None:
        notes.append(f"the recipe is read from {given}, as requested")
        return load_recipe(given)
    expected = about.get("source_sha256")
    file = _recipe_file(about)
    now, kept_text = _source(file), _source(copy)
    if kept_text is not None and _sha256(kept_text) == expected:
        if now is None:
            notes.append(f"the recipe's file {file} is gone: the run's own copy is used, {copy}")
        elif now != kept_text:
            notes.append(f"{_near(file)} has changed since the run: the run's own copy is used, {copy}")
        beside = _trusted_folder(folder, about, notes, kept_text, copy, file, trusted)
        return recipe_of(kept_text, file or copy, wanted, beside)
    if file is not None and now is not None and _sha256(now) == expected:
        return recipe_of(now, file, wanted, _trusted_folder(folder, about, notes, now, file, file, trusted))
    kind = vars(sys.modules["__main__"]).get(wanted)  # a notebook's
    if file is None and isinstance(kind, type) and issubclass(kind, Recipe):
        if kind().source_hash() != expected:
            notes.append(f"the class {wanted} of this notebook has changed since the run")
        return kind
    what = "its recipe was a class of a notebook" if file is None else f"{_near(file)} is not what it was trained with"
    raise UserError(f"{folder}: {what} and no copy was kept; name the recipe's file (--recipe) or class")


def _trusted_folder(
    folder: Path, about: About, notes: list[str], source: bytes, read: Path, file: Path | None, trusted: bool
) -> Path:
    """The folder to import the recipe's helper modules from; raises UserError if the recipe is not to be executed.

    read: the file that its source was read from. trusted: whether the user says so.
    """
    own = (file or read).parent
    beside = _helpers_folder(folder, about, notes, source, file) or own
    modules = helpers.helpers_of(source, beside)
    if trust.trained_in(source, modules, beside):
        return beside
    if found := trust.trusted_modules(source, modules, trust=trusted):
        return found
    several = f" and what it imports in {beside}" if modules else ""
    raise UserError(
        f"{folder}: its recipe was not trained on this machine by you, and would be executed: read {read}{several}, "
        "then give --trust (trust=True in Python)"
    )


def _helpers_folder(folder: Path, about: About, notes: list[str], source: bytes, file: Path | None) -> Path | None:
    """The folder with the helper modules as they were in training; None for the recipe's own folder."""
    wanted, copies = mapping(about.get("modules")), folder.absolute() / helpers.FOLDER
    there = helpers.hashes(helpers.helpers_of(source, file.parent)) if file is not None else {}
    if not wanted or there == wanted:
        return None
    changed = next(place for place in sorted({*wanted, *there}) if wanted.get(place) != there.get(place))
    if helpers.hashes(helpers.helpers_of(source, copies)) != wanted:
        raise UserError(
            f"{folder}: {changed}, which its recipe imports, is not what it was trained with, and the copy in "
            f"{copies} is damaged; restore it"
        )
    state = "has changed since the run" if changed in there else "is gone"
    notes.append(f"{changed}, which the recipe imports, {state}: the run's own copy is used")
    return copies


def _recipe_file(about: About) -> Path | None:
    if "recipe_file" in about:
        return Path(about["recipe_file"]) if about["recipe_file"] else None
    command = [str(word) for word in about.get("command", [])[1:]]  # a run of an earlier version
    return next(
        (Path(w.partition(".py:")[0].removesuffix(".py") + ".py").absolute() for w in command if ".py" in w), None
    )


def _source(file: Path | None) -> bytes | None:
    """The source in a recipe's file; None if it can't be read."""
    with contextlib.suppress(OSError):
        return None if file is None else read_bytes(file, MAX_RECIPE_BYTES)
    return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _near(path: Path | None) -> Path | None:
    """A path for a message: relative, if it is below the working directory."""
    with contextlib.suppress(ValueError):
        return path and path.relative_to(Path.cwd())
    return path


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a field's value has its type; checked only for plain types and unions of them."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if not all(option in (int, float, str, bool, type(None), Path) for option in options):
        return True
    return any(type(value) is kind or (isinstance(value, Path) and kind is Path) for kind in options) or (
        float in options and type(value) is int
    )

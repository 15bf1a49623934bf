"""Whose recipes are executed: what this user has trained on this machine, what nndist ships, and what the user trusts.

The networks of a run are built by the recipe in its folder, and a folder may come from somebody else. So each training
records its recipe in the user's state folder: `recipes/<fingerprint>/`, where the fingerprint covers the sources of the
recipe and of its helper modules. The entry holds copies of the helper modules: in a folder from somebody else there may
be more to import than the fingerprint covers, so helpers are imported from the entry instead.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..files import RECIPES, move, write_whole
from . import helpers

MODULES = "modules"
PLACES = "places"


def state_folder() -> Path:
    """Where nndist keeps what it must remember of this user; raises RuntimeError if there is no home folder."""
    if given := os.environ.get("XDG_STATE_HOME"):
        return Path(given, "nndist")
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local", "nndist")
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/nndist"
    return Path.home() / ".local/state/nndist"


def record(source: bytes, modules: Mapping[str, bytes], folder: Path | None = None) -> None:
    """Records a recipe as trusted, and the folder that it was trained in; does nothing if that can't be written.

    modules: the sources of its helper modules, by their paths in its folder.
    """
    with contextlib.suppress(OSError, RuntimeError):
        entry = _entry(source, modules)
        if not entry.is_dir():
            entry.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=entry.parent))
            try:
                (part / PLACES).mkdir()
                _write(modules, part / MODULES)
                with contextlib.suppress(OSError):  # another process was faster
                    move(part, entry)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        if folder is not None:
            (entry / PLACES / _name(folder)).touch()


def trained_in(source: bytes, modules: Mapping[str, bytes], folder: Path) -> bool:
    """Whether this user has trained the recipe in this folder, with these helper modules."""
    with contextlib.suppress(OSError, RuntimeError):
        return (_entry(source, modules) / PLACES / _name(folder)).is_file()
    return False


def trusted_modules(source: bytes, modules: Mapping[str, bytes], *, trust: bool) -> Path | None:
    """A folder of nothing but the helper modules of a trusted recipe; None if it is not trusted.

    trust: records it as trusted first. A shipped recipe is always trusted.
    """
    trust = trust or (not modules and is_shipped(source))
    if trust:
        record(source, modules)
    with contextlib.suppress(OSError, RuntimeError):
        if (found := _entry(source, modules) / MODULES).is_dir():
            return found
    if not trust:
        return None
    copy = Path(tempfile.mkdtemp(prefix="nndist-modules-"))  # without a state folder
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    _write(modules, copy)
    return copy


def is_shipped(source: bytes) -> bool:
    """Whether a recipe's source is that of a recipe which this nndist ships."""
    return any(path.read_bytes() == source for path in RECIPES.glob("*.py"))


def _entry(source: bytes, modules: Mapping[str, bytes]) -> Path:
    parts = [hashlib.sha256(source).hexdigest(), *(f"{h} {p}" for p, h in sorted(helpers.hashes(modules).items()))]
    return state_folder() / "recipes" / hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _name(folder: Path) -> str:
    return hashlib.sha256(str(folder).encode("utf-8", "surrogatepass")).hexdigest()


def _write(modules: Mapping[str, bytes], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for place, text in modules.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / place, text)

"""A run's folder: created or found, and locked while the run trains."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from .. import machine
from ..config import RunConfig
from ..errors import UserError
from ..files import open_to_append
from ..recipe.contract import Recipe
from ..runs import checkpoint
from ..runs.tracking import folder_is_gone
from ..stores import redacted


def make_folder(recipe: Recipe, config: RunConfig, fetch: Callable[[Path], None] | None = None) -> tuple[str, bool]:
    """The folder of the run, created if need be, and whether it holds a run to resume; raises UserError.

    fetch: brings into the folder what a store has of the run.
    """
    parent = config.runs_folder / recipe.name
    if config.resume in ("must", "rebuild") and config.run is None:
        raise UserError(f"--resume {config.resume}: say which run with --run")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if config.check:
            return tempfile.mkdtemp(prefix=".check-", dir=parent), False
        name = config.run or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        folder = parent / name
        number = 1
        while config.run is None and folder.exists():  # two runs in one second
            number += 1
            folder = parent / f"{name}-{number}"
        if fetch is not None:
            folder.mkdir(exist_ok=True)
            with lock(folder):
                fetch(folder)
        exists = (folder / "run.json").exists() or bool(checkpoint.checkpoints_in(folder / "checkpoints"))
        if exists and config.resume == "never":
            raise UserError(f"--run {config.run}: {folder} exists, and --resume is never; give another name")
        if not exists and config.resume in ("must", "rebuild"):
            raise UserError(f"--resume {config.resume}: there is no run at {folder}")
        folder.mkdir(exist_ok=True)
    except OSError as error:
        where = error.filename or parent
        flag = f"--runs-dir {redacted(str(config.runs_dir))}"
        raise UserError(f"{flag}: {where}: {error.strerror}; choose another") from error
    return str(folder), exists


LOCK_PATIENCE_SECONDS = 5.0  # how long a predecessor that is being stopped may still hold the lock


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Context manager: keeps a second launch out of a run; the system releases the lock however this process ends.

    It is a POSIX lock, which worker processes do not inherit: with flock they would hold it for some seconds after
    their parent was killed.
    """
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    try:
        file = open_to_append(folder / "lock")
    except OSError as error:
        raise UserError(f"{folder}/lock: {error.strerror}; remove it, or choose another --runs-dir") from error
    with file:
        while True:
            try:
                machine.lock(file, wait=False)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read(20).decode(errors="replace").strip() or "unknown"
                    raise UserError(
                        f"--run {folder.name}: {folder} is being trained by process {holder}; "
                        "wait for it or give another name"
                    ) from error
                time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
        yield


@contextlib.contextmanager
def folder_needed(folder: Path) -> Iterator[None]:
    """Context manager: turns an OSError into the TrainingError that says so if the run's folder is gone."""
    try:
        yield
    except OSError as error:
        if folder.is_dir():
            raise
        raise folder_is_gone(folder) from error

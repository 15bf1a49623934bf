"""The pages that show runs, made from their folders alone: report.html of one run, index.html of all.

A page is one file that needs nothing else: style, script, data and images stand in it, and its content security policy
forbids the browser to load or run anything more. Nothing heavy is imported: it is written at each evaluation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..files import write_text
from ..runs.reading import is_run, read_run, run_folders
from . import index_page, run_page

__all__ = ["write_index", "write_pages", "write_run"]


def write_run(folder: Path) -> Path:
    """Writes a run's report.html, whole or not at all, and returns its path; raises UserError and OSError."""
    return write_text(folder / "report.html", run_page.html_of(read_run(folder)))


def write_index(runs_dir: Path) -> Path:
    """Writes index.html over RUNS_DIR/<recipe>/<run>/ and returns its path; raises UserError and OSError."""
    return write_text(runs_dir / "index.html", index_page.html_of(runs_dir))


def write_pages(path: Path) -> Iterator[Path]:
    """Writes the page of a run, or of all runs in a folder and their index, and gives their paths as they are written.

    Raises UserError where there are no runs, and OSError.
    """
    if is_run(path):
        yield write_run(path)
        return
    for folder in run_folders(path):
        with contextlib.suppress(UserError):  # the index says what is wrong with it
            yield write_run(folder)
    yield write_index(path)

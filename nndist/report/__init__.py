"""HTML pages of runs, made from their folders alone: report.html of one run, index.html of all.

A page is one self-contained file: style, script, data and images are embedded, and its content security policy forbids
the browser to load or run anything else. Nothing heavy is imported, since a page is written at each evaluation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..files import write_text
from ..runs.reading import is_run, read_run, run_folders
from . import index_page, run_page
from .csv_file import write_csv

__all__ = ["write_csv", "write_index", "write_pages", "write_run"]


def write_run(folder: Path) -> Path:
    """Write a run's report.html atomically and return its path; raises UserError and OSError."""
    return write_text(folder / "report.html", run_page.html_of(read_run(folder)))


def write_index(runs_dir: Path) -> Path:
    """Write index.html over RUNS_DIR/<recipe>/<run>/ and return its path; raises UserError and OSError."""
    return write_text(runs_dir / "index.html", index_page.html_of(runs_dir))


def write_pages(path: Path) -> Iterator[Path]:
    """Write the page of a run, or of all runs in a folder and their index; yields each path once it is written.

    Raises UserError if there are no runs, and OSError.
    """
    if is_run(path):
        yield write_run(path)
        return
    for folder in run_folders(path):
        with contextlib.suppress(UserError):  # the index reports the problem
            yield write_run(folder)
    yield write_index(path)

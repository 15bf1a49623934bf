"""The pages that show runs, made from their folders alone: report.html of one run, index.html of all.

A page is one file that needs nothing else: style, script, data and images stand in it, and its content security policy
forbids the browser to load or run anything more. Nothing heavy is imported: it is written at each evaluation.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import NoReturn

from ..errors import UserError
from . import index_page, run_page
from .markup import write_text
from .reading import is_run, read_run, run_folders

__all__ = ["report_command", "write_index", "write_run"]


def write_run(folder: Path) -> Path:
    """Writes a run's report.html, whole or not at all, and returns its path; raises UserError and OSError."""
    return write_text(folder / "report.html", run_page.html_of(read_run(folder)))


def write_index(runs_dir: Path) -> Path:
    """Writes index.html over RUNS_DIR/<recipe>/<run>/ and returns its path; raises UserError and OSError."""
    return write_text(runs_dir / "index.html", index_page.html_of(runs_dir))


def report_command(arguments: list[str], description: str) -> None:
    """`launch/report.py`: writes the pages and prints their paths; leaves with 0 or 2 (bad input)."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message} (report.py --help shows examples)")

    parser = Parser(
        prog="report.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s PATH",
        description=description,
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="the folder of all runs, or of one run")
    try:
        path = parser.parse_args(arguments).path
        if is_run(path):
            print(write_run(path))
            return
        for folder in run_folders(path):
            with contextlib.suppress(UserError):  # the index says what is wrong with it
                print(write_run(folder))
        print(write_index(path))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; make it writable", file=sys.stderr)
        sys.exit(2)

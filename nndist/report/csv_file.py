"""metrics.jsonl as CSV, of one run or of all, for a spreadsheet or pandas."""

from __future__ import annotations

import csv
from pathlib import Path

from ..errors import UserError
from ..files import replacing
from ..runs.reading import is_run, run_folders
from ..runs.records import FILE, Records

FIRST = ("step", "epoch")


def write_csv(path: Path, output: Path) -> Path:
    """Write the records of a run, or of all runs in a folder, as CSV, and return `output`.

    A row per record, in order, a column per metric, empty where a record lacks it; numbers have all their digits. All
    runs begin with the columns recipe and run. Raises UserError if there are no runs, a run's records are damaged, or
    the file can't be written.
    """
    folders = [path] if is_run(path) else run_folders(path)
    found: list[tuple[Path, Records]] = []
    for folder in folders:
        records = Records.of_file(folder / FILE).load()
        if records.problem:
            raise UserError(f"{folder}: {records.problem}; restore it from a copy, or resume with --resume rebuild")
        found.append((folder.absolute(), records))
    names = list(dict.fromkeys([*FIRST, *(name for _, records in found for name in records.names())]))
    whose = [] if is_run(path) else ["recipe", "run"]
    if not output.absolute().parent.is_dir():
        raise UserError(f"--csv {output}: there is no folder {output.parent}")
    try:
        with replacing(output) as part, part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*whose, *names])
            for folder, records in found:
                owner = [folder.parent.name, folder.name] if whose else []
                writer.writerows([*owner, *(row.get(name) for name in names)] for row in records.rows())
    except OSError as error:
        raise UserError(f"--csv {output}: can't be written ({error.strerror or error})") from error
    return output

"""A person's own table: a CSV file whose columns are numbers, dates or categories, with gaps, as one tensor.

What a column is, its mean, deviation and categories come from the training lines alone. A table becomes x, float32
[lines, numbers + categories]: numbers as they are measured, NaN where they are missing; a date as several numbers; a
category as its place in the list of those seen in training, from 1, and 0 for others and for gaps.
"""

from __future__ import annotations

import csv
import datetime
import io
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nndist.errors import UserError
from nndist.files import printable, read_bytes
from nndist.prediction.inputs import Inputs

Kind = Literal["number", "date", "category", "left out"]
Spec = list[dict[str, Any]]
"""A dict for each column: name, kind and, for categories, values. JSON's types, so that a run keeps it."""

MAX_BYTES = 1 << 30
GAPS = {"", "na", "n/a", "nan", "null", "none", "?"}
DATE_FORMATS = ("%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y")
DATE_PARTS = 7  # the year, and sine and cosine of the place in the year, the week and the day
MOST_CATEGORIES = 200
RAREST = 2  # lines: a category seen less often counts as another


@dataclass
class Table:
    """The cells of a CSV file, as text without surrounding spaces. places: where each line is, for errors."""

    names: list[str]
    rows: list[list[str]]
    places: list[str] = field(default_factory=list)

    def column(self, name: str) -> list[str]:
        place = self.names.index(name)
        return [row[place] for row in self.rows]

    def some(self, numbers: Sequence[int]) -> Table:
        """The lines of these numbers."""
        return Table(self.names, [self.rows[n] for n in numbers], [self.places[n] for n in numbers])


def read_table(path: Path, flag: str = "--csv") -> Table:
    """A CSV file with a header, separated by commas, semicolons or tabs; raises UserError."""
    try:
        text = read_bytes(path.expanduser(), MAX_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{flag} {path}: can't be read ({reason})") from error
    return parse_table(text, f"{flag} {path}")


def parse_table(text: str, what: str) -> Table:
    """The table in a text; raises UserError for an empty one, repeated names or a line of another length."""
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    lines = csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
    try:
        found = [(lines.line_num, [cell.strip() for cell in row]) for row in lines if any(map(str.strip, row))]
    except csv.Error as error:
        raise UserError(f"{what}: line {lines.line_num}: {error}") from error
    if len(found) < 2:
        raise UserError(f"{what}: needs a line of column names and lines below it")
    names = [name or f"column {number}" for number, name in enumerate(found[0][1], 1)]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{what}: has several columns {printable(repeated[0])!r}; rename them")
    for number, row in found[1:]:
        if len(row) != len(names):
            raise UserError(f"{what}: line {number} has {len(row)} cells, the first line has {len(names)}")
    decimal_comma = separator != "," and not any("." in cell for _, row in found[1:] for cell in row)
    rows = [[_with_point(cell) if decimal_comma else cell for cell in row] for _, row in found[1:]]
    return Table(names, rows, [f"line {number}" for number, _ in found[1:]])


def _with_point(cell: str) -> str:
    changed = cell.replace(",", ".", 1)
    return changed if number_of(changed) is not None else cell


def is_gap(cell: str) -> bool:
    """Whether a cell holds nothing."""
    return cell.lower() in GAPS


def number_of(cell: str) -> float | None:
    """The finite number in a cell, or None."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def date_of(cell: str) -> datetime.datetime | None:
    """The date, perhaps with a time, in a cell, or None."""
    try:
        return datetime.datetime.fromisoformat(cell).replace(tzinfo=None)
    except ValueError:
        pass
    for style in DATE_FORMATS:
        try:
            return datetime.datetime.strptime(cell, style)
        except ValueError:
            continue
    return None


def kind_of(cells: Sequence[str]) -> Kind:
    """What a column is: left out are columns of one value, and texts that almost every line has of its own."""
    known = [cell for cell in cells if not is_gap(cell)]
    distinct = len(set(known))
    if distinct == 0 or (distinct == 1 and len(known) == len(cells)):
        return "left out"
    if all(number_of(cell) is not None for cell in known):
        return "number"
    if all(date_of(cell) is not None for cell in known):
        return "date"
    return "left out" if distinct > MOST_CATEGORIES or (distinct > 20 and distinct > len(known) / 2) else "category"


def fitted(table: Table, leave_out: Sequence[str]) -> Spec:
    """What each column of the training lines is."""
    spec: Spec = []
    for name in table.names:
        if name in leave_out:
            continue
        cells = table.column(name)
        column: dict[str, Any] = {"name": name, "kind": kind_of(cells)}
        if column["kind"] == "category":
            counts = Counter(cell for cell in cells if not is_gap(cell))
            column["values"] = sorted(value for value, count in counts.items() if count >= RAREST)
        spec.append(column)
    if not any(column["kind"] != "left out" for column in spec):
        raise UserError("the table has no column to learn from besides the target")
    return spec


def wanted(spec: Spec) -> list[str]:
    """The names of the columns that are used, in their order."""
    return [column["name"] for column in spec if column["kind"] != "left out"]


def encoded(spec: Spec, table: Table) -> Tensor:
    """The lines of a table as x (see above); cells that are not what their column is count as gaps."""
    numbers: list[list[float]] = []
    categories: list[list[float]] = []
    for column in spec:
        if column["kind"] == "left out":
            continue
        cells = table.column(column["name"])
        if column["kind"] == "number":
            numbers.append([_or_nan(None if is_gap(cell) else number_of(cell)) for cell in cells])
        elif column["kind"] == "date":
            parts = [date_parts(cell) for cell in cells]
            numbers += [list(part) for part in zip(*parts, strict=True)]
        else:
            places = {value: float(number) for number, value in enumerate(column["values"], 1)}
            categories.append([places.get(cell, 0.0) for cell in cells])
    return torch.tensor([*numbers, *categories], dtype=torch.float64).T.float().contiguous()


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def date_parts(cell: str) -> list[float]:
    """A date as numbers: the year with its fraction, and the place in the year, the week and the day on circles."""
    date = None if is_gap(cell) else date_of(cell)
    if date is None:
        return [math.nan] * DATE_PARTS
    seconds = (date - datetime.datetime(1970, 1, 1)).total_seconds()
    turns = [seconds / 86_400 / period for period in (365.2425, 7.0, 1.0)]
    circles = [function(2 * math.pi * turn) for turn in turns for function in (math.sin, math.cos)]
    return [1970 + turns[0], *circles]


def shape(spec: Spec) -> tuple[int, list[int]]:
    """How many numbers x has, and how many values each category can have, with 0 for others."""
    widths = {"number": 1, "date": DATE_PARTS}
    sizes = [1 + len(column["values"]) for column in spec if column["kind"] == "category"]
    return sum(widths.get(column["kind"], 0) for column in spec), sizes


def _is_only_cell(spec: Spec, text: str) -> bool:
    """Whether a text without separators is a line of a table that needs one column, and no mistyped file's name."""
    used = [column for column in spec if column["kind"] != "left out"]
    if len(used) != 1:
        return False
    cell = text.strip()
    if used[0]["kind"] == "category":
        return cell in used[0]["values"]
    return (number_of(cell) if used[0]["kind"] == "number" else date_of(cell)) is not None


def given(inputs: Inputs, spec: Spec) -> tuple[Tensor, list[str]]:
    """A person's lines as x, and which columns each of them lacks; from CSV files with these columns, or cells.

    Raises UserError that names every column that a file lacks.
    """
    names = wanted(spec)
    tables = []
    for item in inputs.items:
        text, what = str(item), str(item)
        if text == "-":
            text, what = sys.stdin.read(), "standard input"
        elif Path(text).is_file():
            tables.append((what, read_table(Path(text), "predict")))
            continue
        elif not any(mark in text for mark in ",;\t") and not _is_only_cell(spec, text):
            raise UserError(f"{printable(text)}: is neither a file nor cells; give a CSV file with {', '.join(names)}")
        else:
            separator = next((mark for mark in ";\t" if text.partition("\n")[0].count(mark) == len(names) - 1), ",")
            header = separator.join('"' + name.replace('"', '""') + '"' for name in names)
            text, what = f"{header}\n{text}", printable(text)
        tables.append((what, parse_table(text, what)))
    parts, missing = [], []
    for what, table in tables:
        if lacking := [name for name in names if name not in table.names]:
            raise UserError(f"{what}: has no column {', '.join(map(printable, lacking))}; it needs {', '.join(names)}")
        parts.append(encoded(spec, table))
        columns = [table.names.index(name) for name in names]
        missing += [", ".join(name for name, c in zip(names, columns, strict=True) if is_gap(r[c])) for r in table.rows]
        inputs.names += [what] if len(table.rows) == 1 else [f"{what}, {place}" for place in table.places]
    if not parts:
        raise UserError(f"no inputs; give a CSV file, or - for standard input, with {', '.join(names)}")
    return torch.cat(parts).to(inputs.device), missing

"""metrics.jsonl: records on disk, each sealed by a hash that covers all before it, and in memory as columns.

A line is a JSON object whose last key, "chain", is a hash of the previous line's chain and the rest of this line, so a
changed digit or a removed or added line is detected, and located. Lines of earlier versions lack that key; the first
line that has it covers them. Floats keep their bits through JSON, so columns of 8 bytes per value replace dicts: a
million records take some 50 MB, not 1 GB.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..files import flush_to_disk, move, open_regular, replacing

Record = dict[str, Any]
FILE = "metrics.jsonl"
BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 20
_HEX_DIGITS = 12
TIMED = ("examples_per_second", "seconds_per_epoch", "seconds", "load", "memory", "traffic")
"""Metrics, by the first part of their names, that tell of the machine: two identical trainings differ in them."""
_BEFORE, _AFTER = b', "chain": "', b'"}'
_SEAL_BYTES = len(_BEFORE) + _HEX_DIGITS + len(_AFTER)


def without_times(record: Mapping[str, Any]) -> Record:
    """A record without what two identical trainings may differ in: TIMED metrics, and the chain over them."""
    return {n: v for n, v in record.items() if n != "chain" and n.partition("/")[0] not in TIMED}


def link(before: str, text: bytes) -> str:
    """The chain after a record, from the chain before it and the record's JSON."""
    return hashlib.blake2b(before.encode() + text, digest_size=_HEX_DIGITS // 2).hexdigest()


def sealed(before: str, record: Record) -> tuple[bytes, str]:
    """A record as a line of metrics.jsonl, and the chain after it."""
    text = json.dumps(record, allow_nan=False).encode()
    chain = link(before, text)
    return text[:-1] + _BEFORE + chain.encode() + _AFTER + b"\n", chain


class Seals:
    """Checks the lines of metrics.jsonl in order.

    chain: after the lines so far. count: of lines. broken: numbers, from 1, of altered lines. A line after a broken one
    is checked against the broken line's stated chain, so one change breaks one line.
    """

    def __init__(self) -> None:
        self.chain = ""
        self.count = 0
        self.broken: list[int] = []
        self._begun = False

    def check(self, line: bytes) -> bool:
        """Whether a line, without its newline, is intact."""
        self.count += 1
        if line[-_SEAL_BYTES : -_HEX_DIGITS - len(_AFTER)] == _BEFORE and line.endswith(_AFTER):
            stated = line[-_HEX_DIGITS - len(_AFTER) : -len(_AFTER)].decode("ascii", "replace")
            whole = link(self.chain, line[:-_SEAL_BYTES] + b"}") == stated
            self.chain, self._begun = stated, True
        else:
            whole = not self._begun
            self.chain = link(self.chain, line) if whole else self.chain
        if not whole:
            self.broken.append(self.count)
        return whole

    def problem(self) -> str:
        """What is wrong, in one line, or ""."""
        if not self.broken:
            return ""
        many = len(self.broken)
        which = f"line {self.broken[0]:,} is" if many == 1 else f"{many:,} lines (the first is {self.broken[0]:,}) are"
        return f"{FILE}: {which} not as written (changed, cut, or next to a removed line)"


def lines_of(path: Path, end: int | None = None) -> Iterator[list[bytes]]:
    """The lines of a file up to byte `end`, in chunks; without `end`, an incomplete last line is still being written.

    Raises OSError, and ValueError for a line too long to be a record.
    """
    rest = b""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if end is not None and size < end:
            raise ValueError(f"has {size:,} bytes, but the checkpoint expects {end:,}")
        left = size if end is None else end
        while left > 0 and (block := file.read(min(BLOCK_BYTES, left))):
            left -= len(block)
            *lines, rest = (rest + block).split(b"\n")
            yield lines
            if len(rest) > MAX_LINE_BYTES:
                raise ValueError(f"holds a line of more than {MAX_LINE_BYTES:,} bytes")
    if rest and end is not None:
        raise ValueError(f"ends in the middle of a record at byte {end:,}")


def verified(path: Path, end: int) -> Seals:
    """The seals of the lines up to byte `end`, streamed without keeping them; raises OSError and ValueError."""
    seals = Seals()
    for lines in lines_of(path, end):
        for line in lines:
            seals.check(line)
    return seals


class Kept(NamedTuple):
    """What is left of damaged records: bytes and chain of the new file, and how many records it kept and lost."""

    size: int
    chain: str
    kept: int
    lost: int


def rebuild(path: Path, end: int) -> Kept:
    """Rewrites a damaged file with the intact records up to byte `end`; raises OSError.

    The damaged file stays beside it as metrics.damaged.jsonl.
    """
    seals, chain, kept = Seals(), "", 0
    with replacing(path) as part, part.open("wb") as file:
        # if the file is too short, missing or not a file, what was read before the error is kept
        with contextlib.suppress(OSError, ValueError):
            for lines in lines_of(path, min(end, path.stat().st_size)):
                for line in lines:
                    if seals.check(line) and (found := parsed([line])):
                        found[0].pop("chain", None)
                        text, chain = sealed(chain, found[0])
                        file.write(text)
                        kept += 1
        flush_to_disk(file)
        size = file.tell()
        with contextlib.suppress(FileNotFoundError):
            move(path, path.with_name("metrics.damaged.jsonl"))
    return Kept(size, chain, kept, seals.count - kept)


def parsed(lines: list[bytes]) -> list[Record]:
    """The records in these lines; what is not a record is skipped."""
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")  # many times faster than line by line
        if len(found) == len(lines):
            return [record for record in found if isinstance(record, dict)]
    except (ValueError, RecursionError):
        pass
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


class Records:
    """Records in order of creation, as columns of numbers.

    problem: what is wrong with the file that they were read from, in one line, or "". chain: of that file, or "".
    """

    def __init__(self, records: Iterable[Record] = ()):
        self.problem = self.chain = ""
        self._past: tuple[Path, int | None] | None = None
        self._order = array("L")  # the layout number of each record
        self._layouts: dict[tuple[str, ...], _Layout] = {}
        self._by_number: list[_Layout] = []
        self._extend(list(records))

    @classmethod
    def of_file(cls, path: Path, end: int | None = None) -> Records:
        """The records of metrics.jsonl up to byte `end`, read on first use."""
        records = cls()
        records._past = (path, end)
        return records

    def load(self) -> Records:
        """Reads the file if that is still to be done; returns self. What can't be read is reported in `problem`."""
        if self._past is None:
            return self
        (path, end), later = self._past, list(self._rows())
        Records.__init__(self)
        seals, unread = Seals(), 0
        try:
            for lines in lines_of(path, end):
                found = parsed(lines)
                unread += len(lines) - len(found)
                for line in lines:
                    seals.check(line)
                for record in found:
                    record.pop("chain", None)
                self._extend(found)
            self.problem, self.chain = seals.problem(), seals.chain
            if unread and not self.problem:
                self.problem = f"{FILE}: {unread:,} line{'s are not records' if unread > 1 else ' is not a record'}"
        except FileNotFoundError:
            pass
        except OSError as error:
            self.problem = f"{FILE}: can't be read ({error.strerror})"
        except ValueError as error:
            self.problem = f"{FILE}: {error}"
        self._extend(later)
        return self

    def compare(self, described: Mapping[str, Any]) -> str:
        """What is wrong with the file, also compared with run.json, in one line, or ""."""
        stated = described.get("metrics_chain")
        if self.load().problem or not stated or described.get("status") == "running" or stated == self.chain:
            return self.problem
        return f"{FILE}: does not end as run.json says; records are missing at its end, or were added"

    def append(self, record: Record) -> None:
        """Adds a record, without reading the file."""
        self._extend([record])

    def rows(self) -> list[Record]:
        """The records as dicts."""
        return list(self.load()._rows())

    def names(self) -> list[str]:
        """All keys, in order of first appearance."""
        return list(dict.fromkeys(name for names in self.load()._layouts for name in names))

    def figures(self) -> list[str]:
        """The keys that have a number in some record, in order of first appearance."""
        found: dict[str, None] = {}
        for layout in self.load()._by_number:
            for name in layout.columns:
                if name not in found and any(isinstance(v, int | float) for v in layout.values(name)):
                    found[name] = None
        return list(found)

    def last(self) -> Record:
        """The last record; empty if there is none."""
        self.load()
        return self._by_number[self._order[-1]].last() if self._order else {}

    def columns(self, *names: str) -> list[Sequence[Any]]:
        """The values of these keys in the records that have them all; nan in an array("d") means null."""
        layouts = [layout for found, layout in self.load()._layouts.items() if set(names) <= set(found)]
        if len(layouts) == 1:
            return [layouts[0].columns[name] for name in names]
        return [self._merged([(layout.number, layout.columns[name]) for layout in layouts]) for name in names]

    def _merged(self, parts: list[tuple[int, Any]]) -> Sequence[Any]:
        """The values of one key from several layouts, by number, in order; an array if all have the same type."""
        kinds = {column.typecode if isinstance(column, array) else "" for _, column in parts}
        is_array = len(kinds) == 1 and "" not in kinds
        iterators = {number: iter(column) if is_array else _plain(column) for number, column in parts}
        values = (next(iterators[number]) for number in self._order if number in iterators)
        return array(kinds.pop(), values) if is_array else list(values)

    def _extend(self, records: list[Record]) -> None:
        grouped: dict[tuple[str, ...], list[Record]] = {}
        for record in filter(None, records):
            key = tuple(record)
            if key not in grouped:
                grouped[key] = []
                if key not in self._layouts:
                    self._layouts[key] = _Layout(len(self._layouts), key)
                    self._by_number.append(self._layouts[key])
            grouped[key].append(record)
            self._order.append(self._layouts[key].number)
        for key, some in grouped.items():
            self._layouts[key].extend(some)

    def _rows(self) -> Iterator[Record]:
        iterators = [layout.rows() for layout in self._by_number]
        return (next(iterators[number]) for number in self._order)


class _Layout:
    """The records with one set of keys; per key an array("q") of integers, array("d") of floats and null, or a list."""

    def __init__(self, number: int, names: tuple[str, ...]):
        self.number = number
        self.columns: dict[str, Any] = dict.fromkeys(names)

    def extend(self, records: list[Record]) -> None:
        for name, column in self.columns.items():
            values = [record[name] for record in records]
            kinds = set(map(type, values))
            wanted = "q" if kinds == {int} else "d" if kinds <= {float, type(None)} else ""
            if column is None:
                column = self.columns[name] = array(wanted) if wanted else []
            if isinstance(column, array):
                given = [math.nan if value is None else value for value in values] if type(None) in kinds else values
                try:
                    if column.typecode == wanted:
                        column.extend(array(wanted, given))
                        continue
                except OverflowError:  # an integer beyond 64 bits
                    pass
                column = self.columns[name] = list(_plain(column))
            column.extend(values)

    def last(self) -> Record:
        return {name: next(_plain(column[-1:])) for name, column in self.columns.items()}

    def values(self, name: str) -> Iterator[Any]:
        return _plain(self.columns[name])

    def rows(self) -> Iterator[Record]:
        names = list(self.columns)
        return (dict(zip(names, row, strict=True)) for row in zip(*map(self.values, names), strict=True))


def _plain(column: Any) -> Iterator[Any]:
    if isinstance(column, array) and column.typecode == "d":
        return (None if value != value else value for value in column)
    return iter(column)

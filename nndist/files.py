"""Safe file access: read regular files of bounded size and JSON of a known schema; write atomically.

A run's folder may be incomplete, edited by hand, or made by a stranger. Everything read from it is checked here, so
that callers get what they expect or one error that names the file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

PACKAGE = Path(__file__).parent
CHECKOUT = None if (PACKAGE / "recipes").is_dir() else PACKAGE.parent
"""The repository that the package lies in; None where it is installed without one."""
RECIPES, LAUNCH = (CHECKOUT or PACKAGE) / "recipes", (CHECKOUT or PACKAGE) / "launch"
"""Of the repository, and as packages within an installed nndist (see pyproject.toml)."""
MAX_JSON_BYTES = 256 << 20
MAX_JSON_VALUES = 5_000_000
"""Of a file: an empty list takes three bytes of text, and twenty times as many in memory."""
MAX_DEPTH = 64  # of nested lists and objects
MAX_WHOLE_NUMBER = 2**63 - 1
MAX_SHOWN = 40  # characters of a wrong value in an error
WINDOWS = os.name == "nt"
BUSY_SECONDS = 3.0
"""How long a file is waited for that another process has open: Windows then refuses to rename or remove it."""


def recipe_file(path: str | Path) -> tuple[Path, str]:
    """The file that a recipe's path names, and the class that is wanted of it ("": the only one).

    The name of a shipped recipe, such as `mnist_cnn`, stands for its file unless a file has that name.
    """
    text, _, wanted = str(path).partition(".py:")
    file = Path(text + ".py" if wanted else text)
    shipped = RECIPES / f"{file.name}.py"
    return (shipped if len(file.parts) == 1 and not file.is_file() and shipped.is_file() else file), wanted


def near(path: Path) -> Path:
    """A path as one would type it: relative to the working directory if it lies below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# Reading.


def open_regular(path: str | Path, *, follow: bool = True) -> BinaryIO:
    """Open a file for reading; raises OSError for anything but a regular file, without waiting or reading.

    Opening a pipe would block, and reading an endless device would fill the memory. `follow`: whether to follow a
    symbolic link.
    """
    return _opened(path, os.O_RDONLY | (0 if follow else getattr(os, "O_NOFOLLOW", 0)), "rb")


def open_to_append(path: str | Path) -> BinaryIO:
    """Open a file for appending and reading, creating it if needed; raises OSError as `open_regular` does."""
    return _opened(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, "ab+")


_SAFELY = 0  # don't wait for a pipe; keep the file from child processes; on Windows, don't translate newlines
for _name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
    _SAFELY |= getattr(os, _name, 0)


def _opened(path: str | Path, flags: int, mode: str) -> BinaryIO:
    try:
        descriptor = patiently(lambda: os.open(path, flags | _SAFELY, 0o666), path)
    except ValueError as error:  # a NUL in its name
        raise OSError(errno.EINVAL, f"no such name ({error})", str(path)) from error
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))
        return cast(BinaryIO, os.fdopen(descriptor, mode))
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | Path, most: int = MAX_JSON_BYTES, *, follow: bool = True) -> bytes:
    """The contents of a regular file; raises OSError, reading nothing, if it is none or has more than `most` bytes."""
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"has {size:,} bytes, more than the limit of {most:,}", str(path))
        return file.read(most)


def read_json(path: str | Path, schema: Any = None, most: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file, checked; raises OSError, and ValueError as `parse_json` does."""
    return parse_json(read_bytes(path, most), schema)


def parse_json(data: bytes | str, schema: Any = None) -> Any:
    """The value of JSON text, after `check`.

    Raises ValueError for invalid JSON, nesting beyond MAX_DEPTH, more than MAX_JSON_VALUES values, duplicate keys in an
    object, and non-finite numbers.
    """
    check_extent(data)
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates, parse_constant=_no_nan, parse_float=_finite_number)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    _check_depth(value)
    if schema is not None:
        check(value, schema)
    return value


def check_extent(data: bytes | str) -> None:
    """Raises ValueError for JSON text that is too long, or may have too many values, before it is parsed.

    What is written should pass, too, so that it can be read again.
    """
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"has {len(data):,} bytes, more than the limit of {MAX_JSON_BYTES:,}")
    # a comma or a bracket is before each value
    count = sum(data.count(mark) if isinstance(data, str) else data.count(mark.encode()) for mark in ",[{")
    if count > MAX_JSON_VALUES:
        raise ValueError(f"has up to {count:,} values, more than the limit of {MAX_JSON_VALUES:,}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _no_nan(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _finite_number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_nan(shown(text))


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = (
            [
                inner
                for outer in level
                for inner in (outer.values() if isinstance(outer, dict) else outer)
                if isinstance(inner, dict | list)
            ]
            if isinstance(level[0], dict | list)
            else []
        )
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


# Schemas: int, float (either kind of number), str, bool, None, dict or list of anything; a tuple of alternatives;
# [kind] for a list of one kind; Each(kind) for an object of any keys; {"key": kind, "optional?": kind} for an object
# with these keys and perhaps others.


class Each(NamedTuple):
    """Schema of an object of any keys, all of whose values are of one kind."""

    kind: Any


def check(value: Any, schema: Any, where: str = "") -> None:
    """Raises ValueError, naming place and value, for the first value that does not match the schema."""
    if isinstance(schema, Mapping):
        _expect(isinstance(value, dict), value, "an object", where)
        for key, kind in schema.items():
            name = key.removesuffix("?")
            place = f"{where}.{name}" if where else name
            if name in value:
                check(value[name], kind, place)
            elif name == key:
                raise ValueError(f"has no {place}")
    elif isinstance(schema, Each):
        _expect(isinstance(value, dict), value, "an object", where)
        for name, item in value.items():
            check(item, schema.kind, f"{where}.{shown(name)}" if where else shown(name))
    elif isinstance(schema, list):
        _expect(isinstance(value, list), value, "a list", where)
        for place, item in enumerate(value):
            check(item, schema[0], f"{where}[{place}]")
    elif isinstance(schema, tuple):
        if not any(_fits(value, kind) for kind in schema):
            inner = [kind for kind in schema if isinstance(kind, Mapping | Each | list)]
            if len(inner) == 1 and isinstance(value, list if isinstance(inner[0], list) else dict):
                check(value, inner[0], where)  # says what is wrong inside
            _expect(False, value, " or ".join(_NAMES.get(_plain_kind(kind), "") for kind in schema), where)
    else:
        _expect(_is(value, schema), value, _NAMES[schema], where)


_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", None: "null"}
_NAMES |= {dict: "an object", list: "a list"}


def _plain_kind(kind: Any) -> Any:
    return dict if isinstance(kind, Mapping | Each) else list if isinstance(kind, list) else kind


def _is(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind in (int, float):
        return (type(value) is int and abs(value) <= MAX_WHOLE_NUMBER) or (kind is float and type(value) is float)
    if type(value) is str is kind and not value.isascii():
        with contextlib.suppress(UnicodeEncodeError):  # half a surrogate pair can't be printed
            return bool(value.encode())
        return False
    return type(value) is kind


def _fits(value: Any, kind: Any) -> bool:
    try:
        check(value, kind)
    except ValueError:
        return False
    return True


def _expect(fits: bool, value: Any, kind: str, where: str) -> None:
    if not fits:
        raise ValueError(f"{where or 'it'} is {shown(value)} where {kind} is expected")


def shown(value: Any) -> str:
    """A value from a file, for an error: printable and short."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if type(value) is int and abs(value) > MAX_WHOLE_NUMBER:
        return "a number beyond 64 bits"  # more than 4,300 digits can't even be printed
    text = value if isinstance(value, str) and re.fullmatch(r"[\w./ -]{1,40}", value) else repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def printable(name: str) -> str:
    """A file's name, escaped if it is not printable."""
    return name if name.isprintable() else repr(name)


# Writing.

T = TypeVar("T")


def patiently(action: Callable[[], T], *paths: str | Path) -> T:
    """The result of an action on these paths; raises OSError.

    Windows refuses to open, rename or remove a file while another process, such as a virus scanner, has it open or
    replaces it: there it is tried for BUSY_SECONDS.
    """
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return action()
        except PermissionError:
            # a folder that is opened as a file is refused, too, and stays one
            if not WINDOWS or time.monotonic() >= until or (len(paths) == 1 and Path(paths[0]).is_dir()):
                raise
        time.sleep(0.02)


def move(source: Path, target: Path) -> None:
    """Renames a file or folder; a file takes the place of one that has the name. Raises OSError."""
    patiently(lambda: source.replace(target), source, target)


def remove_folder(path: Path) -> bool:
    """Removes a folder, in one moment as far as others see; returns whether it is gone.

    It stays as it is if a process on Windows has one of its files open.
    """
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        path.rename(aside)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    shutil.rmtree(aside, ignore_errors=True)
    return True


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: readers see the old file or the new one; raises OSError."""
    write_whole(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: readers see the old file or the new one; raises OSError."""
    with replacing(path) as part:
        write(part, data)


def write_text(path: Path, text: str) -> Path:
    """`write_whole` of text as UTF-8; returns the path."""
    write_whole(path, text.encode("utf-8", "replace"))  # half a surrogate pair has no bytes
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager: a temporary path beside `path`, which replaces `path` if the block ends without an error."""
    part = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.part{path.suffix}")
    try:
        yield part
        move(part, path)
    finally:
        part.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Write a file and flush it to disk; raises OSError."""
    with path.open("wb") as file:
        file.write(data)
        flush_to_disk(file)


def flush_to_disk(file: BinaryIO) -> None:
    """Flush what was written to a file to disk; raises OSError."""
    file.flush()
    if sys.platform == "darwin":  # whose fsync leaves it in the disk's own memory
        import fcntl

        with contextlib.suppress(OSError):  # a network's file system may have only fsync
            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
            return
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk; raises OSError."""
    if WINDOWS:
        return  # which writes names with the files, and opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """A copy in which floats that JSON can't hold (nan, inf) are None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def known(value: Any) -> Any:
    """Inverse of `finite`, as far as possible: None becomes nan."""
    if isinstance(value, dict):
        return {key: math.nan if item is None else known(item) for key, item in value.items()}
    return value

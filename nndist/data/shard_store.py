"""Where shards are stored: their list, a folder, a web server or an object store, and the cache of fetched ones.

`NAME.json` in a folder, or at a URL, lists the tar files of the set NAME with their numbers of examples, bytes
and SHA-256. `shards` reads their contents.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import torch
from filelock import FileLock
from torch import Tensor

from .. import stores
from ..errors import UserError
from ..files import flush_to_disk, move, open_regular, parse_json, read_bytes, shown

FORMAT = "nndist shards 1"
ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 0.5
"""Before the second attempt to fetch a file; it doubles with each attempt."""
READ_TIMEOUT_SECONDS = 20.0
"""The longest time without data; a response's header must arrive within it."""
GRACE_SECONDS = 5.0
MIN_BYTES_PER_SECOND = 1000.0
"""The least average rate of a response, checked from READ_TIMEOUT_SECONDS after it began."""
MAX_LIST_BYTES = 256 << 20
LIST_KIND = {
    "format": str,
    "classes": [(str, int)],
    "shards": [{"file": str, "examples": int, "bytes": int, "sha256": str}],
}
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Shard:
    """One tar file: its name beside the list, and its expected contents."""

    file: str
    examples: int
    bytes: int
    sha256: str


class Index:
    """The list of a set's shards, read from `<place>/<name>.json`; `place` is a folder or a URL.

    Raises UserError if it is not available or not such a list.
    """

    def __init__(self, place: str, name: str):
        self.place, self.name = place.rstrip("/"), name
        where = f"{self.place}/{name}.json"
        shown_place = stores.plain_urls(where)
        try:
            text = fetch(where, _bounded) if self.is_remote else read_bytes(Path(where).expanduser(), MAX_LIST_BYTES)
            listed = parse_json(text, LIST_KIND)
            if listed["format"] != FORMAT:
                raise ValueError(f"its format is {shown(listed['format'])}, not {FORMAT!r}")
            self.classes = [str(name) for name in listed["classes"]]
            self.shards = [Shard(**{name: shard[name] for name in Shard.__annotations__}) for shard in listed["shards"]]
            if not self.shards:
                raise ValueError("it lists no shards")
            for number, shard in enumerate(self.shards):
                if not re.fullmatch(r"[^/\\:\0]{1,250}\.tar", shard.file) or not shard.file.isprintable():
                    raise ValueError(f"shards[{number}].file is {shown(shard.file)}, no .tar file beside it")
                if not 1 <= shard.examples <= shard.bytes // 512:  # each takes a block of a tar file at least
                    raise ValueError(f"shards[{number}] has {shard.examples:,} examples in {shard.bytes:,} bytes")
        except (OSError, HTTPException) as error:
            raise UserError(
                f"{shown_place}: the list of the shards can't be read ({reason(error)}); name the folder or URL that "
                "has it, or make shards with nndist shard"
            ) from error
        except ValueError as error:
            raise UserError(
                f"{shown_place}: is not a list of shards ({reason(error)}); nndist shard makes one"
            ) from error
        self.starts = [0, *accumulate(shard.examples for shard in self.shards)]  # each shard's first example number
        self.fingerprint = hashlib.sha256(text).hexdigest()[:16]

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def is_remote(self) -> bool:
        """Whether the shards are fetched from a server."""
        return stores.is_url(self.place)

    def address(self, shard: int) -> str:
        """The path or URL of a shard."""
        file = self.shards[shard].file
        return f"{self.place}/{urllib.parse.quote(file) if is_web(self.place) else file}"

    @cached_property
    def shard_of_example(self) -> Tensor:
        """The shard of each example, int64 [number of examples]."""
        return torch.repeat_interleave(torch.tensor([shard.examples for shard in self.shards]))


class Store(Protocol):
    """Opens shards as files."""

    def open(self, shard: int) -> BinaryIO:
        """A shard, complete and with the listed SHA-256; raises UserError otherwise."""


class Local:
    """Shards in a folder. All are checked at once, so a missing one is reported before training."""

    def __init__(self, index: Index):
        self.index = index
        for number, shard in enumerate(index.shards):
            path = self._path(number)
            found = path.stat().st_size if path.is_file() else None
            if found != shard.bytes:
                what = "is missing" if found is None else f"has {found:,} bytes and its list says {shard.bytes:,}"
                raise UserError(f"{path}: {what}; copy it again, or recreate the shards with nndist shard")

    def _path(self, shard: int) -> Path:
        return Path(self.index.address(shard)).expanduser()

    def open(self, shard: int) -> BinaryIO:
        path, listed = self._path(shard), self.index.shards[shard]
        try:
            file = open_regular(path)
        except OSError as error:
            raise UserError(f"{path}: can't be read ({reason(error)}); copy it again") from error
        if (problem := damage(file, listed)) is not None:
            file.close()
            raise UserError(f"{path}: damaged, {problem}; copy it again, or recreate the shards with nndist shard")
        return file


class Fetched:
    """Shards of a server, cached in a folder of bounded size that all processes of a machine share.

    The least recently opened are removed first; a process that still reads one keeps it open. The first process that
    needs a shard fetches it, the others wait; a fetched shard appears in one rename, after its SHA-256 was verified.
    """

    def __init__(self, index: Index, cache: Path, cache_bytes: int, window: int):
        self.index, self.bytes = index, cache_bytes
        self.root = cache.expanduser()
        self.folder = self.root / hashlib.sha256(index.place.encode()).hexdigest()[:16]
        at_a_time = min(window, len(index.shards)) + 2  # a window, the next, and one being removed
        needed = sum(sorted((shard.bytes for shard in index.shards), reverse=True)[:at_a_time])
        if needed > cache_bytes:
            raise UserError(
                f"--cache-gigabytes {cache_bytes / 1e9:g}: a window of {window} shards of "
                f"{stores.plain_urls(index.place)} takes {math.ceil(needed / 1e6) / 1e3:.3f}; give at least that, or "
                "fewer shards with --window"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--data-dir: {self.folder} can't be created ({reason(error)}); name another folder"
            ) from error

    def open(self, shard: int) -> BinaryIO:
        listed, address = self.index.shards[shard], self.index.address(shard)
        path = self.folder / listed.file
        try:
            if (file := kept(path, listed)) is not None:
                return file
            with FileLock(self.folder / f".{listed.file}.lock"):
                return kept(path, listed) or self._fetch(address, path, listed)
        except (OSError, HTTPException) as error:
            if is_local(error):
                raise UserError(
                    f"{self.folder}: can't hold {listed.file} ({reason(error)}); make room, or name another folder "
                    "with --data-dir"
                ) from error
            raise UserError(
                f"{stores.plain_urls(address)}: could not be fetched ({reason(error)}); check the server; "
                "the same command resumes the run"
            ) from error

    def _fetch(self, address: str, path: Path, listed: Shard) -> BinaryIO:
        part = path.with_name(f".{path.name}.part")  # belongs to the holder of the shard's lock

        def attempt(response: Iterable[bytes]) -> None:
            with part.open("r+b") as file:
                for chunk in response:
                    file.write(chunk)
                    if file.tell() > listed.bytes:
                        break
                file.truncate()
                if (problem := damage(file, listed)) is not None:
                    raise OSError(problem)
                flush_to_disk(file)
            move(part, path)

        try:
            with FileLock(self.root / ".room.lock"):
                self._make_room(listed.bytes)
                with part.open("wb") as file:
                    file.truncate(listed.bytes)  # so the next process that makes room counts it
            fetch(address, attempt)
            return path.open("rb")
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, wanted: int) -> None:
        """Removes the least recently opened shards, of any set, until `wanted` more bytes fit."""
        found = []
        for path in self.root.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for changed, size, path in sorted(found):
            if total + wanted <= self.bytes:
                return
            # a shard being fetched stays; what a killed process left half fetched does not
            if path.suffix == ".tar" or (path.suffix == ".part" and time.time() - changed / 1e9 > 3600):
                with contextlib.suppress(PermissionError):  # on Windows: it is open
                    path.unlink(missing_ok=True)
                    total -= size


def kept(path: Path, listed: Shard) -> BinaryIO | None:
    """A shard in the cache, if it is there and complete; else None."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return None
    if damage(file, listed) is not None:
        file.close()
        return None
    with contextlib.suppress(OSError):  # another process may be removing it
        os.utime(path)  # the most recently opened is removed last
    return file


def damage(file: BinaryIO, listed: Shard) -> str | None:
    """What is wrong with the bytes of an open shard; None if nothing is."""
    size = os.fstat(file.fileno()).st_size
    if size != listed.bytes:
        return f"it has {size:,} bytes and its list says {listed.bytes:,}"
    file.flush()
    file.seek(0)
    found = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    return (
        None if found == listed.sha256 else f"its SHA-256 is {found[:12]}... and its list says {listed.sha256[:12]}..."
    )


def fetch(address: str, take: Callable[[Iterable[bytes]], Any] = b"".join) -> Any:
    """What `take` returns for the chunks at a URL; raises OSError or HTTPException after ATTEMPTS failed attempts.

    An OSError of `take` is a failed attempt too. What the server lacks or refuses is not requested again.
    """
    pause = FIRST_PAUSE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with answer(address) as response:
                expected = response.length

                def chunks(response: Any = response, expected: int | None = expected) -> Iterator[bytes]:
                    got, began = 0, time.monotonic()
                    while chunk := response.read1(CHUNK_BYTES):
                        got += len(chunk)
                        yield chunk
                        seconds = time.monotonic() - began
                        if seconds > READ_TIMEOUT_SECONDS and got < MIN_BYTES_PER_SECOND * seconds:
                            raise TimeoutError(f"only {got:,} bytes in {seconds:.0f} s")
                    if expected is not None and got < expected:
                        raise OSError(f"only {got:,} of {expected:,} bytes arrived")

                return take(chunks())
        except (OSError, HTTPException) as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429)
            final = final or isinstance(error, Missing)
            if final or is_local(error) or attempt == ATTEMPTS:
                raise
        time.sleep(pause)
        pause *= 2
    raise AssertionError("unreachable")


def answer(address: str) -> Any:
    """A server's response with its header read; raises OSError, also if the header trickles in for too long."""
    if not is_web(address):
        return Stored(address)
    request = urllib.request.Request(address, headers={"User-Agent": "nndist"})
    return in_time(lambda: urllib.request.urlopen(request, timeout=READ_TIMEOUT_SECONDS))


def in_time(action: Callable[[], Any]) -> Any:
    """What `action` returns or raises; TimeoutError if it takes too long.

    A socket's own timeout does not notice that, as it starts again with each byte.
    """
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(action())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=ask, name="shard request", daemon=True)
    thread.start()
    thread.join(READ_TIMEOUT_SECONDS + GRACE_SECONDS)
    if not found:
        raise TimeoutError(f"no answer within {READ_TIMEOUT_SECONDS + GRACE_SECONDS:g} s")
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


class Missing(OSError):
    """A store has no such file."""


class Stored:
    """A file in an object store, read as a response is. Raises Missing and StoreError."""

    def __init__(self, address: str):
        place, _, name = address.rpartition("/")
        try:
            self._file = in_time(lambda: stores.Store(place).open(name))
        except FileNotFoundError as error:
            raise Missing("there is no such file") from error
        self.length: int | None = getattr(self._file, "size", None)

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read1(self, size: int) -> bytes:
        """At most so many bytes, none at the end."""
        try:
            return bytes(in_time(lambda: self._file.read(size)))
        except TimeoutError:
            raise
        except Exception as error:
            raise stores.StoreError(stores.reason(error)) from error


def _bounded(chunks: Iterable[bytes]) -> bytes:
    """The list of the shards; raises ValueError if it is too large for memory."""
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > MAX_LIST_BYTES:
            raise ValueError(f"it has more than {MAX_LIST_BYTES:,} bytes")
    return bytes(data)


def is_web(place: str) -> bool:
    """Whether a place is a web server's, which needs no client."""
    return place.startswith(("http://", "https://"))


def is_local(error: BaseException) -> bool:
    """Whether an error comes from a local file or disk, not from the server or the network."""
    if isinstance(error, urllib.error.URLError) or not isinstance(error, OSError):
        return False
    return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def reason(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return reason(error.reason)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}" if isinstance(error, KeyError) or not str(error) else str(error)

"""Files at a URL, by fsspec: s3://, gs://, az://, hf://, file:// and whatever else is installed.

Keys belong in the environment or the client's own files, as fsspec and the clients read them; if a URL holds some,
`redacted` keeps them out of everything that is shown or recorded. fsspec is imported when a store is opened.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError
from .files import flush_to_disk

BLOCK_BYTES = 16 << 20
"""The size of the parts in which a file is sent; S3 takes at most 10,000, so larger files get larger parts."""
MOST_PARTS = 9_000
SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|CONNECTION_STRING|SAS|(^|_)(KEY|KEY_ID|PAT)$", re.IGNORECASE)
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "oss", "oci"}
"""Protocols of stores that have buckets and no folders."""
LEAST_SECRET = 8  # characters: a shorter value of the environment may be any word

Told = Callable[[int], None]
"""Is called with the number of bytes that were transferred since the last call."""


def is_url(place: object) -> bool:
    """Whether this is a URL, not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(place)) is not None


def file_url(path: Path) -> str:
    """The URL of a folder of this machine, as fsspec reads it: without escapes, so that it may hold spaces."""
    return f"file://{'' if os.sep == '/' else '/'}{path.as_posix()}"


def redacted(text: str) -> str:
    """Text without the secrets that URLs in it (see `plain_urls`) or the environment hold."""
    text = plain_urls(text)
    for name, value in os.environ.items():
        if len(value) >= LEAST_SECRET and value in text and SECRET_NAMES.search(name):
            text = text.replace(value, "***")
    return text


def plain_urls(text: str) -> str:
    """Text with URLs that have no user and password before an `@`, and nothing after a `?`."""
    if "://" not in text:
        return text
    text = re.sub(r"(://)[^/\s@'\"]*:[^/\s@'\"]*@", r"\1***@", text)
    text = re.sub(r"((?:https?|ftp)://)[^/\s@'\"]*@", r"\1***@", text)
    return re.sub(r"(\b[A-Za-z][\w+.-]*://[^\s'\"?]*)\?[^\s'\"]*", r"\1?***", text)


class StoreError(OSError):
    """A store did not do what it was asked; the message is one line without secrets."""


def reason(error: BaseException) -> str:
    """An error of a client in a few words, without secrets."""
    if isinstance(error, StoreError):
        return str(error)
    said = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    text = redacted(said[0] if said else "")[:200]
    plain = isinstance(error, OSError | TimeoutError) and text
    return text if plain else f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def _in_words(*, writing: bool = False) -> Iterator[None]:
    """Context manager: turns whatever a client raises into a StoreError.

    FileNotFoundError stays as it is when reading; when `writing` it means that the bucket is missing.
    """
    try:
        yield
    except (FileNotFoundError, StoreError, UserError) as error:
        if writing and isinstance(error, FileNotFoundError):
            raise StoreError(f"no such place: {reason(error)}") from error
        raise
    except Exception as error:
        raise StoreError(reason(error)) from error


class Store:
    """The files below a URL, by their names relative to it.

    Methods raise StoreError, and FileNotFoundError where a file (or a bucket) is missing. Raises UserError, naming the
    package, if the client for such URLs is not installed, and for a URL of an unknown kind; StoreError if it connects
    at once and can't.
    """

    def __init__(self, url: str):
        self.url = redacted(url.rstrip("/"))  # for people
        self._given = url.rstrip("/")
        self.renew()

    def renew(self) -> None:
        """Makes the client anew, which reads credentials from its files again."""
        import fsspec

        try:
            # a client of its own: others' may be older than a fork, or hold other credentials
            self._files, self._root = fsspec.core.url_to_fs(self._given, skip_instance_cache=True)
        except ImportError as error:
            found = re.search(r"nstall (?:the )?([\w-]+)|requires \"([\w-]+)", str(error))
            package = next(filter(None, found.groups())) if found else ""
            how = f"needs the package {package} (pip install {package})" if package else reason(error)
            raise UserError(f"{self.url}: {how}") from error
        except ValueError as error:
            raise UserError(f"{self.url}: can't be used ({reason(error)})") from error
        except Exception as error:  # some clients connect at once
            raise StoreError(reason(error)) from error
        self._root = self._root.rstrip("/")

    @property
    def is_lasting(self) -> bool:
        """Whether other processes see what is written."""
        return "memory" not in self._protocols

    @property
    def _protocols(self) -> tuple[str, ...]:
        found = self._files.protocol
        return (found,) if isinstance(found, str) else tuple(found)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        with _in_words():
            return bytes(self._files.cat_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file in one request, which object stores do wholly or not at all."""
        with _in_words(writing=True):
            self._in_a_folder(name, lambda: self._files.pipe_file(self._path(name), data))

    def send(self, name: str, file: BinaryIO, size: int, told: Told) -> None:
        """Writes a file of `size` bytes in parts. An open file can be sent although it is removed meanwhile."""
        block = max(BLOCK_BYTES, size // MOST_PARTS)
        with _in_words(writing=True):
            if size <= block:
                data = file.read(size)
                self._in_a_folder(name, lambda: self._files.pipe_file(self._path(name), data))
                told(len(data))
                return
            out = self._in_a_folder(name, lambda: self._files.open(self._path(name), "wb", block_size=block))
            left = size
            try:
                while left and (data := file.read(min(left, block))):
                    out.write(data)
                    left -= len(data)
                    told(len(data))
            except BaseException:
                with contextlib.suppress(Exception):
                    out.discard()  # closing it would make what came so far a file
                    out.closed = True
                raise
            out.close()

    def fetch(self, name: str, path: Path, told: Told) -> None:
        """Copies a file to a path, in blocks."""
        with (
            _in_words(),
            self._files.open(self._path(name), "rb", block_size=BLOCK_BYTES) as file,
            path.open("wb") as to,
        ):
            while data := file.read(BLOCK_BYTES):
                to.write(data)
                told(len(data))
            flush_to_disk(to)

    def open(self, name: str) -> Any:
        """A file to be read in order, whose length is its `size`."""
        with _in_words():
            return self._files.open(self._path(name), "rb", block_size=BLOCK_BYTES)

    def names(self, folder: str = "", depth: int = 8) -> list[str]:
        """The names of all files below a folder, at most so many levels deep; none if there is no such folder."""
        with _in_words():
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._path(folder), detail=True)  # `find` takes a failure for an empty folder
            except FileNotFoundError:
                return []
        names = []
        for entry in found:
            name = entry["name"].rstrip("/").removeprefix(f"{self._root}/")
            if name in (folder, "") or not entry["name"].startswith(f"{self._root}/"):  # a folder may list itself
                continue
            if entry["type"] != "directory":
                names.append(name)
            elif depth > 1:
                names += self.names(name, depth - 1)
        return sorted(names)

    def remove(self, name: str) -> None:
        """Removes a file; one that is gone already is no error."""
        with _in_words(), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def remove_folder(self, name: str) -> None:
        """Removes what is below a folder; one that is gone already is no error."""
        with _in_words(), contextlib.suppress(FileNotFoundError):
            self._files.invalidate_cache()
            self._files.rm(self._path(name), recursive=True)

    def _in_a_folder(self, name: str, action: Callable[[], Any]) -> Any:
        """What `action` returns; a file system that has folders gets the file's if it is missing."""
        try:
            return action()
        except FileNotFoundError as error:
            if OBJECT_STORES.intersection(self._protocols):  # whose clients would create the bucket
                raise StoreError(f"there is no {self._root.partition('/')[0]}, or it can't be seen") from error
            self._files.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
            return action()

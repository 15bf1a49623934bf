"""Examples in shards, for data that outgrows a disk: tar files at a path or URL, read where the order needs them.

A set of shards is a folder, or what a web server shows as one: `NAME.json` lists the tar files of the set NAME with
their numbers of examples, bytes and SHA-256. An example is the files of a shard that share a name up to its first dot
(`00000017.jpg`, `00000017.cls`), as WebDataset has it: any tool that reads tar can look inside or make such shards, an
image stays as compressed as it was, and there is nothing in it that could run. Offsets are read from the shard's own
headers when it is opened, so that the list stays small with any number of examples.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import hashlib
import json
import os
import tarfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from http.client import HTTPException
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from tqdm import tqdm

from .data import Decode, Streamed, Tensors, permutation
from .errors import UserError

FORMAT = "nndist shards 1"
ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 0.5
"""Before the second attempt to fetch a file; it doubles with each."""
READ_TIMEOUT_SECONDS = 20.0
CHUNK_BYTES = 1 << 20


class Example(NamedTuple):
    """One example as it is stored.

    name: where it comes from, for people. files: by what follows the first dot of their names, in lower case, such as
    {"jpg": ..., "cls": b"3"}.
    """

    name: str
    files: dict[str, bytes]


@dataclass(frozen=True)
class Shard:
    """One tar file: its name beside the list, and what must be in it."""

    file: str
    examples: int
    bytes: int
    sha256: str


class Index:
    """The list of a set's shards, read from `<place>/<name>.json`; `place` is a folder or a URL.

    Raises UserError where it can't be had or is no such list.
    """

    def __init__(self, place: str, name: str):
        self.place, self.name = place.rstrip("/"), name
        where = f"{self.place}/{name}.json"
        try:
            text = fetch(where) if self.is_remote else Path(where).expanduser().read_bytes()
            listed = json.loads(text)
            if listed["format"] != FORMAT:
                raise ValueError(f"its format is {listed['format']!r}, not {FORMAT!r}")
            self.classes: list[str] = [str(name) for name in listed["classes"]]
            self.shards = [Shard(**{name: shard[name] for name in Shard.__annotations__}) for shard in listed["shards"]]
            if not self.shards or any(
                s.examples < 1 or "/" in s.file or not s.file.endswith(".tar") for s in self.shards
            ):
                raise ValueError("it lists no shards, an empty one, or one that is no .tar file beside it")
        except (OSError, HTTPException) as error:
            raise UserError(
                f"{where}: the list of the shards can't be read ({reason(error)}); name the folder or URL that has "
                "it, or make shards with launch/shard.py"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: is no list of shards ({reason(error)}); launch/shard.py makes one") from error
        self.starts = [0, *accumulate(shard.examples for shard in self.shards)]  # of a shard's example numbers
        self.fingerprint = hashlib.sha256(text).hexdigest()[:16]

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def is_remote(self) -> bool:
        """Whether the shards are fetched from a server."""
        return self.place.startswith(("http://", "https://"))

    def address(self, shard: int) -> str:
        """The path or URL of a shard."""
        file = self.shards[shard].file
        return f"{self.place}/{urllib.parse.quote(file) if self.is_remote else file}"

    @cached_property
    def shard_of_example(self) -> Tensor:
        """int64 [number of examples]."""
        return torch.repeat_interleave(torch.tensor([shard.examples for shard in self.shards]))


def windowed_order(index: Index, window: int, seed: int, epoch: int, batch_size: int) -> Tensor:
    """The order of an epoch in which the examples at any time come from `window` shards, int64 [number of examples].

    Shards are shuffled; the one in place p is read from time p - window + 1 to p + 1, or as much of that as lies
    between 0 and the epoch's end, its examples at random times in between. So exactly `window` shards are being read at
    any time, and as one ends the next begins. Within a batch the examples are sorted by p modulo `window`, which
    changes no batch: as each process takes a stretch of it, it reads about its part of the shards and not all of them.
    """
    count = len(index.shards)
    window = min(window, count)
    place = torch.empty(count, dtype=torch.int64)
    place[permutation(count, seed, epoch)] = torch.arange(count)
    digest = hashlib.blake2b(f"window/{seed}/{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    of_example = place[index.shard_of_example]
    begin = (of_example - window + 1).clamp_min(0).double()
    end = (of_example + 1).clamp_max(count - window + 1).double()
    times = begin + (end - begin) * torch.rand(len(index), generator=generator, dtype=torch.float64)
    order = times.argsort(stable=True)
    batch = torch.arange(len(index)) // batch_size
    return order[(batch * window + of_example[order] % window).argsort(stable=True)]


class Sharded(Streamed):
    """A set of examples in shards, at a folder or URL; `decode` makes tensors of an Example, in loader processes.

    place, name: see Index. window: how many shards the examples of a batch come from; mixing grows with it, and so does
    what is read or fetched before the first batch. cache: folder for shards that are fetched by URL, shared by all
    processes of a machine. cache_bytes: what it may hold. The next shard is fetched while the present ones are used.

    Raises UserError, naming the file and the remedy, where the list or a shard is missing, where the cache can't hold a
    window, and while reading where a shard can't be fetched or is not what the list says.
    """

    def __init__(
        self, place: str, name: str, decode: Decode, *, num_workers: int, window: int, cache: Path, cache_bytes: int
    ):
        index = Index(place, name)
        store: Store = Fetched(index, cache, cache_bytes, window) if index.is_remote else Local(index)
        super().__init__(Reader(index, store, window), num_workers, decode)
        self.index, self.window = index, window

    def order(self, seed: int, epoch: int, shuffle: bool, batch_size: int) -> Tensor:
        if not shuffle:
            return torch.arange(len(self))
        return windowed_order(self.index, self.window, seed, epoch, batch_size)

    def fingerprint(self) -> str:
        return self.index.fingerprint

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensors]:
        indices = list(indices)
        numbers = torch.cat([torch.empty(0, dtype=torch.int64), *(index.cpu() for index in indices)])
        shards = self.index.shard_of_example[numbers]
        there = copy.copy(self)
        there.dataset = Reader(self.index, self.dataset.store, self.window, list(dict.fromkeys(shards.tolist())))
        return super(Sharded, there).batches(indices)


class Member(NamedTuple):
    """Where a file's bytes lie in a shard."""

    name: str
    kind: str
    offset: int
    size: int


class Reader:
    """Example i of all shards as its files' bytes; keeps open the shards that it read last, one more than a window.

    upcoming: the shards in the order in which they will be needed, so that the next can be fetched ahead.
    """

    def __init__(self, index: Index, store: Store, window: int, upcoming: Sequence[int] = ()):
        self.index, self.store = index, store
        self.limit = min(window, len(index.shards)) + 1
        self.next = dict(pairwise(upcoming))
        self.opened: OrderedDict[int, tuple[BinaryIO, list[list[Member]]]] = OrderedDict()
        self.ahead: int | None = None  # what is to be fetched next
        self.fetching: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fingerprint(self) -> str:
        """See Streamed."""
        return self.index.fingerprint

    def __getitem__(self, number: int) -> Example:
        shard = int(self.index.shard_of_example[number])
        file, examples = self._open(shard)
        members = examples[number - self.index.starts[shard]]
        files = {member.kind: os.pread(file.fileno(), member.size, member.offset) for member in members}
        return Example(f"{self.index.address(shard)}, {members[0].name}", files)

    def _open(self, shard: int) -> tuple[BinaryIO, list[list[Member]]]:
        if shard not in self.opened:
            while len(self.opened) >= self.limit:
                self.opened.popitem(last=False)[1][0].close()
            file = self.store.open(shard)
            self.opened[shard] = file, contents(file, self.index.shards[shard], self.index.address(shard))
            self._fetch_ahead(shard)
        self.opened.move_to_end(shard)
        return self.opened[shard]

    def _fetch_ahead(self, shard: int) -> None:
        """Fetches the shard that will be needed after this one; only in a loader process, which does not fork."""
        if get_worker_info() is None:
            return
        self.ahead = self.next.get(shard)

        def fetch_ahead() -> None:
            while (following := self.ahead) is not None:
                self.ahead = None
                with contextlib.suppress(UserError):  # whoever needs it will say so
                    self.store.open(following).close()

        if self.fetching is None or not self.fetching.is_alive():
            self.fetching = threading.Thread(target=fetch_ahead, daemon=True)
            self.fetching.start()


def contents(file: BinaryIO, shard: Shard, address: str) -> list[list[Member]]:
    """Where the files of a shard's examples lie; raises UserError where they are not as many as the list says."""
    examples: dict[str, list[Member]] = {}
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    found = examples.setdefault(f"{folder}/{stem}", [])
                    found.append(Member(member.name, kind.lower(), member.offset_data, member.size))
    except tarfile.TarError as error:
        raise UserError(f"{address}: is no tar file ({error}); make the shards anew with launch/shard.py") from error
    if len(examples) != shard.examples:
        raise UserError(
            f"{address}: holds {len(examples)} examples and its list says {shard.examples}; make the shards anew with "
            "launch/shard.py"
        )
    return list(examples.values())


class Store:
    """Gives shards as open files."""

    def open(self, shard: int) -> BinaryIO:
        """A shard, whole and with the SHA-256 of its list; raises UserError otherwise."""
        raise NotImplementedError


class Local(Store):
    """Shards in a folder. All are looked for at once, so that a missing one is said before the training."""

    def __init__(self, index: Index):
        self.index = index
        for number, shard in enumerate(index.shards):
            path = self._path(number)
            found = path.stat().st_size if path.is_file() else None
            if found != shard.bytes:
                what = "is missing" if found is None else f"has {found:,} bytes and its list says {shard.bytes:,}"
                raise UserError(f"{path}: {what}; copy it again, or make the shards anew with launch/shard.py")

    def _path(self, shard: int) -> Path:
        return Path(self.index.address(shard)).expanduser()

    def open(self, shard: int) -> BinaryIO:
        path, listed = self._path(shard), self.index.shards[shard]
        try:
            file = path.open("rb")
        except OSError as error:
            raise UserError(f"{path}: can't be read ({reason(error)}); copy it again") from error
        if (problem := damage(file, listed)) is not None:
            file.close()
            raise UserError(f"{path}: damaged, {problem}; copy it again, or make the shards anew with launch/shard.py")
        return file


class Fetched(Store):
    """Shards of a server, kept in a folder of bounded size that all processes of a machine share.

    Those opened longest ago go first; a process that still reads one keeps it open. Whoever needs a shard first fetches
    it, the others wait; what was fetched appears in one rename, after its SHA-256 was found right.
    """

    def __init__(self, index: Index, cache: Path, cache_bytes: int, window: int):
        self.index, self.bytes = index, cache_bytes
        self.root = cache.expanduser()
        self.folder = self.root / hashlib.sha256(index.place.encode()).hexdigest()[:16]
        at_a_time = min(window, len(index.shards)) + 2  # a window, the next, and one that is about to go
        needed = sum(sorted((shard.bytes for shard in index.shards), reverse=True)[:at_a_time])
        if needed > cache_bytes:
            raise UserError(
                f"--cache-gigabytes {cache_bytes / 1e9:g}: a window of {window} shards of {index.place} takes "
                f"{needed / 1e9:.3g}; give at least that, or fewer shards with --window"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--data-dir: {self.folder} can't be made ({reason(error)}); name another folder"
            ) from error

    def open(self, shard: int) -> BinaryIO:
        listed, address = self.index.shards[shard], self.index.address(shard)
        path = self.folder / listed.file
        try:
            if (file := kept(path, listed)) is not None:
                return file
            with locked(self.folder / f".{listed.file}.lock"):
                return kept(path, listed) or self._fetch(address, path, listed)
        except (OSError, HTTPException) as error:
            if is_local(error):
                raise UserError(
                    f"{self.folder}: can't hold {listed.file} ({reason(error)}); make room, or name another folder "
                    "with --data-dir"
                ) from error
            raise UserError(
                f"{address}: could not be fetched ({reason(error)}); see to the server and start the same command "
                "again: the run goes on"
            ) from error

    def _fetch(self, address: str, path: Path, listed: Shard) -> BinaryIO:
        part = path.with_name(f".{path.name}.part")  # of whoever holds the shard's lock

        def attempt(response: Iterable[bytes]) -> None:
            with part.open("r+b") as file:
                for chunk in response:
                    file.write(chunk)
                    if file.tell() > listed.bytes:
                        break
                file.truncate()
                if (problem := damage(file, listed)) is not None:
                    raise OSError(problem)
                os.fsync(file.fileno())
            part.replace(path)

        try:
            with locked(self.root / ".room.lock"):
                self._make_room(listed.bytes)
                with part.open("wb") as file:
                    file.truncate(listed.bytes)  # counted by whoever makes room next
            fetch(address, attempt)
            return path.open("rb")
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, wanted: int) -> None:
        """Removes the shards opened longest ago, of whichever set, until `wanted` bytes more fit in."""
        found = []
        for path in self.root.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for changed, size, path in sorted(found):
            if total + wanted <= self.bytes:
                return
            # what is only just being fetched stays; what a killed process left in the middle of it does not
            if path.suffix == ".tar" or (path.suffix == ".part" and time.time() - changed / 1e9 > 3600):
                path.unlink(missing_ok=True)
                total -= size


def kept(path: Path, listed: Shard) -> BinaryIO | None:
    """A shard in the cache, if it is there and whole."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    if damage(file, listed) is not None:
        file.close()
        return None
    with contextlib.suppress(OSError):  # another process may make room just now
        os.utime(path)  # the one opened last goes last
    return file


def damage(file: BinaryIO, listed: Shard) -> str | None:
    """What is wrong with the bytes of an open shard; None if nothing is."""
    size = os.fstat(file.fileno()).st_size
    if size != listed.bytes:
        return f"{size:,} bytes came and its list says {listed.bytes:,}"
    file.flush()
    file.seek(0)
    found = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    return (
        None if found == listed.sha256 else f"its SHA-256 is {found[:12]}... and its list says {listed.sha256[:12]}..."
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other threads and processes out; the system lets go when this one ends, however."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch(address: str, take: Callable[[Iterable[bytes]], Any] = b"".join) -> Any:
    """What `take` makes of the chunks at a URL; OSError or HTTPException when they don't come in ATTEMPTS attempts.

    An OSError of `take` is a failed attempt too. What the server says it does not have or give is not asked for again.
    """
    pause = FIRST_PAUSE_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            request = urllib.request.Request(address, headers={"User-Agent": "nndist"})
            with urllib.request.urlopen(request, timeout=READ_TIMEOUT_SECONDS) as response:
                expected = response.length

                def chunks(response: Any = response, expected: int | None = expected) -> Iterator[bytes]:
                    got = 0
                    while chunk := response.read1(CHUNK_BYTES):
                        got += len(chunk)
                        yield chunk
                    if expected is not None and got < expected:
                        raise OSError(f"{got:,} of {expected:,} bytes came")

                return take(chunks())
        except (OSError, HTTPException) as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429)
            if final or is_local(error) or attempt == ATTEMPTS:
                raise
        time.sleep(pause)
        pause *= 2
    raise AssertionError("unreachable")


def is_local(error: BaseException) -> bool:
    """Whether an error is that of a file or of a disk here, not of the server or the way to it."""
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


# Making shards.


def write_shards(
    folder: Path,
    name: str,
    classes: Sequence[str],
    examples: Sequence[Callable[[], Mapping[str, bytes]]],
    *,
    shard_bytes: int,
    seed: int = 0,
    progress: bool = True,
) -> list[Shard]:
    """Writes examples as `<name>-00000.tar`, ... of about `shard_bytes` each, and their list `<name>.json` last.

    `examples[i]()` gives the files of example i by what follows the dot of their names. They are shuffled once, so that
    any shard is a sample of all; equal input gives equal bytes. Raises UserError where there are none, or where
    `folder` already holds a list of that name.
    """
    target = folder / f"{name}.json"
    if not examples:
        raise UserError(f"{folder}: there are no examples of {name!r} to write")
    if target.exists():
        raise UserError(f"{target}: exists already; remove that set, or write to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    tar, begun = BytesIO(), 0  # the shard in the making, and its examples
    numbers = permutation(len(examples), seed, 0).tolist()

    def finish() -> None:
        tar.write(b"\0" * (2 * tarfile.BLOCKSIZE))  # the end of a tar file
        data = tar.getvalue()
        file = f"{name}-{len(shards):05d}.tar"
        write_whole(folder / file, data)
        shards.append(Shard(file, begun, len(data), hashlib.sha256(data).hexdigest()))

    for place, number in enumerate(tqdm(numbers, desc=f"{name} shards", unit="example", disable=not progress, delay=2)):
        files = examples[number]()
        size = sum(tarfile.BLOCKSIZE * (2 + len(data) // tarfile.BLOCKSIZE) for data in files.values())
        if begun and tar.tell() + size > shard_bytes:
            finish()
            tar, begun = BytesIO(), 0
        for kind, data in files.items():
            header = tarfile.TarInfo(f"{place:08d}.{kind}")
            header.size = len(data)
            tar.write(header.tobuf(tarfile.USTAR_FORMAT))
            tar.write(data + b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        begun += 1
    finish()
    listed = {"format": FORMAT, "classes": list(classes), "shards": [asdict(shard) for shard in shards]}
    write_whole(target, (json.dumps(listed, indent=1) + "\n").encode())
    return shards


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is seen either whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)

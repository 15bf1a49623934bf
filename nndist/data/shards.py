"""Examples in shards, for data that outgrows a disk: tar files at a path or URL, read as the order needs them.

A set of shards is a folder, local or on a web server: `NAME.json` lists the tar files of the set NAME with their
numbers of examples, bytes and SHA-256. An example is the files of a shard that share a name up to its first dot
(`00000017.jpg`, `00000017.cls`), as in WebDataset: any tar tool can read or make such shards, an image stays
compressed, and nothing in a shard is code. Offsets are read from the shard's own headers when it is opened, so the list
stays small with any number of examples.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..errors import UserError
from ..files import printable, write_json, write_whole
from ..progress import bar
from .batches import Batch
from .examples import Decode
from .sets import Streamed, permutation
from .shard_store import FORMAT, Fetched, Index, Local, Shard, Store


class Example(NamedTuple):
    """One stored example.

    name: where it comes from, for people. files: their bytes by the lower-case extension after the first dot, such as
    {"jpg": ..., "cls": b"3"}.
    """

    name: str
    files: dict[str, bytes]


def windowed_order(index: Index, window: int, seed: int, epoch: int, batch_size: int) -> Tensor:
    """The order of an epoch that reads `window` shards at any time, int64 [number of examples].

    Shards are shuffled; the one in place p is read from time p - window + 1 to p + 1, clipped to 0 and the epoch's end,
    its examples at random times in between. So exactly `window` shards are being read at any time, and as one ends the
    next begins. Within a batch the examples are sorted by p modulo `window`, which changes no batch: as each process
    takes a contiguous part of it, it reads about its part of the shards and not all of them.
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
    """Examples in shards, in a folder or at a URL; `decode` turns an Example into tensors, in worker processes.

    place, name: see Index. window: how many shards the examples of a batch come from; mixing grows with it, and so does
    what is read or fetched before the first batch. cache: folder for shards that are fetched by URL, shared by all
    processes of a machine. cache_bytes: its size limit. The next shard is fetched while the current ones are used.

    Raises UserError, naming the file and the remedy, if the list or a shard is missing, if the cache can't hold a
    window, and while reading if a shard can't be fetched or differs from the list.
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

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        indices = list(indices)
        numbers = torch.cat([torch.empty(0, dtype=torch.int64), *(index.cpu() for index in indices)])
        shards = self.index.shard_of_example[numbers]
        there = copy.copy(self)
        there.dataset = Reader(self.index, self.dataset.store, self.window, list(dict.fromkeys(shards.tolist())))
        return super(Sharded, there).batches(indices)


class Member(NamedTuple):
    """The position of a file's bytes in a shard."""

    name: str
    kind: str
    offset: int
    size: int


class Reader:
    """Example i of all shards as its files' bytes; keeps the last shards that it read open, one more than a window.

    upcoming: the shards in the order in which they will be needed, to prefetch the next.
    """

    def __init__(self, index: Index, store: Store, window: int, upcoming: Sequence[int] = ()):
        self.index, self.store = index, store
        self.limit = min(window, len(index.shards)) + 1
        self.next = dict(pairwise(upcoming))
        self.opened: OrderedDict[int, tuple[BinaryIO, list[list[Member]]]] = OrderedDict()
        self.ahead: int | None = None  # the shard to prefetch
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
        files = {member.kind: _read_at(file, member.size, member.offset) for member in members}
        return Example(f"{self.index.address(shard)}, {printable(members[0].name)}", files)

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
        """Prefetches the shard needed after this one; only in a worker process, which does not fork."""
        if get_worker_info() is None:
            return
        self.ahead = self.next.get(shard)

        def fetch_ahead() -> None:
            while (following := self.ahead) is not None:
                self.ahead = None
                with contextlib.suppress(UserError):  # reading it will raise it again
                    self.store.open(following).close()

        if self.fetching is None or not self.fetching.is_alive():
            self.fetching = threading.Thread(target=fetch_ahead, daemon=True)
            self.fetching.start()


def _read_at(file: BinaryIO, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):  # forked workers share a file's position
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)
    return file.read(size)


def contents(file: BinaryIO, shard: Shard, address: str) -> list[list[Member]]:
    """The positions of a shard's examples' files; raises UserError if there are not as many examples as listed."""
    examples: dict[str, list[Member]] = {}
    size = os.fstat(file.fileno()).st_size
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    if not 0 <= member.size <= size - member.offset_data:
                        raise tarfile.ReadError(f"{printable(member.name)} has {member.size:,} bytes of {size:,}")
                    folder, _, name = member.name.rpartition("/")
                    stem, _, kind = name.partition(".")
                    members = examples.setdefault(f"{folder}/{stem}", [])
                    members.append(Member(member.name, kind.lower(), member.offset_data, member.size))
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:  # of sizes up to 2^80
        why = str(error) or type(error).__name__
        raise UserError(f"{address}: is not a tar file ({why}); recreate the shards with nndist shard") from error
    if len(examples) != shard.examples:
        raise UserError(
            f"{address}: holds {len(examples)} examples and its list says {shard.examples}; recreate the shards with "
            "nndist shard"
        )
    return list(examples.values())


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

    `examples[i]()` returns the files of example i by extension. They are shuffled once, so any shard is a sample of
    all; equal input gives equal bytes. Raises UserError if there are none, or if `folder` already holds a list of that
    name.
    """
    target = folder / f"{name}.json"
    if not examples:
        raise UserError(f"{folder}: there are no examples of {name!r} to write")
    if target.exists():
        raise UserError(f"{target}: exists already; remove that set, or write to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    tar, begun = BytesIO(), 0  # the shard being written, and its number of examples
    numbers = permutation(len(examples), seed, 0).tolist()

    def finish() -> None:
        tar.write(b"\0" * (2 * tarfile.BLOCKSIZE))  # the end of a tar file
        data = tar.getvalue()
        file = f"{name}-{len(shards):05d}.tar"
        write_whole(folder / file, data)
        shards.append(Shard(file, begun, len(data), hashlib.sha256(data).hexdigest()))

    shown = bar(None, f"{name} shards", shown=progress, leave=True, iterable=numbers, unit="example", delay=2)
    for place, number in enumerate(shown):
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
    write_json(target, listed)
    return shards

"""Writing a checkpoint: hidden while it is written, published in one rename. Its format is that of `checkpoint`."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..errors import UserError
from .checkpoint import FORMAT, MANIFEST, Checkpoint, folder_name, own_hash, plain
from .reading import checkpoints_in

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The dtypes that a state may hold, by their safetensors names."""


def publish(root: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint and publishes it in one rename; if that fails, raises OSError and leaves nothing behind."""
    from safetensors.torch import save

    temporary = begin(root, checkpoint.step)
    try:
        written = {}
        for name, tensors in checkpoint.tensors.items():
            data = save(plain(tensors))
            written[name] = write_file(temporary / name, data)
        return finish(temporary, checkpoint.step, written, checkpoint.state)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin(root: Path, step: int) -> Path:
    """Creates the hidden folder that a checkpoint's files are written to; raises OSError."""
    temporary = root / f".{folder_name(step)}.part"
    root.mkdir(exist_ok=True)  # if the run's folder was removed, it must not silently reappear
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process killed while writing
    temporary.mkdir()
    return temporary


def finish(temporary: Path, step: int, written: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
    """Adds the manifest to the files in the folder and publishes it under its name; raises OSError.

    written: what `write_file` or `TensorFile.close` returned for each file.
    """
    root = temporary.parent
    place = root / folder_name(step)
    manifest = {"format": FORMAT, "step": step, "files": written, "state": state}
    manifest["sha256"] = own_hash(manifest)
    data = json.dumps(manifest, indent=1, allow_nan=False).encode()
    try:
        files.check_extent(data)  # what can't be read again must not replace what can
    except ValueError as error:
        raise OSError(
            errno.EFBIG, f"{MANIFEST} {error}: keep large lists and texts out of the recipe's state"
        ) from error
    files.write(temporary / MANIFEST, data)
    files.sync_folder(temporary)
    if place.exists():  # the same step again, after resuming from an older checkpoint
        aside = root / f".{place.name}.old"
        shutil.rmtree(aside, ignore_errors=True)
        files.move(place, aside)
        files.move(temporary, place)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        files.move(temporary, place)
    files.sync_folder(root)
    return place


def write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Writes one file of a checkpoint and returns its manifest entry; raises OSError."""
    files.write(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


class TensorFile:
    """A safetensors file written one tensor at a time, so that only one is in memory.

    like: tensors with the shapes and dtypes to be written, by name; `add` takes them in this order. Raises OSError.
    """

    def __init__(self, path: Path, like: Mapping[str, Tensor]):
        header: dict[str, Any] = {}
        end = 0
        for name, tensor in like.items():
            start, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # readers map tensors in place, so they must be aligned
        self.path = path
        self._length = 8 + len(text) + end
        self._hash = hashlib.sha256()
        self._file = path.open("wb")
        self._add(len(text).to_bytes(8, "little") + text)

    def add(self, tensor: Tensor) -> None:
        """Writes the next tensor, which must be on the CPU."""
        self._add(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)

    def close(self) -> dict[str, Any]:
        """Syncs the file to disk, reads it back and returns its manifest entry."""
        files.flush_to_disk(self._file)
        self._file.close()
        with self.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self._hash.hexdigest() or self.path.stat().st_size != self._length:
            raise OSError(errno.EIO, "read back damaged", str(self.path))
        return {"bytes": self._length, "sha256": found}

    def abandon(self) -> None:
        """Closes the file after an error."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _add(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)


def part_name(name: str, number: int, count: int) -> str:
    """The name of part `number` (from 1) of `count` parts of the file called `name`."""
    return f"{name.removesuffix('.safetensors')}-{number:05d}-of-{count:05d}.safetensors" if count > 1 else name


def index_file(like: Mapping[str, Tensor], places: Mapping[str, str]) -> bytes:
    """The index of a file in several parts: which part holds which tensor."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in like.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    return (json.dumps(index, indent=1) + "\n").encode()


class Writer:
    """Publishes checkpoints in a background thread, one at a time; errors are raised by the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Waits for the previous job, then starts this one."""
        self.wait()

        def run() -> None:
            try:
                job()
            except Exception as error:  # whatever it is: a checkpoint is missing, and the training must know
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint writer")
        self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is being written; raises a failed job's error, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def clear_leftovers(root: Path, saved: Sequence[int]) -> None:
    """Removes what a killed process was about to remove or rename: hidden folders, and steps that are not in `saved`.

    Steps after the last saved one stay: they are damaged, and a person may want to look at them.
    """
    for path in root.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for step, path in checkpoints_in(root):
        if step < max(saved, default=0) and step not in saved:
            files.remove_folder(path)


def preflight(folder: Path, num_bytes: int) -> None:
    """Raises UserError if `folder` can't be written or its disk has less than `num_bytes` free."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        files.write(probe, b"x" * 4096)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"{folder}: can't be written ({error.strerror}); make room (df -h, df -i), or choose another --runs-dir"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    if free < num_bytes:
        raise UserError(
            f"{folder}: {free / 2**20:,.0f} MiB free where checkpoints take {num_bytes / 2**20:,.0f} MiB; "
            "make room or choose another --runs-dir"
        )


def publish_file(path: Path, tensors: Mapping[str, Tensor], *, sealed: bool = False) -> None:
    """Writes tensors as one safetensors file, completely or not at all; raises OSError.

    sealed: adds their hash to the metadata, so that `read_tensors` notices a change.
    """
    from safetensors.torch import save

    data = save(plain(tensors))
    if sealed:
        data = save(plain(tensors), {"sha256": hashlib.sha256(data).hexdigest()})
    files.write_whole(path, data)

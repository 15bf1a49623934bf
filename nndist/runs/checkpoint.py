"""The format of a checkpoint: safetensors and JSON in a folder that appears complete or not at all.

    checkpoints/step-00004690/   model.safetensors   ema.safetensors (with --ema-decay)   manifest.json

The manifest is written last; it holds every file's length and SHA-256, and its own hash. If several processes write,
`model-00001-of-00002.safetensors` and so on replace `model.safetensors`: each holds some of the tensors, unsharded, and
`model.safetensors.index.json` maps tensors to files (as Hugging Face's does).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files, machine
from ..errors import UserError
from ..files import Each, open_regular, parse_json, shown
from .reading import checkpoints_in

FORMAT = 1
MANIFEST = "manifest.json"
RECIPE = "recipe.py"
"""The copy of the recipe's source in a run's folder."""
INDEX = ".index.json"
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
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file: the library's own limit
MEMORY_BYTES = machine.memory()
MANIFEST_KIND = {
    "format": int,
    "step": int,
    "files": Each({"bytes": int, "sha256": str}),
    "state": dict,
    "sha256": str,
}
STATE_KIND = {
    "epoch": int,
    "batch": int,
    "batch_size": int,
    "accumulate?": Each(int),
    "examples_in_window": int,
    "counted_in_window?": Each(int),
    "learning_rates?": {"factors": Each([float]), "schedulers": dict},
    "extra_states?": dict,
    "scores": Each((float, None)),
    "best": (None, {"step": int, "scores": Each((float, None))}),
    "evaluations_since_best": int,
    "saved": [int],
    "metrics_bytes": int,
    "metrics_chain?": str,
    "optimizer": Each({"class": str, "groups": [{"params": [str]}], "values": dict}),
    "scaler": (None, dict),
    "ranks": [{"random": dict, "window": Each([float]), "python?": list}],
    "world_size": int,
    "fields": dict,
    "source_sha256?": str,
    "data": str,
    "fingerprint?": (str, None),
    "settings?": {"seed": int, "precision": str},
}
"""What a state must hold to resume from it (see files.check)."""
STATE_FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors")


class DamagedCheckpoint(Exception):
    """The checkpoint must not be used; the message names the file and the damage."""


@dataclass
class Checkpoint:
    """The contents of a checkpoint.

    step: optimizer steps taken. tensors: by file and name, such as ["model.safetensors"]["fc1.weight"], on the CPU.
    state: everything else, as JSON values.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)


def folder_name(step: int) -> str:
    """The name of the folder for the checkpoint after optimizer step `step`."""
    return f"step-{step:08d}"


def weights_file(path: Path) -> Path:
    """The file with a checkpoint's weights: model.safetensors, or the index if they are in several files."""
    index = path / f"model.safetensors{INDEX}"
    return index if index.exists() else path / "model.safetensors"


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
    manifest["sha256"] = _own_hash(manifest)
    files.write(temporary / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode())
    files.sync_folder(temporary)
    if place.exists():  # the same step again, after resuming from an older checkpoint
        aside = root / f".{place.name}.old"
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
        temporary.rename(place)
        shutil.rmtree(aside)
    else:
        temporary.rename(place)
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
            shutil.rmtree(path, ignore_errors=True)


def newest_good(root: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Returns the newest intact checkpoint of a run, without its tensors, and reports the damage of each newer one.

    Returns None if there is no checkpoint. If all are damaged, raises UserError and deletes nothing: silently starting
    again would throw a training away.
    """
    reasons = []
    for _, path in reversed(checkpoints_in(root)):
        try:
            return check_state(read(path, nothing))
        except DamagedCheckpoint as damage:
            say(f"damaged checkpoint: {damage}")
            reasons.append(str(damage))
    if reasons:
        raise UserError(
            f"{root}: every checkpoint is damaged ({'; '.join(reasons)}); restore one from a copy, or start another "
            "run with another --run"
        )
    return None


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


def as_it_is(file: str, name: str, tensor: Tensor) -> Tensor:
    """For `read`: keeps the tensor."""
    return tensor


def nothing(file: str, name: str, tensor: Tensor) -> Tensor:
    """For `read`: checks the tensor without keeping it."""
    return tensor.new_empty(0)


def read(path: Path, keep: Callable[[str, str, Tensor], Tensor] = as_it_is) -> Checkpoint:
    """Reads a checkpoint and verifies every byte; raises DamagedCheckpoint.

    keep: maps (file, name, tensor) to what is kept, where `file` is the name in an unsharded checkpoint. Only one file
    is in memory at a time.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    manifest = _read_manifest(path)
    if unnamed := sorted(there.name for there in path.glob("*.safetensors") if there.name not in manifest["files"]):
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: does not name {shown(unnamed[0])}, which is there")
    tensors: dict[str, dict[str, Tensor]] = {}
    indices: dict[str, dict[str, str]] = {}
    places: dict[str, dict[str, str]] = {}
    for name, expected in manifest["files"].items():
        if Path(name).name != name or (path / name).is_symlink():
            raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: names {shown(name)}, which is not a file of this folder")
        data = _read_file(path, name, expected["bytes"])
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise DamagedCheckpoint(f"{path.name}/{name}: its content is not what was written (SHA-256 differs)")
        part = re.fullmatch(r"(.+)-\d{5}-of-\d{5}(\.safetensors)", name)
        whole = "".join(part.groups()) if part else name
        try:
            if name.endswith(INDEX):
                indices[name.removesuffix(INDEX)] = parse_json(data, {"weight_map": Each(str)})["weight_map"]
                continue
            check_header(data)
            found = load(data)
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DamagedCheckpoint(f"{path.name}/{name}: not a safetensors file: {error}") from error
        del data
        of_whole = tensors.setdefault(whole, {})
        while found:
            key, tensor = found.popitem()
            of_whole[key] = keep(whole, key, tensor)
            if part:
                places.setdefault(whole, {})[key] = name
    for whole in indices.keys() | places.keys():
        if indices.get(whole) != places.get(whole):
            raise DamagedCheckpoint(f"{path.name}/{whole}{INDEX}: does not name what the files hold")
    return Checkpoint(
        manifest["step"], {name: dict(sorted(found.items())) for name, found in tensors.items()}, manifest["state"]
    )


def _read_file(path: Path, name: str, size: int) -> bytes:
    """Returns the bytes of a checkpoint's file of the expected size; raises DamagedCheckpoint."""
    try:
        # never memory-mapped: a file truncated later would kill the process
        with open_regular(path / name, follow=False) as file:
            found = os.fstat(file.fileno()).st_size
            if found == size > MEMORY_BYTES:  # a sparse file takes no space on disk
                raise DamagedCheckpoint(f"{path.name}/{name}: {found:,} bytes, more than this machine's memory")
            data = (
                file.read() if found == size else b""
            )  # a file that is too long is not read: it may not fit in memory
    except OSError as error:
        raise DamagedCheckpoint(f"{path.name}/{name}: {error.strerror}") from error
    if found != size or len(data) != size:
        raise DamagedCheckpoint(f"{path.name}/{name}: {found:,} bytes where {size:,} were written")
    return data


def check_header(data: bytes) -> None:
    """Raises ValueError if the header's length rules out a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(f"a header of {length:,} bytes in {len(data):,}")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = parse_json(files.read_bytes(path / MANIFEST, follow=False), MANIFEST_KIND)
    except OSError as error:
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: {error.strerror}") from error
    except ValueError as error:
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: not a manifest ({error})") from error
    if manifest["sha256"] != _own_hash(manifest):
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: its content is not what was written (SHA-256 differs)")
    if manifest["format"] != FORMAT:
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: format {manifest['format']}; this version reads {FORMAT}")
    if folder_name(manifest["step"]) != path.name:
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: belongs to step {manifest['step']}")
    return manifest


def check_state(found: Checkpoint) -> Checkpoint:
    """Returns the checkpoint if its state is complete; raises DamagedCheckpoint otherwise."""
    try:
        files.check(found.state, STATE_KIND)
    except ValueError as error:
        raise DamagedCheckpoint(f"{folder_name(found.step)}/{MANIFEST}: its state {error}") from error
    for name in STATE_FILES:
        if name not in found.tensors:
            raise DamagedCheckpoint(f"{folder_name(found.step)}/{MANIFEST}: names no {name}")
    return found


def network_tensors(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The networks' states in one dict: by name, or "<network>.<name>" if there are several networks."""
    if len(states) == 1:
        return dict(next(iter(states.values())))
    return {f"{network}.{name}": tensor for network, state in states.items() for name, tensor in state.items()}


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Raises DamagedCheckpoint for the first difference in names, shapes or dtypes."""
    for name in [*expected, *found]:
        if name not in found:
            raise DamagedCheckpoint(f"{where}: lacks {name}")
        if name not in expected:
            raise DamagedCheckpoint(f"{where}: holds {name}, which this recipe does not have")
        for what in ("shape", "dtype"):
            ours, theirs = getattr(expected[name], what), getattr(found[name], what)
            if ours != theirs:
                raise DamagedCheckpoint(f"{where}: {name} has {what} {_text(theirs)} where {_text(ours)} is expected")


def _text(value: Any) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value)


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU that share no memory, as safetensors requires."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in sorted(tensors.items())
    }


def read_tensors(path: Path, most: int = 1 << 32) -> dict[str, Tensor]:
    """Reads a safetensors file's tensors by name; raises OSError, and ValueError if it is invalid or was changed."""
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    data = files.read_bytes(path, most)
    try:
        check_header(data)
        tensors = load(data)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__") or {}
    expected = metadata.get("sha256", "" if metadata and "format" not in metadata else None)  # "": its name was changed
    if expected is not None and hashlib.sha256(save(tensors)).hexdigest() != expected:
        raise ValueError("its content is not what was written (SHA-256 differs)")
    return tensors


def publish_file(path: Path, tensors: Mapping[str, Tensor], *, sealed: bool = False) -> None:
    """Writes tensors as one safetensors file, completely or not at all; raises OSError.

    sealed: adds their hash to the metadata, so that `read_tensors` notices a change.
    """
    from safetensors.torch import save

    data = save(plain(tensors))
    if sealed:
        data = save(plain(tensors), {"sha256": hashlib.sha256(data).hexdigest()})
    files.write_whole(path, data)


def _own_hash(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()

"""The format of a checkpoint: safetensors and JSON in a folder that is published whole or not at all.

    checkpoints/step-00004690/   model.safetensors   ema.safetensors (with --ema-decay)   manifest.json

The manifest comes last and holds every file's length and SHA-256, and its own.
"""

from __future__ import annotations

import contextlib
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
from torch import Tensor, nn

from .errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
RECIPE = "recipe.py"
"""The copy of the recipe's text beside a run's checkpoints."""


class DamagedCheckpoint(Exception):
    """A checkpoint that must not be used; the message names the file and what is wrong with it."""


@dataclass
class Checkpoint:
    """What a checkpoint holds: tensors by file and name, and everything that is no tensor in `state`."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)


def folder_name(step: int) -> str:
    """The folder of the checkpoint after optimizer step `step`."""
    return f"step-{step:08d}"


def listed(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every published checkpoint, the newest last; by the number, not by its spelling."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)


def publish(root: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint and gives it its name in one rename; raises OSError and leaves nothing where that fails."""
    from safetensors.torch import save

    root.mkdir(parents=True, exist_ok=True)
    place = root / folder_name(checkpoint.step)
    temporary = root / f".{place.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed while it wrote
    temporary.mkdir()
    try:
        files = {}
        for name, tensors in checkpoint.tensors.items():
            data = save(plain(tensors))
            _write(temporary / name, data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest = {"format": FORMAT, "step": checkpoint.step, "files": files, "state": checkpoint.state}
        manifest["sha256"] = _own_hash(manifest)
        _write(temporary / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode())
        _sync_folder(temporary)
        if place.exists():  # the same step again, by a run that went back to an older checkpoint
            aside = root / f".{place.name}.old"
            shutil.rmtree(aside, ignore_errors=True)
            place.rename(aside)
            temporary.rename(place)
            shutil.rmtree(aside)
        else:
            temporary.rename(place)
        _sync_folder(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return place


class Writer:
    """Publishes checkpoints in the background, one at a time; an error there is raised at the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Waits for the job before, then starts this one."""
        self.wait()

        def run() -> None:
            try:
                job()
            except Exception as error:  # whatever it is, a checkpoint is missing and the training must know
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint writer")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written; raises the error of a job that failed, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def clear_leftovers(root: Path, saved: Sequence[int]) -> None:
    """Removes what a killed process was about to remove or rename: parts, and steps before the last in none of `saved`.

    What is newer than the last saved step is damaged, and stays for a person to look at.
    """
    for path in root.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for step, path in listed(root):
        if step < max(saved) and step not in saved:
            shutil.rmtree(path, ignore_errors=True)


def newest_good(root: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is whole; what is wrong with each newer one is said in a line.

    None where there is none at all. Raises UserError, deleting nothing, where there are some and all are damaged: to
    start from the beginning in silence would throw a training away.
    """
    reasons = []
    for _, path in reversed(listed(root)):
        try:
            return read(path)
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
    """Raises UserError where `folder` can't be written or its disk lacks `num_bytes` of space."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        _write(probe, b"x" * 4096)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); choose another --runs-dir") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    if free < num_bytes:
        raise UserError(
            f"{folder}: {free / 2**20:,.0f} MiB free where checkpoints take {num_bytes / 2**20:,.0f} MiB; "
            "make room or choose another --runs-dir"
        )


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint and checks every byte of it; raises DamagedCheckpoint."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    manifest = _read_manifest(path)
    tensors = {}
    for name, expected in manifest["files"].items():
        if Path(name).name != name or (path / name).is_symlink():
            raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: names {name!r}, which is not a file of this folder")
        try:
            data = (path / name).read_bytes()  # never mapped: a file cut short later would kill the process
        except OSError as error:
            raise DamagedCheckpoint(f"{path.name}/{name}: {error.strerror}") from error
        if len(data) != expected["bytes"]:
            raise DamagedCheckpoint(f"{path.name}/{name}: {len(data):,} bytes where {expected['bytes']:,} were written")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise DamagedCheckpoint(f"{path.name}/{name}: its content is not what was written (SHA-256 differs)")
        try:
            tensors[name] = load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise DamagedCheckpoint(f"{path.name}/{name}: not a safetensors file: {error}") from error
    return Checkpoint(manifest["step"], tensors, manifest["state"])


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes(), object_pairs_hook=_no_duplicates, parse_constant=_no_nan)
        if manifest["sha256"] != _own_hash(manifest):
            raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: its content is not what was written (SHA-256 differs)")
        if manifest["format"] != FORMAT:
            raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: format {manifest['format']}; this version reads {FORMAT}")
        if folder_name(manifest["step"]) != path.name:
            raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: belongs to step {manifest['step']}")
    except OSError as error:
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: not a manifest ({error})") from error
    return manifest


def network_tensors(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The networks' states under plain names; where there are several networks, under "<network>.<name>"."""
    if len(states) == 1:
        return dict(next(iter(states.values())))
    return {f"{network}.{name}": tensor for network, state in states.items() for name, tensor in state.items()}


def load_networks(networks: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors that `network_tensors` made into the networks, after checking every name, shape and type.

    Raises DamagedCheckpoint and changes nothing where one differs: load_state_dict would cast in silence.
    """
    own = network_tensors({name: network.state_dict() for name, network in networks.items()})
    check_tensors(own, tensors, "model.safetensors")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Raises DamagedCheckpoint, naming the first difference in names, shapes or types."""
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
    """Copies on the CPU, contiguous, none sharing memory with another: what safetensors accepts."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in sorted(tensors.items())
    }


def publish_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as one safetensors file, whole or not at all; raises OSError."""
    from safetensors.torch import save

    part = path.with_name(f".{path.name}.part")
    try:
        _write(part, save(plain(tensors)))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never part of one."""
    write_whole(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never part of one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    _write(part, data)
    part.replace(path)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_hash(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _no_nan(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")

"""The format of a checkpoint: safetensors and JSON in a folder that appears complete or not at all.

    checkpoints/step-00004690/
        model.safetensors   optimizer.safetensors   random.safetensors   manifest.json
        ema.safetensors (with --ema-decay)   python.safetensors, own.safetensors (if the recipe needs them)

The manifest is written last; it holds every file's length and SHA-256, and its own hash. If several processes write,
`model-00001-of-00002.safetensors` and so on replace `model.safetensors`: each holds some of the tensors, unsharded, and
`model.safetensors.index.json` maps tensors to files (as Hugging Face's does).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files, machine
from ..errors import UserError
from ..files import Each, open_regular, parse_json, shown
from .manifest import FORMAT, MANIFEST, DamagedCheckpoint, folder_name, own_hash, parse_manifest
from .reading import checkpoints_in

__all__ = ["FORMAT", "MANIFEST", "DamagedCheckpoint", "checkpoints_in", "folder_name", "own_hash"]

RECIPE = "recipe.py"
"""The copy of the recipe's source in a run's folder."""
INDEX = ".index.json"
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file: the library's own limit
MEMORY_BYTES = machine.memory()
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
    "optimizer": Each(
        {
            "class": str,
            "groups": [{"params": [str]}],
            "values": dict,
            "keys?": dict,
            "marks?": Each({"parameter": bool, "grad": bool}),
            "same?": [[str]],
            "kept?": [str],
        }
    ),
    "scaler": (None, dict),
    "ranks": [{"random": dict, "window": Each([float]), "python?": list}],
    "world_size": int,
    "fields": dict,
    "found_sha256?": str,
    "source_sha256?": str,
    "data": str,
    "fingerprint?": (str, None),
    "settings?": {"seed": int, "precision": str},
    "kernels?": Each(str),
}
"""What a state must hold to resume from it (see files.check)."""
STATE_FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors")


@dataclass
class Checkpoint:
    """The contents of a checkpoint.

    step: optimizer steps taken. tensors: by file and name, such as ["model.safetensors"]["fc1.weight"], on the CPU.
    state: everything else, as JSON values.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)


def weights_file(path: Path) -> Path:
    """The file with a checkpoint's weights: model.safetensors, or the index if they are in several files."""
    index = path / f"model.safetensors{INDEX}"
    return index if index.exists() else path / "model.safetensors"


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
            # a file that is too long is not read: it may not fit in memory
            data = file.read() if found == size else b""
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
        data = files.read_bytes(path / MANIFEST, follow=False)
    except OSError as error:
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST}: {error.strerror}") from error
    return parse_manifest(data, path.name)


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


def read_tensors(path: Path, most: int = 1 << 30, *, foreign: bool = False) -> dict[str, Tensor]:
    """Reads a safetensors file's tensors by name; raises OSError, and ValueError if it is invalid or was changed.

    foreign: it may be another program's, with metadata of any kind.
    """
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
    renamed = "" if metadata and "format" not in metadata and not foreign else None  # "": the hash's name was changed
    expected = metadata.get("sha256", renamed)
    if expected is not None and hashlib.sha256(save(tensors)).hexdigest() != expected:
        raise ValueError("its content is not what was written (SHA-256 differs)")
    return tensors

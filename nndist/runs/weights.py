"""Weights to start from: of safetensors, runs, checkpoints, torch's files, Hugging Face's folders and torchvision."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..errors import UserError, first_line
from ..files import Each, printable, read_json
from . import checkpoint, torch_weights

SPARE_BYTES = 1 << 30  # of memory for a conversion, beside three times the file
BYTES_PER_SECOND, SPARE_SECONDS = 20e6, 60.0  # the slowest disk, and the start of a process
NAME = re.compile(r"\w+_Weights\.\w+")
WHAT = (
    "give a safetensors file, a run's folder or a checkpoint in it, a file of torch.save, a Hugging Face folder, or a "
    "name of torchvision's weights, such as ResNet18_Weights.DEFAULT"
)


class Source(NamedTuple):
    """Tensors by name, on the CPU, and what they are, for a person."""

    tensors: dict[str, Tensor]
    text: str


def read_weights(place: str, *, download: bool) -> Source:
    """The weights at a place (see WHAT); raises UserError. download: whether torchvision's may be fetched."""
    if NAME.fullmatch(place) and not Path(place).exists():
        return _of_torchvision(place, download)
    path = Path(place).expanduser()
    try:
        if path.is_dir():
            return _of_folder(path)
        if path.is_file():
            return Source(_of_file(path) if path.suffix == ".safetensors" else _of_torch(path), path.name)
    except checkpoint.DamagedCheckpoint as damage:
        raise UserError(f"--init-from {place}: damaged checkpoint: {damage}") from damage
    except (OSError, ValueError) as error:
        raise UserError(f"--init-from {place}: can't be read ({_reason(error)}); restore it") from error
    raise UserError(f"--init-from {place}: there is nothing there; {WHAT}")


def _of_file(path: Path) -> dict[str, Tensor]:
    return checkpoint.read_tensors(path, path.stat().st_size, foreign=True)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def _of_folder(path: Path) -> Source:
    if (path / "run.json").exists() or (path / "checkpoints").is_dir():
        return _of_run(path)
    if (path / checkpoint.MANIFEST).exists():
        return _of_checkpoint(path.absolute(), "the checkpoint")
    for index in sorted(path.glob("*.safetensors.index.json")):
        files = sorted(set(read_json(index, {"weight_map": Each(str)})["weight_map"].values()))
        if any(Path(name).name != name for name in files):
            raise UserError(f"--init-from {path}: {index.name} names a file outside the folder")
        tensors = {name: t for file in files for name, t in _of_file(path / file).items()}
        return Source(tensors, f"{len(files)} files of {path.name}")
    if (path / "model.safetensors").exists():
        return Source(_of_file(path / "model.safetensors"), f"{path.name}/model.safetensors")
    if (path / "pytorch_model.bin").exists():
        return Source(_of_torch(path / "pytorch_model.bin"), f"{path.name}/pytorch_model.bin")
    raise UserError(f"--init-from {path}: the folder holds no weights; {WHAT}")


def _of_run(path: Path) -> Source:
    """A run's best weights if it names a score, else its last."""
    root = path / "checkpoints"
    newest = checkpoint.newest_good(root, lambda line: None)
    if newest is None:
        raise UserError(f"--init-from {path}: the run has no checkpoint yet")
    best = newest.state["best"]
    if best is not None and best["step"] != newest.step:
        with suppress(checkpoint.DamagedCheckpoint):
            return _of_checkpoint(root / checkpoint.folder_name(best["step"]), f"{path.name}, best weights,")
    return _of_checkpoint(root / checkpoint.folder_name(newest.step), f"{path.name}, last weights,")


def _of_checkpoint(path: Path, what: str) -> Source:
    found = checkpoint.read(path)
    averaged = "ema.safetensors" in found.tensors
    tensors = found.tensors["ema.safetensors" if averaged else "model.safetensors"]
    return Source(tensors, f"{what} step {found.step:,}" + " (EMA)" * averaged)


def _of_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, converted in a process of its own with bounded memory and time."""
    size = path.stat().st_size
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "weights.safetensors"
        words = [sys.executable, "-P", torch_weights.__file__, str(path.absolute()), str(target)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        try:
            done = subprocess.run(
                [*words, str(3 * size + SPARE_BYTES)],
                env=environment,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=SPARE_SECONDS + size / BYTES_PER_SECOND,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"--init-from {path}: takes too long to read, so it is refused") from None
        if done.returncode == 3:
            lines = done.stdout.strip().splitlines() or ["is refused"]
            raise UserError(f"--init-from {path}: {printable(lines[-1])}; give its state_dict as a safetensors file")
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
            raise UserError(f"--init-from {path}: can't be read, or needs more memory than its size explains ({why})")
        return _of_file(target)


def _of_torchvision(name: str, download: bool) -> Source:
    """Weights by torchvision's name, from torch's cache of downloads."""
    import torch.hub
    from torchvision.models import get_weight

    try:
        weights = get_weight(name)
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(f"--init-from {name}: torchvision has no weights of that name ({first_line(error)})") from error
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    if not path.exists():
        hashed = re.search(r"-([a-f0-9]{8,})\.", path.name)
        try:
            if not download:
                raise OSError("the process that downloads for this machine did not get it")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights.url, str(path), hashed and hashed[1], progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--init-from {name}: {weights.url} can't be downloaded ({_reason(error)}); put the file at {path}"
            ) from error
    return Source(_of_torch(path), f"torchvision's {name}")

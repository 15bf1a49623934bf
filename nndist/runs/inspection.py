"""The checkpoints of a run: list them, verify them, export their weights."""

from __future__ import annotations

import contextlib
from pathlib import Path

from ..errors import UserError
from .checkpoint import Checkpoint, DamagedCheckpoint, check_state, checkpoints_in, folder_name, read
from .checkpoint_writer import publish_file


def found(run: Path, step: int | None) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, or of the one at `step`; raises UserError if there is none."""
    every = checkpoints_in(run / "checkpoints")
    if not every:
        raise UserError(f"{run}: holds no checkpoints; name a run's folder, such as runs/mnist_cnn/first")
    chosen = [entry for entry in every if step is None or entry[0] == step]
    if not chosen:
        raise UserError(
            f"--step {step}: {run} has no such checkpoint; choose from {', '.join(str(n) for n, _ in every)}"
        )
    return chosen


def show(run: Path, *, step: int | None = None, verify: bool = False) -> tuple[list[str], bool]:
    """One line per checkpoint and, with `verify`, one per file; and whether any is damaged."""
    lines, damaged = [], False
    for number, path in found(run, step):
        try:
            checkpoint = check_state(read(path))
            size = 0
            for file in path.iterdir():
                with contextlib.suppress(OSError):  # a dangling link
                    size += file.stat().st_size
        except DamagedCheckpoint as damage:
            damaged = True
            lines.append(f"{number:>10,}  DAMAGED  {damage}")
            continue
        lines.append(f"{number:>10,}  {summary(checkpoint)}  {size / 2**20:.1f} MiB")
        if verify:
            lines += [
                f"{'':12}{name}: {len(tensors)} tensors, hash correct" for name, tensors in checkpoint.tensors.items()
            ]
    return lines, damaged


def summary(checkpoint: Checkpoint) -> str:
    """Epoch, scores and number of processes of a checkpoint, in one line."""
    state = checkpoint.state
    scores = "  ".join(f"{name} {value:.4g}" for name, value in state["scores"].items() if value is not None)
    position = f"epoch {state['epoch']} batch {state['batch']}"
    processes = f"{state['world_size']} process{'es' * (state['world_size'] > 1)}"
    return "  ".join(part for part in (position, scores, f"({state['data']}, {processes})") if part)


def convert(run: Path, output: Path, *, step: int | None = None, ema: bool = False) -> str:
    """Writes the weights of a checkpoint to one safetensors file, unsharded, by parameter name; raises UserError."""
    number, path = found(run, step)[-1]
    try:
        checkpoint = read(path)
    except DamagedCheckpoint as damage:
        raise UserError(f"damaged checkpoint: {damage}; choose a different one with --step") from damage
    name = "ema.safetensors" if ema else "model.safetensors"
    if name not in checkpoint.tensors:
        raise UserError(f"--ema: {folder_name(number)} has no EMA weights; train with --ema-decay")
    try:
        publish_file(output, checkpoint.tensors[name])
    except OSError as error:
        raise UserError(f"{output}: can't be written ({error.strerror})") from error
    return f"{output}: {len(checkpoint.tensors[name])} tensors of step {number:,}"

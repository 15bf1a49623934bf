"""Whether two runs agree: in every bit of their newest checkpoints and records, or up to rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..runs.checkpoint import Checkpoint, DamagedCheckpoint, checkpoints_in, read
from ..runs.records import without_times

EXACT_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "random.safetensors")


def recorded(run: Path) -> int:
    """The last step that a run has recorded; 0 before the first."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except ValueError:
            continue  # half written
    return 0


def newest(run: Path) -> Checkpoint:
    """The newest checkpoint of a run; raises UserError if there is none or it is damaged."""
    found = checkpoints_in(run / "checkpoints")
    if not found:
        raise UserError(f"{run}: holds no checkpoint")
    try:
        return read(found[-1][1])
    except DamagedCheckpoint as damage:
        raise UserError(f"{run}: {damage}") from damage


def compare_exactly(intact: Path, other: Path) -> tuple[str, bool]:
    """Compares two runs: the outcome in words, and whether weights, states and records are bit-identical."""
    first, second = newest(intact), newest(other)
    if first.step != second.step:
        return f"ends at step {second.step} instead of {first.step}", False
    for name in EXACT_FILES:
        ours, theirs = first.tensors.get(name, {}), second.tensors.get(name, {})
        if ours.keys() != theirs.keys():
            return f"{name} holds different tensors", False
        for key, tensor in ours.items():
            if not tensor.equal(theirs[key]):
                return f"{name}: {key} differs", False
    if records(intact) != records(other):
        return "metrics.jsonl differs", False
    count = sum(len(tensors) for tensors in first.tensors.values())
    return f"bit-identical: {count} tensors, {len(records(intact))} records", True


def records(run: Path) -> list[dict[str, Any]]:
    """The records of a run without its times, which differ between runs, and the hashes that cover them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [without_times(line) for line in lines]


def relative_difference(first: Checkpoint, second: Checkpoint) -> float:
    """The largest difference of any weight, relative to the largest weight of its tensor; nan if one is."""
    ours, theirs = first.tensors["model.safetensors"], second.tensors["model.safetensors"]
    differences = [
        ((tensor - theirs[name]).abs().max() / tensor.abs().max().clamp_min(1e-12)).item()
        for name, tensor in ours.items()
        if tensor.is_floating_point() and tensor.numel()
    ]
    return torch.tensor(differences, dtype=torch.float64).max().item()  # keeps a nan that max() would pass over


def losses_of(run: Path) -> dict[int, dict[str, float]]:
    """The training losses that a run recorded, by step and name."""
    found: dict[int, dict[str, float]] = {}
    for record in records(run):
        losses = {name: value for name, value in record.items() if name.startswith("train/") and value is not None}
        if losses:
            found[record["step"]] = losses
    return found


def loss_difference(first: dict[int, dict[str, float]], second: dict[int, dict[str, float]]) -> float:
    """The largest difference of any recorded loss, relative to the largest; infinite if one lacks a record."""
    if first.keys() != second.keys() or not first:
        return float("inf")
    largest = max(abs(value) for losses in first.values() for value in losses.values())
    pairs = ((value, second[step].get(name)) for step, losses in first.items() for name, value in losses.items())
    return max(float("inf") if other is None else abs(value - other) for value, other in pairs) / max(largest, 1e-12)

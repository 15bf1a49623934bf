"""Proves a recipe's promises on this machine: real processes, real kill -9, a flipped bit; and says what came out."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import machine
from ..errors import UserError
from ..runs.checkpoint import Checkpoint, DamagedCheckpoint, checkpoints_in, read

EXACT_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "random.safetensors")
PARITY_TOLERANCE = 1e-3  # relative to a tensor's largest element; rounding grows with the steps, most under Adam
STEP_TIMEOUT_SECONDS = 600.0


@dataclass
class Row:
    """One line of the table: what was done to the run, and what came of it."""

    promise: str
    injected: str
    outcome: str
    kept: bool


@dataclass
class Verification:
    """Trains one recipe many times in a scratch folder, with faults; `rows` holds what was seen."""

    recipe: Path
    flags: list[str]
    steps: int
    say: Callable[[str], None]
    scratch: Path
    draw: random.Random
    rows: list[Row] = field(default_factory=list)

    def exact_resume(self, world_size: int, kills: int) -> None:
        """Kills a run at random steps and, alone, once in a save; the end must be that of the undisturbed run."""
        name = f"resume{world_size}"
        whole = self._undisturbed(world_size)
        places = sorted(self.draw.sample(range(2, self.steps), min(kills, self.steps - 2)))
        injected = []
        for place in places:
            rank = self.draw.randrange(world_size)
            injected.append(f"process {rank} at step {self._kill_at_step(name, world_size, place, rank)}")
        if world_size == 1:
            injected.append(self._kill_in_a_save(name))
        self._finish(name, world_size)
        outcome, kept = compare_exactly(whole, self._run(name))
        self.rows.append(
            Row(f"exact resume, {processes(world_size)}", "kill -9: " + ", ".join(injected), outcome, kept)
        )

    def damaged_checkpoint(self) -> None:
        """Flips one bit of the newest checkpoint of a run that was killed; the one before it must be used."""
        whole, name = self._undisturbed(1), "damage"
        self._kill_at_step(name, 1, self.steps - 1, 0)
        found = checkpoints_in(self._run(name) / "checkpoints")
        if len(found) < 2:
            self.rows.append(Row("damaged checkpoint", "nothing", "too few checkpoints; give more --steps", False))
            return
        file = found[-1][1] / "model.safetensors"
        data = bytearray(file.read_bytes())
        place = self.draw.randrange(len(data))
        data[place] ^= 1 << self.draw.randrange(8)
        file.write_bytes(data)
        said = self._finish(name, 1)
        outcome, kept = compare_exactly(whole, self._run(name))
        noticed = f"damaged checkpoint: {found[-1][1].name}/model.safetensors" in said
        outcome = ("noticed, " if noticed else "NOT noticed, ") + outcome
        self.rows.append(
            Row("damaged checkpoint", f"one bit of {file.stat().st_size:,} bytes", outcome, kept and noticed)
        )

    def parity(self, world_size: int) -> None:
        """Trains without dropout, which draws otherwise on each process; weights must agree up to rounding.

        Data that are streamed are read by other numbers of loader processes, so that random transforms are shown, too.
        """
        runs = []
        for size in (1, world_size):
            name = f"parity{size}"
            if not self._run(name).exists():
                workers = [] if "--num-workers" in self.flags else ["--num-workers", str(min(size, 3) - 1)]
                self._finish(name, size, "--max-steps", str(min(20, self.steps)), *workers, dropout=False)
            runs.append(newest(self._run(name)))
        difference = relative_difference(*runs)
        outcome = f"weights differ by {difference:.1e} of the largest"
        promise = f"world size, 1 and {world_size}"
        self.rows.append(
            Row(promise, f"{runs[0].step} steps, no dropout, other loaders", outcome, difference < PARITY_TOLERANCE)
        )

    def _run(self, name: str) -> Path:
        return self.scratch / self.recipe.stem / name

    def _undisturbed(self, world_size: int) -> Path:
        name = f"undisturbed{world_size}"
        if not self._run(name).exists():
            self._finish(name, world_size)
        return self._run(name)

    def _launch(self, name: str, world_size: int, *more: str, dropout: bool = True) -> subprocess.Popen[str]:
        flags = [
            "--runs-dir",
            str(self.scratch),
            "--run-name",
            name,
            "--log-every",
            "1",
            "--no-progress",
            "--no-figures",
        ]
        flags += ["--max-steps", str(self.steps), "--save-every", f"{max(1, self.steps // 10)} steps", "--keep", "3"]
        flags += [*self.flags, *more, *([] if dropout else ["--without-dropout"])]
        launcher = [sys.executable]
        if world_size > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
            flags += ["--cpu"]
        return subprocess.Popen(
            [*launcher, "-m", "nndist", str(self.recipe), *flags],
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **machine.own_group(),
        )

    def _finish(self, name: str, world_size: int, *more: str, dropout: bool = True) -> str:
        self.say(f"{name}: {processes(world_size)} to the end")
        process = self._launch(name, world_size, *more, dropout=dropout)
        said, _ = process.communicate(timeout=STEP_TIMEOUT_SECONDS)
        if process.returncode:
            last = next((line for line in reversed(said.splitlines()) if line.startswith("error:")), said[-500:])
            raise UserError(f"{self.recipe}: the run itself fails: {last}")
        return said

    def _kill_at_step(self, name: str, world_size: int, step: int, rank: int) -> int:
        """Sends SIGKILL to a process once the run has recorded `step`; gives the step that it had then recorded."""
        self.say(f"{name}: kill -9 of process {rank} at step {step}")
        with self._watched(name, world_size) as process:
            while recorded(self._run(name)) < step and process.poll() is None:
                time.sleep(0.002)
            reached = recorded(self._run(name))
            kill(process, rank, world_size)
        return reached

    def _kill_in_a_save(self, name: str) -> str:
        """Sends SIGKILL while a checkpoint's temporary folder is there; tries a few times to meet that instant."""
        self.say(f"{name}: kill -9 during a save")
        root = self._run(name) / "checkpoints"
        for _ in range(5):
            with self._watched(name, 1) as process:
                while process.poll() is None:
                    if any(path.name.endswith(".part") for path in root.glob(".step-*")):
                        break
                kill(process, 0, 1)
            if any(root.glob(".step-*.part")):
                return "in the middle of a save"
            if recorded(self._run(name)) >= self.steps:
                break
        return "near a save (no instant inside one was met)"

    def _watched(self, name: str, world_size: int) -> Watched:
        return Watched(self._launch(name, world_size))


class Watched:
    """A launched run whose output is read away; leaving the context waits for its end and leaves no process behind."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process

    def __enter__(self) -> subprocess.Popen[str]:
        return self.process

    def __exit__(self, *error: object) -> None:
        try:
            self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            machine.kill_tree(self.process.pid)
            self.process.communicate()


def kill(process: subprocess.Popen[str], rank: int, world_size: int) -> None:
    """kill -9 of the training process of one rank."""
    if world_size == 1:
        process.kill()
        return
    for pid in machine.descendants(process.pid):
        if machine.environment_of(pid).get("RANK") == str(rank):
            machine.kill(pid)


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
    """The newest checkpoint of a run; raises UserError where there is none that is whole."""
    found = checkpoints_in(run / "checkpoints")
    if not found:
        raise UserError(f"{run}: holds no checkpoint")
    try:
        return read(found[-1][1])
    except DamagedCheckpoint as damage:
        raise UserError(f"{run}: {damage}") from damage


def compare_exactly(whole: Path, other: Path) -> tuple[str, bool]:
    """Whether two runs ended in the same bits and recorded the same figures; and where not."""
    first, second = newest(whole), newest(other)
    if first.step != second.step:
        return f"ends at step {second.step} instead of {first.step}", False
    for name in EXACT_FILES:
        ours, theirs = first.tensors.get(name, {}), second.tensors.get(name, {})
        if ours.keys() != theirs.keys():
            return f"{name} holds other tensors", False
        for key, tensor in ours.items():
            if not tensor.equal(theirs[key]):
                return f"{name}: {key} differs", False
    if records(whole) != records(other):
        return "metrics.jsonl differs", False
    count = sum(len(tensors) for tensors in first.tensors.values())
    return f"bit-identical: {count} tensors, {len(records(whole))} records", True


def records(run: Path) -> list[dict[str, Any]]:
    """The records of a run without its speed, which no two runs share, and the hashes that cover it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    unshared = ("examples_per_second", "chain")
    return [{name: value for name, value in line.items() if name not in unshared} for line in lines]


def relative_difference(first: Checkpoint, second: Checkpoint) -> float:
    """The largest difference of any weight, relative to the largest weight of its tensor."""
    ours, theirs = first.tensors["model.safetensors"], second.tensors["model.safetensors"]
    return max(
        ((tensor - theirs[name]).abs().max() / tensor.abs().max().clamp_min(1e-12)).item()
        for name, tensor in ours.items()
        if tensor.is_floating_point() and tensor.numel()
    )


def processes(world_size: int) -> str:
    """A number of processes in words."""
    return "1 process" if world_size == 1 else f"{world_size} processes"


def verify(
    recipe: Path, flags: list[str], *, steps: int, kills: int, seed: int, say: Callable[[str], None]
) -> list[Row]:
    """Runs every verification of a recipe and gives the table's rows; raises UserError where it can't be trained."""
    scratch = Path(tempfile.mkdtemp(prefix="nndist-verify-"))
    try:
        check = Verification(recipe, flags, steps, say, scratch, random.Random(seed))
        check.exact_resume(1, kills)
        check.exact_resume(3, max(1, kills // 2))
        check.damaged_checkpoint()
        check.parity(2)
        check.parity(3)
        return check.rows
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def table(rows: list[Row]) -> Iterator[str]:
    """The table's lines, for a terminal of 80 columns."""
    import textwrap

    for row in rows:
        yield f"{'kept  ' if row.kept else 'BROKEN'}  {row.promise}"
        for label, text in (("injected", row.injected), ("outcome", row.outcome)):
            yield from textwrap.wrap(f"{label}: {text}", 80, initial_indent=" " * 8, subsequent_indent=" " * 10)


if __name__ == "__main__":
    from ..cli.commands import verify_command

    verify_command(sys.argv[1:], "python -m nndist.experiments.verify recipes/mnist_cnn.py --data-source sample")

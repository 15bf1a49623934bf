"""Proves the promises on a recipe and this machine: real processes, real kill -9, a flipped bit."""

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
from ..runs.records import without_times
from . import examples_taken
from .audit import outcome_of_audit

EXACT_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "random.safetensors")
PARITY_TOLERANCE = 1e-3  # relative to a tensor's largest element; rounding grows with the steps, most under Adam
STEP_TIMEOUT_SECONDS = 600.0
LOST_STATE = "can't be saved without pickle"  # in the note of a run on a value that checkpoints don't hold
PARITY_CAUSE = """the forward pass draws random numbers other than dropout's; the loss of an example depends on the
others of its batch; or an optimizer amplifies rounding: compare with fewer --steps"""
ORDER_CAUSE = "the training set's length or order() depends on the process, its number or the time"


@dataclass
class Row:
    """One row of the table: what was done to the run, the outcome, and the likely cause if the promise is broken."""

    promise: str
    injected: str
    outcome: str
    kept: bool
    cause: str = ""


@dataclass
class Verification:
    """Trains one recipe many times in a scratch folder, with faults; `rows` holds the outcomes."""

    recipe: Path
    flags: list[str]
    steps: int
    say: Callable[[str], None]
    scratch: Path
    draw: random.Random
    total: int = 0
    """Launches to come, for the progress; 0: unknown."""
    rows: list[Row] = field(default_factory=list)
    launched: int = 0
    likely: str | None = None

    def exact_resume(self, world_size: int, kills: int) -> None:
        """Kills a run at random steps and, on one process, in a save; its end must equal the uninterrupted run's."""
        name = f"resume{world_size}"
        intact = self._uninterrupted(world_size)
        places = sorted(self.draw.sample(range(2, self.steps), min(kills, self.steps - 2)))
        injected = []
        for place in places:
            rank = self.draw.randrange(world_size)
            injected.append(f"process {rank} at step {self._kill_at_step(name, world_size, place, rank)}")
        if world_size == 1:
            injected.append(self._kill_in_a_save(name))
        said = self._finish(name, world_size)
        outcome, kept = compare_exactly(intact, self._run(name))
        cause = "" if kept else self._cause_of_other_bits(said)
        promise = f"exact resume, {processes(world_size)}"
        self.rows.append(Row(promise, "kill -9: " + ", ".join(injected), outcome, kept, cause))

    def damaged_checkpoint(self) -> None:
        """Flips one bit of the newest checkpoint of a killed run; the checkpoint before it must be used."""
        intact, name = self._uninterrupted(1), "damage"
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
        outcome, kept = compare_exactly(intact, self._run(name))
        noticed = f"damaged checkpoint: {found[-1][1].name}/model.safetensors" in said
        outcome = ("noticed, " if noticed else "NOT noticed, ") + outcome
        cause = "" if kept else self._cause_of_other_bits(said)
        injected = f"one bit of {len(data):,} bytes"
        self.rows.append(Row("damaged checkpoint", injected, outcome, kept and noticed, cause))

    def parity(self, world_size: int) -> None:
        """Trains without dropout, which draws differently on each process; weights must agree up to rounding.

        Streamed data are read by different numbers of loader processes, so that random transforms are compared too.
        """
        runs = []
        for size in (1, world_size):
            name = f"parity{size}"
            if not self._run(name).exists():
                workers = [] if "--num-workers" in self.flags else ["--num-workers", str(min(size, 3) - 1)]
                self._finish(name, size, "--max-steps", str(min(20, self.steps)), *workers, dropout=False)
            runs.append(newest(self._run(name)))
        difference = relative_difference(*runs)
        examples, same = self._compared_examples("parity1", f"parity{world_size}")
        outcome = f"weights differ by {difference:.1e} of the largest; {examples}"
        promise = f"world size, 1 and {world_size}"
        injected, kept = f"{runs[0].step} steps, no dropout, other loaders", same and difference < PARITY_TOLERANCE
        self.rows.append(Row(promise, injected, outcome, kept, cause_of_other_steps(kept, same)))

    def elastic(self, sizes: tuple[int, ...] = (4, 2, 3, 4)) -> None:
        """Trains on a different number of processes after each kill -9, without dropout.

        Weights and every recorded loss must agree with those of a run on one process up to rounding, the examples of
        each step and their order exactly.
        """
        steps = min(20, self.steps)
        alone, name, at = "parity1", "elastic", ["--max-steps", str(steps)]
        if not self._run(alone).exists():
            self._finish(alone, 1, *at, dropout=False)
        places = sorted(self.draw.sample(range(2, steps), len(sizes) - 1))
        for size, place in zip(sizes, places, strict=False):
            self._kill_at_step(name, size, place, self.draw.randrange(size), *at, dropout=False)
        self._finish(name, sizes[-1], *at, dropout=False)
        runs = [newest(self._run(run)) for run in (alone, name)]
        difference = relative_difference(*runs)
        losses = [losses_of(self._run(run)) for run in (alone, name)]
        worst = loss_difference(*losses)
        examples, same = self._compared_examples(alone, name)
        outcome = (
            f"weights differ by {difference:.1e} of the largest, the {len(losses[0])} recorded losses by {worst:.1e}"
        )
        outcome += f"; {examples}"
        kept = same and difference < PARITY_TOLERANCE and worst < PARITY_TOLERANCE
        injected = f"kill -9 at steps {', '.join(map(str, places))}; {', '.join(map(str, sizes))} processes, no dropout"
        self.rows.append(Row("elastic", injected, outcome, kept, cause_of_other_steps(kept, same)))

    def _compared_examples(self, alone: str, name: str) -> tuple[str, bool]:
        """Compares the examples of each step of two runs without dropout; the second may have had several launches."""
        (first,), others = ([examples_taken.read(place) for place in self._examples(run)] for run in (alone, name))
        return examples_taken.compared(first, others)

    def _examples(self, name: str) -> list[Path]:
        """The folders in which each launch of a run wrote down its examples, in their order."""
        return sorted((self.scratch / "examples" / name).glob("*"))

    def audited(self) -> None:
        """Trains stretches of the uninterrupted run again from its checkpoints (`nndist audit`)."""
        run = self._uninterrupted(1)
        self._report("audit: stretches between checkpoints are trained again")
        outcome, holds = outcome_of_audit(run, stretches=2, seconds=STEP_TIMEOUT_SECONDS)
        cause = "" if holds else self._cause_of_other_bits("")
        self.rows.append(Row("audit", "stretches trained again", outcome, holds, cause))

    def rechecked(self, world_size: int = 3, every: int = 5) -> None:
        """Computes every fifth step twice, on other processes; the end must equal the uninterrupted run's."""
        intact, name = self._uninterrupted(world_size), "rechecked"
        try:
            self._finish(name, world_size, "--recheck-every", str(every))
            outcome, kept = compare_exactly(intact, self._run(name))
            cause = "" if kept else "a pass changes what can't be put back, such as a file, a thread or a C object"
        except UserError as error:
            outcome, kept, cause = str(error).rpartition("fails: ")[2], False, ""
        injected = f"every {every}th step computed twice, on another of {world_size} processes"
        self.rows.append(Row("recheck", injected, outcome, kept, cause))

    def _cause_of_other_bits(self, said: str) -> str:
        """The likely cause of a resume that is not exact: a note of the run, else whether a second run repeats it."""
        lost = next((line.removeprefix("note").strip() for line in said.splitlines() if LOST_STATE in line), None)
        if lost:
            return lost
        if self.likely is None:
            self._finish("repeated", 1)
            if compare_exactly(self._uninterrupted(1), self._run("repeated"))[1]:
                self.likely = "the code keeps state that checkpoints don't hold, such as a file, a thread or a C object"
            else:
                self.likely = """two uninterrupted runs differ too: the code uses the time, the system's entropy, the
                order of a set or an operation that is not deterministic (try --deterministic)"""
        return " ".join(self.likely.split())

    def _report(self, text: str) -> None:
        """Reports a launch with the progress; what a broken promise adds is counted too."""
        self.launched += 1
        self.total = self.total and max(self.total, self.launched)
        self.say(f"{self.launched} of {self.total}  {text}" if self.total else text)

    def _run(self, name: str) -> Path:
        return self.scratch / self.recipe.stem / name

    def _uninterrupted(self, world_size: int) -> Path:
        name = f"uninterrupted{world_size}"
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
        flags += [*self.flags, *more]
        if not dropout:
            place = self.scratch / "examples" / name / f"{len(self._examples(name)):03d}"
            flags += ["--without-dropout", "--examples-to", str(place)]
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
        self._report(f"{name}: {processes(world_size)} to the end")
        process = self._launch(name, world_size, *more, dropout=dropout)
        said, _ = process.communicate(timeout=STEP_TIMEOUT_SECONDS)
        if process.returncode:
            last = next((line for line in reversed(said.splitlines()) if line.startswith("error:")), said[-500:])
            raise UserError(f"{self.recipe}: the training itself fails: {last}")
        return said

    def _kill_at_step(self, name: str, world_size: int, step: int, rank: int, *more: str, dropout: bool = True) -> int:
        """Sends SIGKILL to a process once the run has recorded `step`; returns the last recorded step."""
        self._report(f"{name}: kill -9 of process {rank} of {world_size} at step {step}")
        with Watched(self._launch(name, world_size, *more, dropout=dropout)) as process:
            while recorded(self._run(name)) < step and process.poll() is None:
                time.sleep(0.002)
            reached = recorded(self._run(name))
            kill(process, rank, world_size)
        return reached

    def _kill_in_a_save(self, name: str) -> str:
        """Sends SIGKILL while a checkpoint's temporary folder exists; tries up to five times to hit that moment."""
        self._report(f"{name}: kill -9 during a save")
        root = self._run(name) / "checkpoints"
        for _ in range(5):
            with Watched(self._launch(name, 1)) as process:
                while process.poll() is None:
                    if any(path.name.endswith(".part") for path in root.glob(".step-*")):
                        break
                kill(process, 0, 1)
            if any(root.glob(".step-*.part")):
                return "in the middle of a save"
            if recorded(self._run(name)) >= self.steps:
                break
        return "near a save (no kill fell into one)"


class Watched:
    """Context manager of a launched run: drains its output, and at the end waits for it and kills what is left."""

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
    """Sends SIGKILL to the training process of one rank."""
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
    """The largest difference of any weight, relative to the largest weight of its tensor."""
    ours, theirs = first.tensors["model.safetensors"], second.tensors["model.safetensors"]
    return max(
        ((tensor - theirs[name]).abs().max() / tensor.abs().max().clamp_min(1e-12)).item()
        for name, tensor in ours.items()
        if tensor.is_floating_point() and tensor.numel()
    )


def cause_of_other_steps(kept: bool, same_examples: bool) -> str:
    """The likely cause of steps that depend on the number of processes; "" if they do not."""
    return "" if kept else " ".join(PARITY_CAUSE.split()) if same_examples else ORDER_CAUSE


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


def processes(world_size: int) -> str:
    """Such as "1 process" or "3 processes"."""
    return "1 process" if world_size == 1 else f"{world_size} processes"


def verify(
    recipe: Path,
    flags: list[str],
    *,
    steps: int,
    kills: int,
    seed: int,
    say: Callable[[str], None],
    elastic: bool = False,
) -> list[Row]:
    """Runs every verification of a recipe and returns the table's rows; raises UserError if it can't be trained.

    say: called with a line per launch, such as "3 of 16  resume1: kill -9 during a save".
    """
    scratch = Path(tempfile.mkdtemp(prefix="nndist-verify-"))
    try:
        kills_of_three = max(1, kills // 2)
        # uninterrupted, killed, killed in a save, finished; the same for three but for the save; 2 with damage; 3 sizes
        total = min(kills, steps - 2) + 3 + min(kills_of_three, steps - 2) + 2 + 2 + 3 + 1 + 1 + 4 * elastic
        check = Verification(recipe, flags, steps, say, scratch, random.Random(seed), total)
        check.exact_resume(1, kills)
        check.exact_resume(3, kills_of_three)
        check.damaged_checkpoint()
        check.parity(2)
        check.parity(3)
        if elastic:
            check.elastic()
        check.audited()
        check.rechecked()
        return check.rows
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def table(rows: list[Row]) -> Iterator[str]:
    """The table's lines, for a terminal of 80 columns."""
    import textwrap

    for row in rows:
        yield f"{'kept  ' if row.kept else 'BROKEN'}  {row.promise}"
        for label, text in (("injected", row.injected), ("outcome", row.outcome), ("likely cause", row.cause)):
            if text:
                yield from textwrap.wrap(f"{label}: {text}", 80, initial_indent=" " * 8, subsequent_indent=" " * 10)


if __name__ == "__main__":
    from ..cli.commands import verify_command

    verify_command(sys.argv[1:])

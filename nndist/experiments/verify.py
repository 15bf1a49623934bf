"""Proves the promises on a recipe and this machine: real processes, real kill -9, a flipped bit."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from .. import machine
from ..errors import UserError
from ..files import patiently
from ..runs.checkpoint import checkpoints_in
from ..stores import file_url
from . import examples_taken
from .agreement import compare_exactly, loss_difference, losses_of, newest, recorded, relative_difference
from .audit import outcome_of_audit

PARITY_TOLERANCE = 1e-3  # relative to a tensor's largest element; rounding grows with the steps, most under Adam
STEP_TIMEOUT_SECONDS = 600.0
STORED = "stored"
"""The name of the run that is kept in a store."""
Signal = Literal["SIGTERM", "kill -9"]
LOST_STATE = "can't be saved without pickle"  # in the note of a run on a value that checkpoints don't hold
LOADERS = "random transforms by other loaders"
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
    waiting: subprocess.Popen[str] | None = None
    """The run in a store, which is resumed while the next rows are made."""
    stored: str = ""
    """What was done to it."""

    def exact_resume(self, world_size: int, kills: int) -> None:
        """Kills a run at random steps and, on one process, in a save; its end must equal the uninterrupted run's."""
        name = f"resume{world_size}"
        intact = self._uninterrupted(world_size)
        places = sorted(self.draw.sample(range(2, self.steps), min(kills, self.steps - 2)))
        injected = []
        for place in places:
            rank = self.draw.randrange(world_size)
            reached = self._kill_at_step(name, world_size, place, rank)
            injected.append(f"{reached}" + (f" of process {rank}" if world_size > 1 else ""))
        if world_size == 1:
            injected.append(self._kill_in_a_save(name))
        said = self._finish(name, world_size)
        outcome, kept = compare_exactly(intact, self._run(name))
        cause = "" if kept else self._cause_of_other_bits(said)
        promise = f"exact resume, {processes(world_size)}"
        self.rows.append(Row(promise, "kill -9 at steps " + ", ".join(injected), outcome, kept, cause))

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
        injected = f"one flipped bit of {len(data):,} bytes"
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
        injected, kept = f"{runs[0].step} steps without dropout, {LOADERS}", same and difference < PARITY_TOLERANCE
        self.rows.append(Row(promise, injected, outcome, kept, cause_of_other_steps(kept, same)))

    def elastic(self, sizes: tuple[int, ...] = (4, 2, 3)) -> None:
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

    def into_a_store(self) -> None:
        """Trains into a store on machines whose disks are lost: after SIGTERM, then after kill -9; begins a third time.

        A machine that was killed may still be alive for all that the store knows. So the third launch watches its
        lease, for 45 s, in which the next rows are made; `from_the_store` waits for its end.
        """
        name, half = STORED, self.steps // 2
        first, last = self.draw.randrange(2, self.steps // 3), self.draw.randrange(half, self.steps)
        flags = [
            "--runs-dir",
            file_url(self.scratch / "store"),
            "--local-runs-dir",
            str(self.scratch),
        ]
        faults: list[tuple[int, Signal]] = [(first, "SIGTERM"), (last, "kill -9")]
        at = []
        for place, signal in faults:
            reached = self._kill_at_step(name, 1, place, 0, *flags, signal=signal)
            patiently(partial(shutil.rmtree, self._run(name)))  # the process that sends it may still end
            at.append(f"{signal} at step {reached}")
        self.stored = f"{' and '.join(at)}; folder deleted twice"
        self._report(f"{name}: 1 process to the end, once the dead one's lease expires")
        self.waiting = self._launch(name, 1, *flags)

    def from_the_store(self) -> None:
        """The end of the run in a store, here and there, must equal the uninterrupted run's."""
        assert self.waiting is not None
        said, _ = self.waiting.communicate(timeout=STEP_TIMEOUT_SECONDS)
        self._check(self.waiting, said)
        self.rows.append(self._row_of_the_store(said))

    def _row_of_the_store(self, said: str) -> Row:
        """What the last launch said and left."""
        intact, here = self._uninterrupted(1), self._run(STORED)
        fetched = " was fetched from " in said
        outcome, kept = compare_exactly(intact, self.scratch / "store" / here.relative_to(self.scratch))
        if kept:
            outcome, kept = compare_exactly(intact, here)
        cause = "" if kept else self._cause_of_other_bits(said)
        outcome = outcome if fetched else f"nothing was fetched, {outcome}"
        return Row("object store, file://", self.stored, outcome, kept and fetched, cause)

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
            "--no-report",
            "--wandb",
            "off",  # else dozens of runs of a few steps would be sent to the user's project
        ]
        flags += ["--max-steps", str(self.steps), "--save-every", f"{max(1, self.steps // 10)} steps", "--keep", "3"]
        flags += [*self.flags, *more]
        module = "nndist"
        if not dropout:
            place = self.scratch / "examples" / name / f"{len(self._examples(name)):03d}"
            module, flags = "nndist.cli.verified", ["--without-dropout", "--examples-to", str(place), *flags]
        launcher = [sys.executable]
        if world_size > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
            flags += ["--cpu"]
        return subprocess.Popen(
            [*launcher, "-m", module, str(self.recipe), *flags],
            env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            **machine.own_group(),
        )

    def _finish(self, name: str, world_size: int, *more: str, dropout: bool = True) -> str:
        self._report(f"{name}: {processes(world_size)} to the end")
        process = self._launch(name, world_size, *more, dropout=dropout)
        said, _ = process.communicate(timeout=STEP_TIMEOUT_SECONDS)
        self._check(process, said)
        return said

    def _check(self, process: subprocess.Popen[str], said: str) -> None:
        """Raises UserError with what an ended training said, if it failed."""
        if process.returncode:
            last = next((line for line in reversed(said.splitlines()) if line.startswith("error:")), said[-500:])
            raise UserError(f"{self.recipe}: the training itself fails: {last}")

    def _kill_at_step(
        self,
        name: str,
        world_size: int,
        step: int,
        rank: int,
        *more: str,
        dropout: bool = True,
        signal: Signal = "kill -9",
    ) -> int:
        """Sends a signal to a process once the run has recorded `step`; returns the last recorded step."""
        self._report(f"{name}: {signal} of process {rank} of {world_size} at step {step}")
        with Watched(self._launch(name, world_size, *more, dropout=dropout)) as process:
            while recorded(self._run(name)) < step and process.poll() is None:
                time.sleep(0.002)
            reached = recorded(self._run(name))
            machine.ask_to_stop(process) if signal == "SIGTERM" else kill(process, rank, world_size)
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


def cause_of_other_steps(kept: bool, same_examples: bool) -> str:
    """The likely cause of steps that depend on the number of processes; "" if they do not."""
    return "" if kept else " ".join(PARITY_CAUSE.split()) if same_examples else ORDER_CAUSE


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
    elastic: bool = True,
) -> list[Row]:
    """Runs every verification of a recipe and returns the table's rows; raises UserError if it can't be trained.

    say: called with a line per launch, such as "3 of 16  resume1: kill -9 during a save".
    """
    scratch = Path(tempfile.mkdtemp(prefix="nndist-verify-"))
    check = Verification(recipe, flags, steps, say, scratch, random.Random(seed))
    try:
        kills_of_three = max(1, kills // 2)
        # uninterrupted, killed, killed in a save, finished; the same for three but for the save; 2 with damage; 3 into
        # a store; 3 sizes; audited; rechecked
        check.total = min(kills, steps - 2) + 3 + min(kills_of_three, steps - 2) + 2 + 2 + 3 + 3 + 1 + 1 + 3 * elastic
        check.exact_resume(1, kills)
        check.into_a_store()
        check.exact_resume(3, kills_of_three)
        check.damaged_checkpoint()
        check.parity(2)
        check.parity(3)
        if elastic:
            check.elastic()
        check.audited()
        check.rechecked()
        check.from_the_store()
        return check.rows
    finally:
        if check.waiting is not None and check.waiting.poll() is None:
            machine.kill_tree(check.waiting.pid)
            check.waiting.communicate()
        shutil.rmtree(scratch, ignore_errors=True)


def table(rows: list[Row]) -> Iterator[str]:
    """The table's lines, for a terminal of 80 columns and 24 lines."""
    import textwrap

    for row in rows:
        first = f"{'kept  ' if row.kept else 'BROKEN'}  "
        yield from textwrap.wrap(f"{row.promise}: {row.outcome}", 80, initial_indent=first, subsequent_indent=" " * 10)
        for text in (f"by {row.injected}", f"likely cause: {row.cause}" if row.cause else ""):
            yield from textwrap.wrap(text, 80, initial_indent=" " * 8, subsequent_indent=" " * 10)

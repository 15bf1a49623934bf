"""Why do two runs differ? The first step whose weights differ, and in it the first operation whose result does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..distributed.runtime import Runtime
from ..errors import UserError
from ..runs import checkpoint, fingerprints
from ..runs.reading import mapping
from ..runs.records import FILE, Record, Records, without_times
from ..trained.loaded_run import LoadedRun
from .again import Again, Trace, observed, trained_again
from .elsewhere import answer_of
from .replay import NOT_OF_A_REPLAY, same_bits

SAME = "the same operations with the same results: the difference comes after the step, from a hook or the schedule"
RANDOM = ("bernoulli", "dropout", "native_dropout", "rand", "randn", "normal", "uniform", "randint", "multinomial")
ENVIRONMENT = ("torch", "threads", "device", "world_size", "python", "accelerate")
"""What a replay on this machine can't vary: where runs differ in these, it may give neither's bits."""
OF_PYTHON = {"torch", "python", "accelerate"}
"""What of it another environment of this machine may have."""


@dataclass
class Difference:
    """How two runs differ.

    described: (what, in A, in B) for what their descriptions say. same_until: the last step up to which their records
    are known to agree, differs_at: the first that differs, None if none does. step: the first whose weights differ when
    both are trained again. cause: in words.
    """

    described: list[tuple[str, str, str]] = field(default_factory=list)
    same_until: int = 0
    differs_at: int | None = None
    step: int | None = None
    cause: str = ""
    notes: list[str] = field(default_factory=list)


def bisect(
    first: Path, second: Path, *, trust: bool, say: Callable[[str], None], python: str | None = None
) -> Difference:
    """Compares two runs: descriptions, records, fingerprints and checkpoints, then both trained again; a collective.

    say: called on all processes. python: of the environment in which the second is trained again; raises UserError if
    it can't do it, or there are several processes.
    """
    if python and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--python: on one process only; give fewer, or leave it out")
    training = Training(trust, (None, python))
    runs = [LoadedRun(folder, trust=trust) for folder in (first, second)]
    found = Difference(described(runs[0].about, runs[1].about))
    found.same_until, found.differs_at = compared_records(first, second)
    known = checkpoints_that_differ(first, second)
    if known is not None and (found.differs_at is None or known < found.differs_at):
        found.differs_at, found.same_until = known, min(found.same_until, known - 1)
    same, differs = compared_fingerprints(first, second)
    if differs is not None and (found.differs_at is None or differs <= found.differs_at):
        found.differs_at, found.same_until = differs, same
        found.step = differs if differs == same + 1 else None
    elif found.differs_at is not None and same < found.differs_at:
        found.same_until = max(found.same_until, same)
    if found.differs_at is None:
        found.cause = "no record and no checkpoint that both have differs"
        return found
    start = common_checkpoint(first, second, found.same_until)
    if found.step is None:
        say(f"training steps {start + 1:,} to {found.differs_at:,} of both again")
        both = training.of((first, second), start=start, last=found.differs_at)
        found.notes = notes_of(both)
        ours, theirs = (one.hashes for one in both)
        differing = [step for step in sorted(ours.keys() & theirs.keys()) if ours[step] != theirs[step]]
        everyones = both[0].runtime.gather_objects(differing[:1])
        found.step = min((step for steps in everyones for step in steps), default=None)
        if found.step is None:
            found.cause = not_of_the_recipe(found, both)
            return found
    if found.step == 0:
        found.cause = "the initial weights differ" + because(found)
        return found
    say(f"step {found.step:,} is taken again under observation")
    found.cause = cause_in_step(found, (first, second), training)
    return found


def cause_in_step(found: Difference, folders: tuple[Path, Path], training: Training) -> str:
    """What differs first in the step whose weights are the first to differ; a collective."""
    assert found.step is not None
    both = training.of(folders, step=found.step)
    found.notes = found.notes or notes_of(both)
    ours, theirs = (one.trace for one in both)
    cause = of_all(both[0].runtime, ours, theirs)
    if cause == SAME and any(one.wrong for one in both):
        return not_of_the_recipe(found, both)
    if not found.described:  # the same training twice
        again = observed(folders[0], found.step, training.trust).trace
        if (repeated := of_all(both[0].runtime, ours, again)) != SAME:
            return f"the recipe does not repeat its bits: taken again, step {found.step:,} of run A has {repeated}"
    return cause + because(found)


@dataclass
class Training:
    """How runs are trained again: each here, or by the Python of its own environment."""

    trust: bool
    pythons: tuple[str | None, str | None]

    def of(self, folders: tuple[Path, Path], **task: int) -> list[Again]:
        """Two runs trained again: from `start` to `last`, or `step` observed."""
        return [self._one(folder, python, task) for folder, python in zip(folders, self.pythons, strict=True)]

    def _one(self, folder: Path, python: str | None, task: dict[str, int]) -> Again:
        if python is not None:
            answer = answer_of(python, {"folder": str(folder.absolute()), "trust": self.trust, **task})
            return Again.from_json(answer)
        if "step" in task:
            return observed(folder, task["step"], self.trust)
        return trained_again(folder, task["start"], task["last"], self.trust)


def notes_of(both: list[Again]) -> list[str]:
    """What may make bits differ, of either."""
    return list(dict.fromkeys(note for one in both for note in one.notes))


def of_all(runtime: Runtime, ours: Trace, theirs: Trace) -> str:
    """The first difference on any process, in words."""
    everyones = runtime.gather_objects(first_difference(ours, theirs))
    _, text, rank = min((place, text, rank) for rank, (place, text) in enumerate(everyones))
    return text + (f" (process {rank})" if runtime.world_size > 1 and text != SAME else "")


def described(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What two run.json say differently of what training depends on: (what, in A, in B)."""
    skip = NOT_OF_A_REPLAY | {
        "allow_change",
        "save_every",
        "keep",
        "progress",
        "figures",
        "report",
        "wandb",
        "traceback",
    }
    skip |= {
        "wandb_project",
        "time",
        "preempt_signal",
        "profile_ranks",
        "log_every",
        "data_dir",
        "max_steps",
        "device",
        "cpu",
    }
    skip |= {"timeout_seconds", "threads", "traceback", "recheck_every", "fingerprint_every", "num_workers"}
    rows: list[tuple[str, str, str]] = []
    for of, without in (("fields", set()), ("settings", skip), ("versions", set())):
        one, other = mapping(ours.get(of)), mapping(theirs.get(of))
        rows += [
            (name, str(one.get(name)), str(other.get(name)))
            for name in sorted({*one, *other} - without)
            if one.get(name) != other.get(name)
        ]
    kinds = [str(about.get("device")).partition(" x ")[0] for about in (ours, theirs)]
    if kinds[0] != kinds[1]:
        rows.append(("device", kinds[0], kinds[1]))
    for name in ("world_size", "threads", "source_sha256", "modules"):
        if ours.get(name) != theirs.get(name):
            rows.append((name, str(ours.get(name))[:16], str(theirs.get(name))[:16]))
    for name in ("source", "fingerprint"):
        values = [mapping(about.get("data")).get(name) for about in (ours, theirs)]
        if values[0] != values[1]:
            rows.append((f"data, {name}", str(values[0])[:16], str(values[1])[:16]))
    return rows


def compared_records(first: Path, second: Path) -> tuple[int, int | None]:
    """The step of the last record before the first that differs, and of that one; None if none does."""
    same = 0
    runs = [[r for r in rows_of(folder) if fingerprints.NAME not in r] for folder in (first, second)]
    for ours, theirs in zip(*runs, strict=False):
        if ours != theirs:
            return min(same, ours["step"] - 1), ours["step"]
        same = ours["step"]
    return same, None


def compared_fingerprints(first: Path, second: Path) -> tuple[int, int | None]:
    """The last step at which both runs recorded the same hash of the weights before the first at which not."""
    ours, theirs = (
        {row["step"]: row[fingerprints.NAME] for row in rows_of(folder) if fingerprints.NAME in row}
        for folder in (first, second)
    )
    same = 0
    for step in sorted(ours.keys() & theirs.keys()):
        if ours[step] != theirs[step]:
            return same, step
        same = step
    return same, None


def rows_of(folder: Path) -> list[Record]:
    """A run's records without what tells of the machine."""
    return [without_times(row) for row in Records.of_file(folder / FILE).rows()]


def checkpoints_that_differ(first: Path, second: Path) -> int | None:
    """The first step of a checkpoint that both have, with different weights; None if there is none."""
    return next((step for step in common_steps(first, second) if not weights_agree(first, second, step)), None)


def common_checkpoint(first: Path, second: Path, until: int) -> int:
    """The newest step, `until` at most, of which both have a checkpoint with the same weights; else 0."""
    steps = [step for step in common_steps(first, second) if step <= until]
    return next((step for step in reversed(steps) if weights_agree(first, second, step)), 0)


def common_steps(first: Path, second: Path) -> list[int]:
    """The steps of the checkpoints that both have."""
    ours, theirs = ({step for step, _ in checkpoint.checkpoints_in(f / "checkpoints")} for f in (first, second))
    return sorted(ours & theirs)


def weights_agree(first: Path, second: Path, step: int) -> bool:
    """Whether both runs' checkpoints of a step are intact and hold the same weights, bit for bit."""
    name = checkpoint.folder_name(step)
    try:
        ours, theirs = (
            checkpoint.read(folder / "checkpoints" / name).tensors["model.safetensors"] for folder in (first, second)
        )
    except (checkpoint.DamagedCheckpoint, KeyError):
        return False
    return ours.keys() == theirs.keys() and all(same_bits(tensor, theirs[key]) for key, tensor in ours.items())


def not_of_the_recipe(found: Difference, both: list[Again]) -> str:
    """Both give the same bits here: which of the two runs these are tells what to suspect."""
    wrong = {name: one.wrong for name, one in zip("AB", both, strict=True) if one.wrong}
    rows = [(what, f"{what} ({ours} and {theirs})") for what, ours, theirs in found.described if what in ENVIRONMENT]
    suspect = f"; they differ in {', '.join(text for _, text in rows)}" if rows else ""
    if any(what in OF_PYTHON for what, _ in rows):
        suspect += ". Give --python the Python of run B's environment, to take the step there"
    if not wrong:
        return f"trained again here, both keep to their own records and agree up to step {found.differs_at:,}{suspect}"
    which = " and ".join(f"{name} ({what})" for name, what in wrong.items())
    return (
        f"trained again here, both give the same weights, and these are not those of run {which}: not the recipe, its "
        f"fields or its data, but the machine, a version, or a changed bit{suspect}"
    )


def because(found: Difference) -> str:
    """What the descriptions say of it."""
    if not found.described:
        return "; the runs' descriptions do not differ"
    said = ", ".join(f"{what} ({ours} and {theirs})" for what, ours, theirs in found.described[:4])
    return f"; the runs differ in {said}"


def first_difference(ours: Trace, theirs: Trace) -> tuple[int, str]:
    """The place of the first difference of two traces, and its description."""
    if ours.examples != theirs.examples:
        pairs = list(zip(ours.examples, theirs.examples, strict=False))
        at = next((n for n, (one, other) in enumerate(pairs) if one != other), len(pairs))  # or one batch is shorter
        same = sorted(ours.examples) == sorted(theirs.examples)
        return -2, f"different examples: number {at + 1} of the batch" + (", in a different order" if same else "")
    if ours.inputs != theirs.inputs:
        return -1, "the same examples with different contents"
    for place, (one, other) in enumerate(zip(ours.operations, theirs.operations, strict=False), 1):
        if (one[0], one[1], one[3]) != (other[0], other[1], other[3]):
            if one[:2] != other[:2]:
                return place, f"different operations from number {place} on: {one[0]} and {other[0]}{_where(one)}"
            kind = "different random numbers, in" if one[0].startswith(RANDOM) else "a different result of"
            return place, f"{kind} {one[0]}{_where(one)}, operation {place}"
    return len(ours.operations) + 1, SAME


def _where(operation: tuple[str, str, str, str]) -> str:
    _, module, line, _ = operation
    return (f" of {module}" if module else "") + (f", {line}" if line else "")

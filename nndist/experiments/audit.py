"""Whether a run is what it says: its hashes, and stretches between its checkpoints trained again, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.identity import same_examples
from ..errors import UserError
from ..files import read_bytes
from ..runs import checkpoint
from ..runs.records import FILE, verified
from ..trained.loaded_run import LoadedRun
from .replay import Replay


@dataclass
class Audit:
    """findings: (what was examined, outcome, whether it holds), a row each. stretches: of the run, and those chosen.

    missed: the probability that a run with one forged stretch would have passed, given how many were trained again.
    """

    findings: list[tuple[str, str, bool]] = field(default_factory=list)
    stretches: list[tuple[int, int]] = field(default_factory=list)
    chosen: list[tuple[int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return all(held for *_, held in self.findings)

    @property
    def missed(self) -> float:
        return 1.0 - len(self.chosen) / len(self.stretches) if self.stretches else 1.0

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        rows = [{"what": what, "outcome": outcome, "holds": held} for what, outcome, held in self.findings]
        return {
            "holds": self.holds,
            "findings": rows,
            "stretches": self.stretches,
            "trained_again": self.chosen,
            "chance_to_miss_one_forged_stretch": round(self.missed, 4),
            "notes": self.notes,
        }


def stretches_of(root: Path) -> list[tuple[int, int]]:
    """The stretches of steps between a run's checkpoints, the first from its beginning; raises UserError."""
    steps = [step for step, _ in checkpoint.checkpoints_in(root)]
    if not steps:
        raise UserError(f"{root}: no checkpoint to compare with; one is saved every 10 minutes and at the end")
    return list(zip([0, *steps[:-1]], steps, strict=True))


def audit(folder: Path, *, stretches: int, seed: int, trust: bool, say: Callable[[str], None]) -> Audit:
    """Examines a run's files and trains `stretches` random stretches again; a collective.

    A checkpoint states the hash of each file and the chain over the records before it; run.json those of the recipe and
    the data. Somebody who can write to the folder can make these agree with each other; what training again gives
    can't be made up.
    """
    found = Audit()
    run = LoadedRun(folder, trust=trust)
    root = folder / "checkpoints"
    found.stretches = stretches_of(root)
    found.findings += examined(run, root)
    if not found.holds:
        return found
    count = min(stretches, len(found.stretches))
    found.chosen = sorted(random.Random(seed).sample(found.stretches, count))
    for number, (first, last) in enumerate(found.chosen, 1):
        say(f"{number} of {count}  steps {first:,} to {last:,} are trained again")
        began = time.perf_counter()
        replay = Replay(folder, first + 1, trust=trust)
        if replay.began != first:
            found.findings.append((f"steps {first:,} to {last:,}", "its checkpoint can't be restored", False))
            continue
        replay.advance(last)
        same, record = replay.records_differ()
        weights = replay.checkpoint_differs(last) or ""
        seconds = time.perf_counter() - began
        bad = record or weights
        said = f"differs: {bad}" if bad else f"bit-identical, {same} records too ({seconds:.1f} s)"
        said = replay.trainer.runtime.from_main(said)
        found.findings.append((f"steps {first:,} to {last:,}", said, not said.startswith("differs")))
        found.notes += [note for note in replay.notes if note not in found.notes]
    return found


def examined(run: LoadedRun, root: Path) -> list[tuple[str, str, bool]]:
    """The files of a run against the hashes that name them."""
    rows: list[tuple[str, str, bool]] = []
    intact: list[checkpoint.Checkpoint] = []
    damage = ""
    for _, path in checkpoint.checkpoints_in(root):
        try:
            intact.append(checkpoint.check_state(checkpoint.read(path, checkpoint.nothing)))
        except checkpoint.DamagedCheckpoint as error:
            damage = damage or str(error)
    rows.append(("checkpoints", damage or f"{len(intact)}, every byte hashed", not damage))
    if intact:
        rows.append(("records", *_records(run.folder, intact)))
    source = run.about.get("source_sha256")
    try:
        held = hashlib.sha256(read_bytes(run.folder / checkpoint.RECIPE)).hexdigest()
    except OSError as error:
        held = str(error.strerror)
    same = {held} == {source, *(saved.state.get("source_sha256", source) for saved in intact)}
    rows.append(
        ("recipe", f"SHA-256 {held[:16]}" if same else "not the one that the run and its checkpoints name", same)
    )
    if data := run.about.get("data", {}).get("fingerprint"):
        same = all(same_examples(saved.state.get("fingerprint") or data, data) for saved in intact)
        said = f"fingerprint {str(data)[:16]}" if same else "not the fingerprint that the checkpoints name"
        rows.append(("data", said, same))
    return rows


def _records(folder: Path, intact: list[checkpoint.Checkpoint]) -> tuple[str, bool]:
    """The records up to each checkpoint against the chain that it names."""
    count = 0
    for saved in intact:
        try:
            seals = verified(folder / FILE, saved.state["metrics_bytes"])
        except (OSError, ValueError) as error:
            return str(error), False
        if problem := seals.problem():
            return problem, False
        if saved.state.get("metrics_chain") not in (None, seals.chain):
            return f"not those that the checkpoint of step {saved.step:,} was saved with", False
        count = seals.count
    return f"{count:,}, chained up to the newest checkpoint; each names the chain before it", True


def outcome_of_audit(run: Path, *, stretches: int, seconds: float | None = None) -> tuple[str, bool]:
    """Audits a run in a process of its own, with seed 0: the outcome in words, and whether it holds."""
    words = ["audit", str(run), "--stretches", str(stretches), "--seed", "0", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "nndist", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=seconds,
    )
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return (done.stderr.strip().splitlines() or ["no answer"])[-1], False
    bad = [f"{row['what']}: {row['outcome']}" for row in found["findings"] if not row["holds"]]
    again = [f"{first:,} to {last:,}" for first, last in found["trained_again"]]
    return "; ".join(bad) if bad else f"bit-identical: steps {', '.join(again)}; every hash agrees", found["holds"]

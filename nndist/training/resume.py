"""Resumes an interrupted run, after checking that it is the same one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import files
from ..data.identity import same_examples
from ..distributed.runtime import on_main
from ..errors import UserError, first_line, lost_a_process, out_of_memory
from ..recipe import helpers
from ..recipe.contract import Recipe
from ..recipe.fields import as_now, comparable, to_json
from ..runs import checkpoint, checkpoint_writer
from ..runs.records import FILE, Seals, rebuild, verified
from . import sharing
from .description import DESCRIPTION_KIND
from .trainer import Trainer


class Resumed(NamedTuple):
    """A resumed run: notes for the user, how many bytes of metrics.jsonl are kept, and their last chained hash."""

    notes: list[str]
    metrics_bytes: int
    chain: str


def resume(trainer: Trainer) -> Resumed:
    """Restores an earlier launch's run from its newest intact checkpoint.

    Raises UserError if the run was trained on something else, if all its checkpoints are damaged, or if its other files
    are damaged and --resume rebuild is not given.
    """
    runtime, root = trainer.runtime, trainer.folder / "checkpoints"
    notes: list[str] = []

    def choose() -> list[Any]:
        described = read_description(trainer, notes)
        if described:
            check_unchanged(trainer, described)
        found = checkpoint.newest_good(root, notes.append)
        if found is None:
            return ["", False, 0, ""]
        state = found.state
        last = described.get("step")
        ended = described.get("status") in ("finished", "cut", "preempted")
        if ended and isinstance(last, int) and found.step < last and last not in dict(checkpoint.checkpoints_in(root)):
            notes.append(f"run.json names step {last:,}, whose checkpoint is gone")
        if not described:
            check_unchanged(trainer, described_by(state))
        lost = best_is_lost(root, found, notes)
        records = check_records(trainer, state["metrics_bytes"], state.get("metrics_chain"), notes)
        checkpoint_writer.clear_leftovers(root, state["saved"])
        return [checkpoint.folder_name(found.step), lost, *records]

    name, best_lost, metrics_bytes, chain = on_main(runtime, choose)
    if not name:
        return Resumed([*notes, "no checkpoint yet: the run starts again from its first step"], 0, "")
    problem = ""
    try:
        saved = checkpoint.check_state(sharing.read(runtime, trainer.sharding, root / name, trainer.networks))
        restore(trainer, saved)
        if best_lost:
            trainer.saving.steps = [step for step in trainer.saving.steps if step != saved.state["best"]["step"]]
            trainer.best.record = None
        if saved.state["world_size"] != runtime.world_size:
            notes.append(
                f"{saved.state['world_size']} processes before, {runtime.world_size} now: the same examples in the "
                "same order; dropout is reseeded"
            )
        ours = {"threads": runtime.threads, "torch": torch.__version__, "shard": trainer.config.shard}
        ours["sums"] = runtime.sums
        for what, now in ours.items():
            if saved.state.get(what, "none") != now and saved.state["world_size"] == runtime.world_size:
                before = saved.state.get(what, "none")
                notes.append(f"{what} {before} before, {now} now: bits may differ from an uninterrupted run")
        notes += other_kernels(saved.state.get("kernels", {}), trainer.kernels)
    except checkpoint.DamagedCheckpoint as damage:
        problem = f"process {runtime.rank}: {damage}"
    problems = [text for text in runtime.gather_objects(problem) if text]
    if problems:
        raise UserError(f"{root}: {problems[0]}")
    notes.append(f"resumed from step {trainer.step:,}")
    return Resumed(notes, metrics_bytes, chain)


def other_kernels(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Notes on the settings that change the last bits of a resumed run; `before` is {} in an earlier version's."""
    changed = [name for name, value in now.items() if name in before and before[name] != value]
    notes = [f"{name} {before[name]} before, {now[name]} now: bits may differ" for name in changed]
    if now["device"] == "cuda" and now["deterministic"] == "off" and not changed:
        notes.append("on a GPU a resumed run has the bits of an uninterrupted one only under --deterministic")
    return notes


def restore(trainer: Trainer, saved: checkpoint.Checkpoint) -> None:
    """Restores a checkpoint; raises DamagedCheckpoint if it is intact but not of such a run."""
    try:
        trainer.restore(saved)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if lost_a_process(error) or out_of_memory(error):
            raise
        what = f"{type(error).__name__}: {first_line(error)}"
        raise checkpoint.DamagedCheckpoint(
            f"{checkpoint.folder_name(saved.step)}: its state is not that of this recipe ({what})"
        ) from error


def read_description(trainer: Trainer, notes: list[str]) -> dict[str, Any]:
    """run.json; empty if it can't be read and --resume rebuild is given, else raises UserError."""
    path = trainer.folder / "run.json"
    try:
        return files.read_json(path, DESCRIPTION_KIND)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if trainer.config.resume == "rebuild":
            notes.append(f"run.json: can't be read ({reason}); rewritten without its earlier launches")
            return {}
        raise UserError(
            f"{path}: can't be read ({reason}); restore it from a copy, or resume from the weights alone with "
            "--resume rebuild"
        ) from error


def described_by(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of run.json that a checkpoint's state has too, for `check_unchanged`."""
    return {
        "source_sha256": state.get("source_sha256"),
        "data": {
            "source": state["data"],
            "fingerprint": state.get("fingerprint"),
            "fingerprints": state.get("fingerprints"),
        },
        "settings": state.get("settings", {}),  # an earlier version has none
        "fields": state["fields"],
    }


def best_is_lost(root: Path, newest: checkpoint.Checkpoint, notes: list[str]) -> bool:
    """Whether the best checkpoint is damaged; if so, reports it and renames its folder."""
    best = newest.state["best"]
    if best is None or best["step"] == newest.step:
        return False
    path = root / checkpoint.folder_name(best["step"])
    try:
        checkpoint.read(path, checkpoint.nothing)
        return False
    except checkpoint.DamagedCheckpoint as damage:
        notes.append(f"the best checkpoint is damaged ({damage}): the best is chosen from later evaluations")
    with contextlib.suppress(OSError):  # for inspection; a copy can be restored under the old name
        path.rename(root / f"damaged-{path.name}")
    return True


def check_records(trainer: Trainer, size: int, chain: str | None, notes: list[str]) -> tuple[int, str]:
    """Bytes and chained hash of metrics.jsonl as a checkpoint expects it; raises UserError if it differs.

    size: the file's bytes when the checkpoint was saved; later records are not read. chain: the checkpoint's; None for
    an earlier version's. With --resume rebuild the file is rewritten with the intact records.
    """
    path = trainer.folder / FILE
    try:
        seals = verified(path, size) if size or path.exists() else Seals()
        problem = seals.problem()
        if not problem and chain not in (None, seals.chain):
            problem = f"{FILE}: not the records that the checkpoint was saved with"
    except (OSError, ValueError) as error:
        problem = f"{FILE}: {getattr(error, 'strerror', None) or error}"
    if not problem:
        return size, seals.chain
    if trainer.config.resume != "rebuild":
        raise UserError(
            f"{trainer.folder}: {problem}; restore it from a copy, or resume with the intact records by "
            "--resume rebuild"
        )
    kept = rebuild(path, size)
    notes.append(f"{problem}; rewritten with {kept.kept:,} intact records, {kept.lost:,} left out")
    return kept.size, kept.chain


def check_unchanged(trainer: Trainer, before: dict[str, Any]) -> None:
    """Raises UserError for the first field that differs from the run's own and must not."""
    recipe, config = trainer.recipe, trainer.config
    fields = comparable(trainer.fields)
    now = {"source": recipe.source_hash(), "data": trainer.data.source, "seed": config.seed, **fields}
    then = {
        "source": before["source_sha256"],
        "data": before["data"]["source"],
        "seed": before["settings"].get("seed", config.seed),
        **comparable(as_now(before["fields"], recipe)),
    }
    now["precision"] = config.precision
    then["precision"] = before["settings"].get("precision", config.precision)
    allowed = {name.replace("-", "_") for name in config.allow_change}
    for name in allowed - now.keys():
        raise UserError(f"--allow-change {name}: no such field; choose from {', '.join(sorted(now))}")
    known = before["data"].get("fingerprints") or {"train": before["data"].get("fingerprint")}  # of earlier versions
    ours = trainer.fingerprints
    others = [
        name for name, theirs in known.items() if theirs and ours.get(name) and not same_examples(ours[name], theirs)
    ]
    if others and "data" not in allowed:
        which = "training" if others[0] == "train" else others[0]
        by_fields = allowed & recipe.fields().keys()
        why = f", perhaps by --allow-change {' '.join(sorted(by_fields))}" if by_fields else ""
        remedy = f"--allow-change {' '.join(sorted({*allowed, 'data'}))}"
        raise UserError(
            f"--run {trainer.folder.name}: the {which} examples of {trainer.data.source!r} have changed since the run "
            f"began{why}; restore them, give another --run, or give {remedy}"
        )
    if (changed := changed_helper(recipe, before)) and "source" not in allowed:
        raise UserError(
            f"--run {trainer.folder.name}: {changed}, which the recipe imports, has changed since the run began; "
            "restore it, give another --run, or give --allow-change source"
        )
    # for fields that were added after the run began
    missing = dataclasses.MISSING
    defaults = {
        field.name: to_json(field.default if field.default_factory is missing else field.default_factory())
        for field in dataclasses.fields(recipe)
    }
    for name, value in now.items():
        old = then.get(name, defaults.get(name))
        if old != value and name not in allowed:
            was = files.printable(str(old))
            what = "the recipe's file has changed" if name == "source" else f"{name} has changed from {was} to {value}"
            raise UserError(
                f"--run {trainer.folder.name}: {what} since the run began; restore it, give another --run, or give "
                f"--allow-change {name}"
            )


def changed_helper(recipe: Recipe, before: Mapping[str, Any]) -> str:
    """The first module beside the recipe whose source differs from run.json's; "" if none does."""
    then, now = before.get("modules"), helpers.hashes(recipe.helpers())
    if not isinstance(then, dict):
        return ""  # a run of an earlier version
    return next((place for place in sorted({*then, *now}) if then.get(place) != now.get(place)), "")

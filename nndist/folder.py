"""A run's folder: made, locked, described in run.json, and gone on with after an interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save

from . import checkpoint, helpers, kept
from .config import RunConfig
from .data import Data, Resident, as_is
from .errors import UserError
from .fields import comparable
from .loop import Trainer, finite
from .recipe import Recipe
from .runtime import Runtime

T = TypeVar("T")


def make_folder(recipe: Recipe, config: RunConfig) -> tuple[str, bool]:
    """The folder of the run, and whether it is one that goes on; raises UserError where it can't be either."""
    parent = Path(config.runs_dir).expanduser() / recipe.name
    if config.resume == "must" and config.run is None:
        raise UserError("--resume must: say which run with --run")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if config.check:
            return tempfile.mkdtemp(prefix=".check-", dir=parent), False
        name = config.run or datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        folder = parent / name
        number = 1
        while config.run is None and folder.exists():  # two runs in one second
            number += 1
            folder = parent / f"{name}-{number}"
        exists = (folder / "run.json").exists() or bool(checkpoint.listed(folder / "checkpoints"))
        if exists and config.resume == "never":
            raise UserError(f"--run {config.run}: {folder} exists, and --resume is never; give another name")
        if not exists and config.resume == "must":
            raise UserError(f"--resume must: there is no run at {folder}")
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--runs-dir {config.runs_dir}: {error.filename}: {error.strerror}; choose another") from error
    return str(folder), exists


LOCK_PATIENCE_SECONDS = 5.0  # how long a predecessor that is being ended may still hold a run


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps a second launch out of a run that is being trained; the system lets go when this process ends, however.

    It is a lock of POSIX's, which loader processes do not inherit: with flock they would keep it for some seconds
    after their parent was killed.
    """
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    with (folder / "lock").open("a+") as file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    raise UserError(
                        f"--run {folder.name}: {folder} is being trained by process {holder}; "
                        "wait for it or give another name"
                    ) from error
                time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def resume(trainer: Trainer) -> tuple[list[str], int]:
    """Brings an earlier launch's run back to its newest good checkpoint.

    Gives what the user should know, and how many bytes of metrics.jsonl are kept. Raises UserError where the run was
    trained on something else, or where all its checkpoints are damaged.
    """
    runtime, root = trainer.runtime, trainer.folder / "checkpoints"
    notes: list[str] = []

    def choose() -> str | None:
        try:
            check_unchanged(trainer, json.loads((trainer.folder / "run.json").read_text()))
        except (OSError, ValueError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{trainer.folder}/run.json: can't be read ({reason}); restore it from a copy") from error
        found = checkpoint.newest_good(root, notes.append)
        if found is None:
            return None
        checkpoint.clear_leftovers(root, found.state["saved"])
        return checkpoint.folder_name(found.step)

    name = on_main(runtime, choose)
    if name is None:
        return [*notes, "no checkpoint yet: the run starts again from its first step"], 0
    problem = ""
    metrics_bytes = 0
    try:
        saved = trainer.sharding.read(root / name, trainer.networks)
        trainer.restore(saved)
        metrics_bytes = saved.state["metrics_bytes"]
        if saved.state["world_size"] != runtime.world_size:
            notes.append(
                f"{saved.state['world_size']} processes before, {runtime.world_size} now: the same examples in the "
                "same order; dropout is seeded anew"
            )
        ours = {"threads": runtime.threads, "torch": torch.__version__, "shard": trainer.config.shard}
        ours["sums"] = runtime.sums
        for what, now in ours.items():
            if saved.state.get(what, "none") != now and saved.state["world_size"] == runtime.world_size:
                notes.append(
                    f"{what} {saved.state.get(what, 'none')} before, {now} now: bits may differ from an undisturbed run"
                )
    except checkpoint.DamagedCheckpoint as damage:
        problem = f"process {runtime.rank}: {damage}"
    problems = [text for text in runtime.gather_objects(problem) if text]
    if problems:
        raise UserError(f"{root}: {problems[0]}")
    notes.append(f"the run goes on after step {trainer.step:,}")
    return notes, metrics_bytes


def check_unchanged(trainer: Trainer, before: dict[str, Any]) -> None:
    """Raises UserError naming the first field that differs from the run's own and may not."""
    recipe, config = trainer.recipe, trainer.config
    fields = comparable(recipe.fields())
    now = {"source": recipe.source_hash(), "data": trainer.data.source, "seed": config.seed, **fields}
    then = {
        "source": before["source_sha256"],
        "data": before["data"]["source"],
        "seed": before["settings"]["seed"],
        **comparable(before["fields"]),
    }
    now["precision"], then["precision"] = config.precision, before["settings"]["precision"]
    allowed = {name.replace("-", "_") for name in config.allow_change}
    for name in allowed - now.keys():
        raise UserError(f"--allow-change {name}: no such field; there is {', '.join(sorted(now))}")
    ours, theirs = trainer.fingerprint, before["data"].get("fingerprint")
    if ours and theirs and ours != theirs and "data" not in allowed:
        by_fields = allowed & recipe.fields().keys()
        why = f", perhaps by --allow-change {' '.join(sorted(by_fields))}" if by_fields else ""
        remedy = f"--allow-change {' '.join(sorted({*allowed, 'data'}))}"
        raise UserError(
            f"--run {trainer.folder.name}: the training examples of {trainer.data.source!r} have changed since the run "
            f"began{why}; put them back, give another --run, or say {remedy}"
        )
    if (changed := changed_helper(recipe, before)) and "source" not in allowed:
        raise UserError(
            f"--run {trainer.folder.name}: {changed}, which the recipe imports, has changed since the run began; set "
            "it back, give another --run, or say --allow-change source"
        )
    for name, value in now.items():
        if then.get(name) != value and name not in allowed:
            what = "the recipe's file has changed" if name == "source" else f"{name} was {then.get(name)}, is {value}"
            raise UserError(
                f"--run {trainer.folder.name}: {what} since the run began; set it back, give another --run, or say "
                f"--allow-change {name}"
            )


def changed_helper(recipe: Recipe, before: Mapping[str, Any]) -> str:
    """The first module beside the recipe whose text is not the one that run.json has; "" where none is."""
    then, now = before.get("modules"), helpers.hashes(recipe.helpers())
    if not isinstance(then, dict):
        return ""  # a run of an earlier version
    return next((place for place in sorted({*then, *now}) if then.get(place) != now.get(place)), "")


def plan(trainer: Trainer) -> dict[str, str]:
    """What is about to happen, for a person, in a few lines of at most 80 columns where names allow."""
    recipe, runtime, data, feed = trainer.recipe, trainer.runtime, trainer.data, trainer.feed
    sizes = [f"{name} {sum(p.numel() for p in net.parameters()):,}" for name, net in trainer.networks.items()]
    processes, accumulate = runtime.world_size, feed.accumulate
    per_process = recipe.batch_size / processes / accumulate
    share = f"{per_process:g}" if per_process.is_integer() else f"{per_process:.1f} (uneven)"
    tests = ", ".join(f"{len(examples):,} {name}" for name, examples in data.evaluation_sets().items())
    of = "" if trainer.last_step == trainer.total_steps else f", stopping after {trainer.last_step:,}"
    return {
        "recipe": f"{recipe.name}: {title(recipe)}" + (f" (document {recipe.document})" if recipe.document else ""),
        "data": f"{data.source}: {len(data.train):,} to train on, {tests}",
        "network": ", ".join(sizes) + " parameters",
        "device": f"{runtime.describe()}, {runtime.precision}",
        "engine": trainer.engine.name + (f"; {trainer.engine.note}" if trainer.engine.note else ""),
        **({"shard": trainer.sharding.note} if trainer.sharding.note else {}),
        "batch": f"{recipe.batch_size} = {share} per process x {processes} x {accumulate} accumulated",
        **({"memory": note} if (note := trainer.micro_batches.note()) else {}),
        "steps": f"{trainer.total_steps:,} = {feed.steps_per_epoch:,} x {recipe.epochs} epochs{of}",
        **({"best": f"{recipe.best}, {recipe.best_direction()}"} if recipe.best else {}),
        "run": "a temporary folder" if trainer.config.check else str(trainer.folder),
    }


def title(recipe: Recipe) -> str:
    """What the recipe says of itself in the first line of its class."""
    said = (type(recipe).__doc__ or "").strip()
    if said.startswith(f"{type(recipe).__name__}("):  # a dataclass without a docstring is given its signature
        said = ""
    return (said or recipe.name).splitlines()[0].rstrip(".")


def write_description(trainer: Trainer, status: str) -> None:
    """Writes run.json, with a line for each launch that has trained the run."""
    path = trainer.folder / "run.json"
    source = trainer.recipe.source()
    copy = trainer.folder / checkpoint.RECIPE
    if source is not None and not (copy.exists() and copy.read_bytes() == source):
        checkpoint.write_whole(copy, source)  # before run.json, which has its hash
    if status == "running" and trainer.launch == 0:
        keep_helpers(trainer)
    before = json.loads(path.read_text()) if path.exists() else {}
    launches = before.get("launches", [])
    now = description(trainer, status)
    if status == "running":
        if not launches or trainer.launch != len(launches):
            host = platform.node()
            launches.append(
                {"from_step": trainer.step, "world_size": now["world_size"], "host": host, "began": now["updated"]}
            )
            trainer.launch = len(launches)
        now["fields"] = before.get("fields", now["fields"]) | now["fields"]
    elapsed = round(time.perf_counter() - trainer.began, 1)
    launches[-1] |= {"to_step": trainer.step, "status": status, "seconds": elapsed}
    seconds = round(sum(launch.get("seconds", 0.0) for launch in launches), 1)
    checkpoint.write_json(path, {**now, "seconds": seconds, "launches": launches})


def keep_helpers(trainer: Trainer) -> None:
    """Copies what the recipe imports from beside it, and the tensors that its data has found, into the folder."""
    folder = trainer.folder / helpers.FOLDER
    for place, text in trainer.recipe.helpers().items():
        copy = folder / place
        if not (copy.exists() and copy.read_bytes() == text):
            copy.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_whole(copy, text)
    if tensors := trainer.found[1]:
        checkpoint.write_whole(trainer.folder / kept.FILE, save(tensors))


def columns_of(data: Data) -> int | None:
    """How many numbers an input of the networks is, 0 for a number alone; None where it is made of something else.

    By this a row is read, and answered, where the data are away.
    """
    if not isinstance(data.test, Resident) or data.prepare is not as_is:
        return None
    first = data.test.tensors[0]
    if not first.is_floating_point() or first.dim() > 2:
        return None
    return first.shape[1] if first.dim() == 2 else 0


def ended(trainer: Trainer) -> str:
    """How a run ended that has not been trained to its last step, for a person; "" where it has."""
    if trainer.stopped_early:
        return f"{trainer.stopped_early} (step {trainer.step:,} of {trainer.total_steps:,})"
    if trainer.step < trainer.total_steps:
        return f"stopped at --max-steps {trainer.step:,} of {trainer.total_steps:,}"
    return ""


def description(trainer: Trainer, status: str) -> dict[str, Any]:
    """run.json: everything that says what this run is."""
    import accelerate

    recipe, runtime = trainer.recipe, trainer.runtime
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(trainer.config).items()}
    now = datetime.now().isoformat(timespec="seconds")
    return {
        "recipe": recipe.name,
        "title": title(recipe),
        "document": recipe.document,
        "documented": recipe.documented,
        "plan": plan(trainer),
        "source_sha256": recipe.source_hash(),
        "recipe_file": str(recipe.file) if recipe.file else None,
        "recipe_class": type(recipe).__name__,
        "fields": recipe.fields(),
        "headline": list(recipe.headline),
        "modules": helpers.hashes(recipe.helpers()),
        "found": trainer.found[0],
        "columns": columns_of(trainer.data),
        "classes": [str(name) for name in trainer.data.classes],
        "settings": settings,
        "data": {
            "source": trainer.data.source,
            "fingerprint": trainer.fingerprint,
            "train": len(trainer.data.train),
            **{name: len(examples) for name, examples in trainer.data.evaluation_sets().items()},
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
        },
        "device": runtime.describe(),
        "world_size": runtime.world_size,
        "threads": runtime.threads,
        "command": sys.argv,
        "updated": now,
        "status": status,
        "ended": ended(trainer) if status in ("finished", "cut") else "",
        "step": trainer.step,
        "total_steps": trainer.total_steps,
        "scores": finite(trainer.scores),
        "best": finite(trainer.best),
    }


def state_bytes(trainer: Trainer) -> int:
    """About what a checkpoint takes: the weights, their average, and two tensors of the optimizer for each."""
    weights = sum(t.numel() * t.element_size() for net in trainer.networks.values() for t in net.state_dict().values())
    return 4 * weights + 2**20


def on_main(runtime: Runtime, action: Callable[[], T]) -> T:
    """What `action` (JSON-like) gives on the main process, on all; a UserError there is raised on all."""
    answer: list[Any] = [None, None]
    if runtime.is_main:
        try:
            answer[0] = action()
        except UserError as error:
            answer[1] = str(error)
    value, reason = runtime.from_main(answer)
    if reason is not None:
        raise UserError(reason)
    return value

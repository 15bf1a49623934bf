"""A run's folder: made, locked, described in run.json, and gone on with after an interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import save

from .. import files
from ..config import RunConfig
from ..data.sets import Data, Resident, as_is
from ..distributed.runtime import Runtime
from ..errors import UserError, first_line, lost_a_process, of_the_disk, out_of_memory
from ..files import Each, finite, open_to_append
from ..recipe import helpers, kept
from ..recipe.contract import Recipe
from ..recipe.fields import as_now, comparable, to_json
from ..runs import checkpoint
from ..runs.network_state import own_tensors
from ..runs.records import FILE, Seals, rebuild, verified
from .trainer import Trainer

T = TypeVar("T")
DESCRIPTION_KIND = {
    "recipe": str,
    "recipe_class?": str,
    "recipe_file?": (str, None),
    "source_sha256": (str, None),
    "fields": dict,
    "found?": dict,
    "classes?": [str],
    "command?": [str],
    "settings": {
        "seed": int,
        "precision": str,
        "data_source?": str,
        "data_dir?": str,
        "eval_batch_size?": int,
        "num_workers?": int,
        "cache_gigabytes?": float,
    },
    "data": {"source": str, "fingerprint?": (str, None)},
    "scores?": (None, Each((float, None))),
    "best?": (None, {"step": int, "scores": Each((float, None))}),
    "launches?": [{"seconds?": float}],
}
"""What run.json must hold for a run to be gone on with or used (see files.check)."""


def make_folder(recipe: Recipe, config: RunConfig) -> tuple[str, bool]:
    """The folder of the run, and whether it is one that goes on; raises UserError where it can't be either."""
    parent = Path(config.runs_dir).expanduser() / recipe.name
    if config.resume in ("must", "rebuild") and config.run is None:
        raise UserError(f"--resume {config.resume}: say which run with --run")
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
        exists = (folder / "run.json").exists() or bool(checkpoint.checkpoints_in(folder / "checkpoints"))
        if exists and config.resume == "never":
            raise UserError(f"--run {config.run}: {folder} exists, and --resume is never; give another name")
        if not exists and config.resume in ("must", "rebuild"):
            raise UserError(f"--resume {config.resume}: there is no run at {folder}")
        folder.mkdir(exist_ok=True)
    except OSError as error:
        where = error.filename or parent
        raise UserError(f"--runs-dir {config.runs_dir}: {where}: {error.strerror}; choose another") from error
    return str(folder), exists


LOCK_PATIENCE_SECONDS = 5.0  # how long a predecessor that is being ended may still hold a run


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keeps a second launch out of a run that is being trained; the system lets go when this process ends, however.

    It is a lock of POSIX's, which loader processes do not inherit: with flock they would keep it for some seconds
    after their parent was killed.
    """
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    try:
        file = open_to_append(folder / "lock")
    except OSError as error:
        raise UserError(f"{folder}/lock: {error.strerror}; remove it, or choose another --runs-dir") from error
    with file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    file.seek(0)
                    holder = file.read(20).decode(errors="replace").strip() or "unknown"
                    raise UserError(
                        f"--run {folder.name}: {folder} is being trained by process {holder}; "
                        "wait for it or give another name"
                    ) from error
                time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
        yield


class Resumed(NamedTuple):
    """A run that goes on: what the user should know, how much of metrics.jsonl is kept, and the hash that ends it."""

    notes: list[str]
    metrics_bytes: int
    chain: str


def resume(trainer: Trainer) -> Resumed:
    """Brings an earlier launch's run back to its newest good checkpoint.

    Raises UserError where the run was trained on something else, where all its checkpoints are damaged, or where what
    else is known of it is damaged and --resume rebuild does not say to go on without.
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
        said = described.get("step")
        ended = described.get("status") in ("finished", "cut", "preempted")
        if ended and isinstance(said, int) and found.step < said and said not in dict(checkpoint.checkpoints_in(root)):
            notes.append(f"run.json speaks of step {said:,}, whose checkpoint is gone")
        if not described:
            check_unchanged(trainer, described_by(state))
        lost = best_is_lost(root, found, notes)
        records = check_records(trainer, state["metrics_bytes"], state.get("metrics_chain"), notes)
        checkpoint.clear_leftovers(root, state["saved"])
        return [checkpoint.folder_name(found.step), lost, *records]

    name, best_lost, metrics_bytes, chain = on_main(runtime, choose)
    if not name:
        return Resumed([*notes, "no checkpoint yet: the run starts again from its first step"], 0, "")
    problem = ""
    try:
        saved = checkpoint.check_state(trainer.sharding.read(root / name, trainer.networks))
        restore(trainer, saved)
        if best_lost:
            trainer.saved = [step for step in trainer.saved if step != saved.state["best"]["step"]]
            trainer.best = None
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
    return Resumed(notes, metrics_bytes, chain)


def restore(trainer: Trainer, saved: checkpoint.Checkpoint) -> None:
    """Puts a checkpoint back; raises DamagedCheckpoint where it is whole and yet not of such a run."""
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
    """run.json; empty where it can't be read and --resume rebuild says to go on without. Raises UserError."""
    path = trainer.folder / "run.json"
    try:
        return files.read_json(path, DESCRIPTION_KIND)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if trainer.config.resume == "rebuild":
            notes.append(f"run.json: can't be read ({reason}); written anew, without its earlier launches")
            return {}
        raise UserError(
            f"{path}: can't be read ({reason}); restore it from a copy, or go on from the weights alone with "
            "--resume rebuild"
        ) from error


def described_by(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of run.json a checkpoint's state says too, as `check_unchanged` takes it."""
    return {
        "source_sha256": state.get("source_sha256"),
        "data": {"source": state["data"], "fingerprint": state.get("fingerprint")},
        "settings": state.get("settings", {}),  # of an earlier version: not known
        "fields": state["fields"],
    }


def best_is_lost(root: Path, newest: checkpoint.Checkpoint, notes: list[str]) -> bool:
    """Whether the best checkpoint is not whole, which is then said; its folder is put aside."""
    best = newest.state["best"]
    if best is None or best["step"] == newest.step:
        return False
    path = root / checkpoint.folder_name(best["step"])
    try:
        checkpoint.read(path, checkpoint.nothing)
        return False
    except checkpoint.DamagedCheckpoint as damage:
        notes.append(f"the best checkpoint is damaged ({damage}): the best is from here on that of what follows")
    with contextlib.suppress(OSError):  # for a person to look at; a copy can be put back under the old name
        path.rename(root / f"damaged-{path.name}")
    return True


def check_records(trainer: Trainer, size: int, chain: str | None, notes: list[str]) -> tuple[int, str]:
    """Bytes and chain of metrics.jsonl as a checkpoint counts on it; raises UserError where it is something else.

    chain: what the checkpoint says; None of an earlier version's. With --resume rebuild the file is written anew with
    the records that are whole.
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
            f"{trainer.folder}: {problem}; restore it from a copy, or go on with the records that are whole by "
            "--resume rebuild"
        )
    kept = rebuild(path, size)
    notes.append(f"{problem}; written anew with {kept.kept:,} records that are whole, {kept.lost:,} left out")
    return kept.size, kept.chain


def check_unchanged(trainer: Trainer, before: dict[str, Any]) -> None:
    """Raises UserError naming the first field that differs from the run's own and may not."""
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
    # of fields that came later than the run
    missing = dataclasses.MISSING
    defaults = {
        field.name: to_json(field.default if field.default_factory is missing else field.default_factory())
        for field in dataclasses.fields(recipe)
    }
    for name, value in now.items():
        before_now = then.get(name, defaults.get(name))
        if before_now != value and name not in allowed:
            what = "the recipe's file has changed" if name == "source" else f"{name} was {before_now}, is {value}"
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
        **({"gradients": added_up(trainer)} if processes > 1 and not trainer.sharding.divided else {}),
        **({"shard": trainer.sharding.note} if trainer.sharding.note else {}),
        "batch": f"{recipe.batch_size} = {share} per process x {processes} x {accumulate} accumulated",
        **({"memory": note} if (note := trainer.micro_batches.note()) else {}),
        "steps": f"{trainer.total_steps:,} = {feed.steps_per_epoch:,} x {recipe.epochs} epochs{of}",
        **({"best": f"{recipe.best}, {recipe.best_direction()}"} if recipe.best else {}),
        "run": "a temporary folder" if trainer.config.check else str(trainer.folder),
    }


def added_up(trainer: Trainer) -> str:
    """How the processes add up their gradients."""
    if trainer.config.gradient_sync == "ddp":
        return "averaged by DDP during the backward pass"
    return f"added up once per step, by {trainer.runtime.sums}"


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
    if source is not None and not _holds(copy, source):
        files.write_whole(copy, source)  # before run.json, which has its hash
    begins = not trainer.described
    if begins:
        keep_helpers(trainer)
    before = trainer.described or _before(path)  # what this launch wrote stands, whatever became of the file
    launches = [dict(launch) for launch in before.get("launches", [])]
    now = description(trainer, status)
    if begins:
        host = platform.node()
        launches.append(
            {"from_step": trainer.step, "world_size": now["world_size"], "host": host, "began": now["updated"]}
        )
    if status == "running":
        now["fields"] = before.get("fields", now["fields"]) | now["fields"]
    elapsed = round(time.perf_counter() - trainer.began, 1)
    launches[-1] |= {"to_step": trainer.step, "status": status, "seconds": elapsed}
    seconds = round(sum(launch.get("seconds", 0.0) for launch in launches), 1)
    trainer.described = {**now, "seconds": seconds, "launches": launches}
    files.write_json(path, trainer.described)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return files.read_bytes(path) == data
    except OSError:
        return False


def _before(path: Path) -> dict[str, Any]:
    """run.json of an earlier launch, where there is one; `read_description` has said what is wrong with it."""
    try:
        return files.read_json(path, DESCRIPTION_KIND)
    except (OSError, ValueError):
        return {}


def keep_helpers(trainer: Trainer) -> None:
    """Copies what the recipe imports from beside it, and the tensors that its data has found, into the folder."""
    folder = trainer.folder / helpers.FOLDER
    for place, text in trainer.recipe.helpers().items():
        copy = folder / place
        if not (copy.exists() and copy.read_bytes() == text):
            copy.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(copy, text)
    if tensors := trainer.found[1]:
        files.write_whole(trainer.folder / kept.FILE, save(tensors))


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
        "fields": trainer.fields,
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
            **({"at_end": list(at_end)} if (at_end := trainer.data.sets_at_end()) else {}),
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
        **({"tested": trainer.tested} if trainer.data.sets_at_end() else {}),
        "metrics_chain": trainer.tracker.chain,
    }


def state_bytes(trainer: Trainer) -> int:
    """About what a checkpoint takes: the weights, their average, and two tensors of the optimizer for each."""
    tensors = (t for network in trainer.networks.values() for t in own_tensors(network).values())
    weights = sum(t.numel() * t.element_size() for t in tensors)
    return 4 * weights + 2**20


def on_main(runtime: Runtime, action: Callable[[], T]) -> T:
    """What `action` (JSON-like) gives on the main process, on all; a UserError there is raised on all."""
    answer: list[Any] = [None, None]
    if runtime.is_main:
        try:
            answer[0] = action()
        except UserError as error:
            answer[1] = str(error)
        except OSError as error:
            answer[1] = of_the_disk(error)
            if not answer[1]:
                raise
    value, reason = runtime.from_main(answer)
    if reason is not None:
        raise UserError(reason)
    return value

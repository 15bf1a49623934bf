"""How a run describes itself: the plan in the terminal, and run.json."""

from __future__ import annotations

import dataclasses
import functools
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import files
from ..data.sets import Data, Resident, as_is
from ..files import Each, finite
from ..metrics import text_of
from ..recipe import helpers, kept, trust
from ..recipe.contract import Recipe
from ..runs import checkpoint, checkpoint_writer
from ..stores import redacted
from .layers import layers_of

if TYPE_CHECKING:
    from .trainer import Trainer

GIT_SECONDS = 3.0  # a repository that is slower is not described

DESCRIPTION_KIND = {
    "recipe": str,
    "recipe_class?": str,
    "recipe_file?": (str, None),
    "source_sha256": (str, None),
    "fields": dict,
    "found?": dict,
    "classes?": [str],
    "inputs?": dict,
    "layers?": dict,
    "command?": [str],
    "settings": {
        "seed": int,
        "precision": str,
        "channels_last?": str,
        "data_source?": str,
        "data_dir?": str,
        "eval_batch_size?": int,
        "num_workers?": int,
        "cache_gigabytes?": float,
    },
    "data": {"source": str, "fingerprint?": (str, None), "fingerprints?": (None, Each(str))},
    "scores?": (None, Each((float, None))),
    "best?": (None, {"step": int, "scores": Each((float, None))}),
    "launches?": [{"seconds?": float}],
}
"""What run.json must hold for a run to be resumed or used (see files.check)."""


def plan(trainer: Trainer) -> dict[str, str]:
    """The plan: what is about to happen, in a few lines of at most 80 columns if names allow."""
    recipe, runtime, data, feed = trainer.recipe, trainer.runtime, trainer.data, trainer.feed
    sizes = [f"{name} {parameters_of(network)}" for name, network in trainer.networks.items()]
    processes, accumulate = runtime.world_size, feed.accumulate
    per_process = feed.batch_size / processes / accumulate
    share = f"{per_process:g}" if per_process.is_integer() else f"{per_process:.1f} (uneven)"
    tests = ", ".join(f"{len(examples):,} {name}" for name, examples in data.evaluation_sets().items())
    stop = "" if trainer.last_step == trainer.total_steps else f", stopping after {trainer.last_step:,}"
    stop += " (--check)" * trainer.config.check
    epochs = f"{trainer.epochs} epoch{'s' * (trainer.epochs > 1)}"
    base = trainer.baseline
    return {
        "recipe": f"{recipe.name}: {title(recipe)}" + (f" (document {recipe.document})" if recipe.document else ""),
        "data": f"{data.source}: {len(data.train):,} to train on, {tests}",
        **data.plan,
        "network": ", ".join(sizes),
        "device": f"{runtime.describe()}, {runtime.precision}",
        **({"gradients": gradients_summed(trainer)} if processes > 1 and not trainer.sharding.is_sharded else {}),
        **({"shard": trainer.sharding.note} if trainer.sharding.note else {}),
        "batch": f"{feed.batch_size} = {share} per process x {processes} x {accumulate} accumulated",
        **({"memory": note} if (note := trainer.micro_batches.note()) else {}),
        **({"recheck": note} if (note := trainer.recheck.note()) else {}),
        "steps": f"{trainer.total_steps:,} = {feed.steps_per_epoch:,} x {epochs}{stop}",
        **({"best": f"{recipe.best}, {recipe.best_direction()}"} if recipe.best else {}),
        **({"baseline": f"{base['run']}: {text_of(base['scores'])}  ({base['data']})"} if base else {}),
        "run": "a temporary folder" if trainer.config.check else str(trainer.folder),
        **({"kept in": trainer.storage.url} if trainer.storage.url else {}),
    }


def parameters_of(network: nn.Module) -> str:
    """The number of parameters, and of trained ones if some are frozen."""
    total = sum(parameter.numel() for parameter in network.parameters())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return f"{total:,} parameters" + (f" ({trained:,} trained)" if trained < total else "")


def gradients_summed(trainer: Trainer) -> str:
    """How gradients are summed over the processes."""
    if trainer.config.gradient_sync == "ddp":
        return "averaged by DDP during the backward pass"
    return f"summed once per step, via {trainer.runtime.sums}"


def title(recipe: Recipe) -> str:
    """The first line of the recipe's docstring, else its name."""
    doc = (type(recipe).__doc__ or "").strip()
    if doc.startswith(f"{type(recipe).__name__}("):  # the default docstring of a dataclass
        doc = ""
    return (doc or recipe.name).splitlines()[0].rstrip(".")


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
        if source is not None:
            file = trainer.recipe.file
            trust.record(source, trainer.recipe.helpers(), file.parent if file else None)
    before = trainer.described or _before(path)  # what this launch wrote counts, whatever became of the file
    launches = [dict(launch) for launch in before.get("launches", [])]
    now = description(trainer, status)
    if initial := trainer.initial.about() if trainer.initial else before.get("initial_weights"):
        now["initial_weights"] = initial
    if begins:
        host = platform.node()
        launches.append(
            {"from_step": trainer.step, "world_size": now["world_size"], "host": host, "began": now["updated"]}
        )
    if not now["inputs"]:  # this launch has not evaluated yet
        now["inputs"] = before.get("inputs", {})
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
    """run.json of an earlier launch, if there is one; `read_description` has reported what is wrong with it."""
    try:
        return files.read_json(path, DESCRIPTION_KIND)
    except (OSError, ValueError):
        return {}


def keep_helpers(trainer: Trainer) -> None:
    """Copies the modules beside the recipe that it imports, and the tensors that its data() set, into the folder."""
    folder = trainer.folder / helpers.FOLDER
    for place, text in trainer.recipe.helpers().items():
        copy = folder / place
        if not _holds(copy, text):
            copy.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(copy, text)
    if tensors := trainer.found[1]:
        checkpoint_writer.publish_file(trainer.folder / kept.FILE, tensors, sealed=True)


def columns_of(data: Data) -> int | None:
    """How many numbers one network input has, 0 for a scalar; None if it is not made of numbers.

    Prediction reads rows by it when the data are not available.
    """
    if not isinstance(data.test, Resident) or data.prepare is not as_is:
        return None
    first = data.test.tensors[0]
    if not first.is_floating_point() or first.dim() > 2:
        return None
    return first.shape[1] if first.dim() == 2 else 0


def ended(trainer: Trainer) -> str:
    """How a run ended before its last step, for a person; "" if it did not."""
    if trainer.best.stopped:
        return f"{trainer.best.stopped} (step {trainer.step:,} of {trainer.total_steps:,})"
    if trainer.step < trainer.total_steps:
        return f"stopped at --max-steps {trainer.step:,} of {trainer.total_steps:,}"
    return ""


def without_secrets(command: Sequence[str]) -> list[str]:
    """A command line without the value of --notify."""
    shown = [re.sub(r"^--notify=.*", "--notify=...", word, flags=re.DOTALL) for word in command]
    return ["..." if before == "--notify" else word for before, word in zip(["", *shown], shown, strict=False)]


@functools.cache
def commit_of(file: Path | None) -> dict[str, Any]:
    """The git commit of a recipe's repository, and whether tracked files there differ from it; {} if there is none."""
    if file is None:
        return {}

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(file.absolute().parent), *words]
        return subprocess.run(command, capture_output=True, timeout=GIT_SECONDS, check=True).stdout.decode().strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return {}


def description(trainer: Trainer, status: str) -> dict[str, Any]:
    """The contents of run.json: everything that describes this run."""
    import accelerate

    recipe, runtime = trainer.recipe, trainer.runtime
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(trainer.config).items()}
    del settings["notify"]  # it may hold a secret address
    settings["runs_dir"] = redacted(str(settings["runs_dir"]))
    now = datetime.now().isoformat(timespec="seconds")
    return {
        "recipe": recipe.name,
        "title": title(recipe),
        "document": recipe.document,
        "documented": recipe.documented,
        **({"baseline": trainer.baseline} if trainer.baseline else {}),
        "plan": plan(trainer),
        "source_sha256": recipe.source_hash(),
        "recipe_file": str(recipe.file) if recipe.file else None,
        "recipe_class": type(recipe).__name__,
        "fields": trainer.fields,
        "headline": list(recipe.headline),
        "modules": helpers.hashes(recipe.helpers()),
        "found": trainer.found[0],
        "columns": columns_of(trainer.data),
        "inputs": trainer.inputs,
        "layers": layers_of(trainer.networks),
        "classes": [str(name) for name in trainer.data.classes],
        "settings": settings,
        "data": {
            "source": trainer.data.source,
            "fingerprint": trainer.fingerprints["train"],
            "fingerprints": trainer.fingerprints,
            "train": len(trainer.data.train),
            **{name: len(examples) for name, examples in trainer.data.evaluation_sets().items()},
            **({"at_end": list(at_end)} if (at_end := trainer.data.sets_at_end()) else {}),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
        },
        **({"git": commit} if (commit := commit_of(recipe.file)) else {}),
        "device": runtime.describe(),
        "processes": trainer.pace.summary(trainer.hosts),
        "world_size": runtime.world_size,
        "threads": runtime.threads,
        "command": [redacted(word) for word in without_secrets(sys.argv)],
        "updated": now,
        "status": status,
        "ended": ended(trainer) if status in ("finished", "cut") else "",
        "problem": trainer.problem,
        "step": trainer.step,
        "total_steps": trainer.total_steps,
        "scores": finite(trainer.scores),
        "best": finite(trainer.best.record),
        **({"tested": trainer.tested} if trainer.data.sets_at_end() else {}),
        "metrics_chain": trainer.tracker.chain,
    }

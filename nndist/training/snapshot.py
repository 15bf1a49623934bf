"""The training state as a checkpoint holds it: taken from the trainer, and restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..files import finite, known
from ..metrics import Means
from ..recipe import kept
from ..recipe.fields import as_now, comparable
from ..runs import checkpoint, network_state, optimizer_state, random_state
from ..runs.python_state import Change, PythonState
from ..torch_internals import without_compiler

if TYPE_CHECKING:
    from ..recipe.contract import Recipe
    from .trainer import Trainer


class Snapshot(NamedTuple):
    """tensors: by file and name, sharded as the networks are. whole: unsharded files. state: the rest, JSON-like."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    whole: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def take(trainer: Trainer) -> Snapshot | None:
    """The current state; None on a process that writes nothing. A collective.

    Raises TrainingError on all processes if their weights differ.
    """
    runtime = trainer.runtime
    trainer.check_parameters()  # on all processes: each must raise
    random_tensors, random_rest = random_state.random_state(runtime.device)
    everyones = runtime.gather_bytes(random_state.pack(random_tensors))
    python_rest, python_tensors = _python_changes(trainer)
    mine = {"random": random_rest, "window": trainer.window.means.state(), "python": python_rest}
    ranks = runtime.gather_objects({**mine, "weights": checksum(trainer)})
    check_identical([rank.pop("weights") for rank in ranks], trainer.step)
    everyones_python = runtime.gather_tensors(python_tensors)
    if not (runtime.is_main or trainer.sharding.is_sharded):
        return None
    tensors = network_state.files_of(trainer.networks, trainer.names)
    if (average := trainer.average.state()) is not None:
        tensors["ema.safetensors"] = checkpoint.network_tensors(average)
    tensors["optimizer.safetensors"], optimizer_rest = optimizer_state.optimizer_state(
        trainer.optimizers, trainer.networks
    )
    extra_rest, extra_tensors = network_state.extra_states(trainer.networks)
    generators = {
        f"{rank}/{name}": tensor
        for rank, packed in enumerate(everyones)
        for name, tensor in random_state.unpack(packed, random_tensors).items()
    }
    whole = {"random.safetensors": generators}
    python = {f"{rank}/{name}": t for rank, found in enumerate(everyones_python) for name, t in found.items()}
    python |= {f"extra/{name}": tensor for name, tensor in extra_tensors.items()}
    if python:
        whole["python.safetensors"] = python
    rest = {
        "epoch": trainer.epoch,
        "batch": trainer.batch,
        "batch_size": trainer.feed.batch_size,
        "order": trainer.epoch_watch.order,
        "accumulate": trainer.micro_batches.state(),
        "examples_in_window": trainer.window.examples,
        "counted_in_window": dict(trainer.window.counted),
        "learning_rates": trainer.rates.state(),
        "extra_states": extra_rest,
        "scores": finite(trainer.scores),
        "best": finite(trainer.best.record),
        "evaluations_since_best": trainer.best.evaluations_since,
        "saved": trainer.saving.steps,
        "metrics_bytes": trainer.tracker.sync(),
        "metrics_chain": trainer.tracker.chain,
        "optimizer": optimizer_rest,
        "scaler": runtime.scaler.state_dict() if runtime.scaler is not None else None,
        "ranks": ranks,
        "world_size": runtime.world_size,
        "shard": trainer.config.shard,
        "sums": runtime.sums,
        "threads": runtime.threads,
        "kernels": trainer.kernels,
        "device": runtime.describe(),
        "fields": trainer.fields,
        "found_sha256": kept.digest(*trainer.found),
        "buffers": list(trainer.optimizer_step.buffer_sync.changed),
        "source_sha256": trainer.recipe.source_hash(),
        "data": trainer.data.source,
        "fingerprint": trainer.fingerprints["train"] if runtime.is_main else None,
        "fingerprints": trainer.fingerprints if runtime.is_main else None,
        "settings": {"seed": trainer.config.seed, "precision": trainer.config.precision},
        "torch": torch.__version__,
    }
    return Snapshot(trainer.step, tensors, whole, rest)


def restore(trainer: Trainer, saved: checkpoint.Checkpoint) -> None:
    """Restores everything as it was when `saved` was written; raises DamagedCheckpoint if it does not fit.

    With a different number of processes the data order resumes from the same example, and dropout is reseeded from
    (seed, step, rank).
    """
    rest, runtime, recipe = saved.state, trainer.runtime, trainer.recipe
    same_fields = of_optimizers(rest["fields"], recipe) == of_optimizers(trainer.fields, recipe)
    _load_weights(trainer, saved.tensors)
    with without_compiler():
        optimizer_state.load_optimizers(
            trainer.optimizers,
            trainer.networks,
            saved.tensors["optimizer.safetensors"],
            rest["optimizer"],
            # if a field was changed on purpose, the recipe's current momentum, weight decay, ... apply
            groups_too=same_fields,
            rates_too="learning_rates" in rest,
        )
    if "learning_rates" in rest and same_fields:
        trainer.rates.load(rest["learning_rates"])
    elif trainer.rates.schedulers:
        trainer.notes.append("a field has changed: the recipe's schedulers start again from their first step")
    if runtime.scaler is not None and rest["scaler"] is not None:
        runtime.scaler.load_state_dict(rest["scaler"])
    trainer.micro_batches.restore(rest.get("accumulate", {}), rest["world_size"])
    trainer.step, trainer.epoch = saved.step, rest["epoch"]
    trainer.batch = rest["batch"] * rest["batch_size"] // trainer.feed.batch_size
    if trainer.batch >= trainer.feed.steps_per_epoch:  # another --drop-last, which was allowed
        trainer.epoch, trainer.batch = trainer.epoch + 1, 0
    trainer.epoch_watch.order = rest.get("order")
    trainer.optimizer_step.buffer_sync.begin(rest.get("buffers", []))
    trainer.scores, trainer.best.record = known(rest["scores"]), known(rest["best"])
    trainer.best.evaluations_since = rest["evaluations_since_best"]
    trainer.saving.steps = rest["saved"]
    missing = restore_python(saved, trainer.python_state, trainer.networks, runtime.rank)
    if missing:
        trainer.notes.append(f"{', '.join(missing[:5])}: saved, but no longer in the recipe; left as they are")
    windows = [Means.from_state(rank["window"], runtime.device) for rank in rest["ranks"]]
    if rest["world_size"] == runtime.world_size:
        window = windows[runtime.rank]
        prefix = f"{runtime.rank}/"
        own = {n.removeprefix(prefix): t for n, t in saved.tensors["random.safetensors"].items()}
        own = {n: t for n, t in own.items() if "/" not in n}
        random_state.set_random_state(own, rest["ranks"][runtime.rank]["random"], runtime.device)
    else:
        window = Means()
        for number, one in enumerate(windows):
            window.merge(one, counted=number % runtime.world_size == runtime.rank)
        runtime.seed(trainer.config.seed, step=trainer.step, rank=runtime.rank)
    examples = rest["examples_in_window"]
    counted = rest.get("counted_in_window", dict.fromkeys(trainer.optimizer_step.objectives, examples))
    trainer.window.restore(window, examples, counted)


@contextlib.contextmanager
def put_in(trainer: Trainer, saved: checkpoint.Checkpoint) -> Iterator[None]:
    """Context manager: networks, EMA and Python state are a checkpoint's, afterwards the trainer's own again.

    What has changed for the first time since then has the value of the start; a note names what can't be undone.
    """
    networks = trainer.networks
    own = {"own.safetensors": _copied({name: network_state.own_tensors(net) for name, net in networks.items()})}
    if (average := trainer.average.state()) is not None:
        own["ema.safetensors"] = _copied(average)
    changes, _ = trainer.python_state.changes()
    extra = network_state.extra_states(networks)
    _load_weights(trainer, saved.tensors)
    theirs = {change.path for change in _python_changes_in(saved, trainer.runtime.rank)}
    undone, unknown = trainer.python_state.undone([change for change in changes if change.path not in theirs])
    if unknown:
        trainer.tracker.say(
            f"note     {', '.join(unknown[:5])}: changed after step {saved.step}, whose weights are tested with the "
            "present value"
        )
    trainer.python_state.restore(undone)
    restore_python(saved, trainer.python_state, networks, trainer.runtime.rank)
    try:
        yield
    finally:
        _load_weights(trainer, own)
        trainer.python_state.restore(changes)
        network_state.set_extra_states(networks, *extra)


def _copied(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in checkpoint.network_tensors(states).items()}


def _load_weights(trainer: Trainer, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    network_state.load(trainer.networks, tensors)
    if "ema.safetensors" in tensors:
        trainer.average.load(tensors["ema.safetensors"])
    else:
        trainer.average.begin()  # the EMA was requested after the run began


OF_THE_LOOP = {"epochs", "patience", "best", "best_is", "evaluate_every", "ema_decay", "clip_norm", "shuffle"}
"""Fields that no optimizer depends on: its state is kept if they change."""


def of_optimizers(fields: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The fields that an optimizer's settings depend on, to tell whether they were changed since the run began."""
    return {name: value for name, value in comparable(as_now(fields, recipe)).items() if name not in OF_THE_LOOP}


def restore_python(
    saved: checkpoint.Checkpoint, python_state: PythonState, networks: Mapping[str, nn.Module], rank: int = 0
) -> list[str]:
    """Restores extra states and Python objects from a checkpoint, as a process of that rank had them.

    Returns the names of what no longer exists.
    """
    tensors = saved.tensors.get("python.safetensors", {})
    extra = {name.removeprefix("extra/"): t for name, t in tensors.items() if name.startswith("extra/")}
    network_state.set_extra_states(networks, saved.state.get("extra_states", {}), extra)
    return python_state.restore(_python_changes_in(saved, rank))


def _python_changes_in(saved: checkpoint.Checkpoint, rank: int) -> list[Change]:
    """The changes of Python objects in a checkpoint, as a process of that rank had them."""
    tensors = saved.tensors.get("python.safetensors", {})
    ranks = saved.state["ranks"]
    rank %= len(ranks)
    changes = []
    for number, entry in enumerate(ranks[rank].get("python", [])):
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], list)):
            raise checkpoint.DamagedCheckpoint(
                f"{checkpoint.MANIFEST}: its state has an entry that is not a path and a value: {entry!r:.60}"
            )
        prefix = f"{rank}/{number}/"
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        changes.append(Change(tuple(map(str, entry[0])), entry[1], own))
    return changes


def _python_changes(trainer: Trainer) -> tuple[list[Any], dict[str, Tensor]]:
    """What training has changed in Python objects; what of it can't be saved is reported once."""
    changes, lost = trainer.python_state.changes()
    for name, network in trainer.networks.items():
        gone = trainer.names[name] - network_state.own_tensors(network).keys()
        lost += [f"{name}.{key}" for key in sorted(gone)]
    news = [name for name in lost if name not in trainer.noted_lost]
    if news:
        trainer.noted_lost.update(news)
        shown = ", ".join(news[:5]) + (f" and {len(news) - 5} more" if len(news) > 5 else "")
        trainer.tracker.say(
            f"note     {shown}: changes in training and can't be saved without pickle; a resumed run starts again "
            "from its initial value"
        )
    copies = [n for n in optimizer_state.copies(trainer.optimizers, trainer.networks) if n not in trainer.noted_lost]
    if copies:
        trainer.noted_lost.update(copies)
        more = f" (and {len(copies) - 1} more)" if len(copies) > 1 else ""
        trainer.tracker.say(
            f"note     {copies[0]}{more}; in a resumed run it is a copy: make both in the optimizer's __init__"
        )
    moved = [name for name in trainer.epoch_watch.changed() if name not in trainer.noted_lost]
    if moved:
        trainer.noted_lost.update(moved)
        trainer.tracker.say(
            f"note     {', '.join(moved[:5])}: changed within an epoch; worker processes read with the value of its "
            "start, but a run that is resumed in its midst with this one: change it in after_epoch(), or give --num-"
            "workers 0"
        )
    rest: list[Any] = []
    tensors: dict[str, Tensor] = {}
    for number, change in enumerate(changes):
        rest.append([list(change.path), change.value])
        tensors |= {f"{number}/{name}": tensor for name, tensor in change.tensors.items()}
    return rest, tensors


def checksum(trainer: Trainer) -> int:
    """A checksum of the bits that must be identical on all processes: of weights, also the recipe's own, and of
    buffers that are not averaged."""
    if trainer.runtime.world_size == 1 or trainer.sharding.is_sharded:
        return 0
    total = 0
    weights = [one for network in trainer.networks.values() for one in network.parameters()]
    buffers = trainer.optimizer_step.buffer_sync.constant()
    for tensor in [*weights, *buffers, *trainer.python_state.trained_outside()]:
        plain = tensor.detach().contiguous().view(-1).view(torch.uint8)
        words = plain.view(torch.int32) if len(plain) % 4 == 0 else plain
        total += int(words.sum(dtype=torch.int64))
    return total % (1 << 52)


def check_identical(checksums: list[int], step: int) -> None:
    """Raises TrainingError if the processes' weights differ."""
    for rank, found in enumerate(checksums):
        if found != checksums[0]:
            raise TrainingError(
                f"process {rank} has different weights or buffers from process 0 at step {step}: something in the "
                "recipe changes them by what one process alone knows (its part of the batch, its random numbers); the "
                "previous checkpoint is kept"
            )

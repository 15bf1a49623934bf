"""Prepares the networks of a run, and reports what would fail later before the first step."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from ..config import RunConfig
from ..data.feed import Feed
from ..data.sets import Data
from ..distributed.blocks import recompute_activations
from ..distributed.runtime import Runtime
from ..errors import UserError
from ..recipe.contract import Recipe
from ..runs import checkpoint, network_state
from ..runs.python_state import PythonState
from ..runs.python_undo import unnoticed
from ..torch_internals import hooks_of
from .evaluation import evaluating
from .initial import Initial, load_initial


def prepare_networks(
    networks: dict[str, nn.Module],
    recipe: Recipe,
    config: RunConfig,
    runtime: Runtime,
    data: Data,
    feed: Feed,
    python_state: PythonState,
) -> Initial | None:
    """Sets initial weights and lazy layers' shapes in new networks, and activation checkpointing if requested.

    Returns what `--init-from` did. Raises UserError if that fails, if there are no blocks to checkpoint, or if a lazy
    layer gets no shape.
    """
    is_new = not will_resume(recipe, config)
    if is_new:
        recipe.initial_weights(networks)
    if config.checkpoint_activations and not sum(map(recompute_activations, networks.values())):
        raise UserError(
            f"--checkpoint-activations: recipe {recipe.name} has no stack of repeated blocks; leave the flag out"
        )
    if any(map(network_state.is_lazy, networks.values())):
        with unnoticed(python_state):
            initialise_lazy_layers(networks, recipe, runtime, data, feed)
    return load_initial(networks, recipe, runtime) if is_new else None


def initialise_lazy_layers(
    networks: dict[str, nn.Module], recipe: Recipe, runtime: Runtime, data: Data, feed: Feed
) -> None:
    """Lets lazy layers infer their shapes from the first examples: the only use of a recipe's loss outside steps.

    It runs in evaluation mode, so that no running statistics change.
    """
    (micro,) = feed.throwaway_batch().micro_batches
    inputs = data.prepare(micro.raw)
    with evaluating(networks):
        for name, network in networks.items():
            networks[name] = network.to(runtime.device)
        for objective in recipe.objectives().values():
            objective(networks, inputs)
    for name, network in networks.items():
        if network_state.is_lazy(network):
            raise UserError(
                f"recipe {recipe.name}: a lazy layer of {name!r} gets no shape from the loss of the first "
                "examples; give it its shape"
            )


def will_resume(recipe: Recipe, config: RunConfig) -> bool:
    """Whether the run has a checkpoint to resume from, so that it needs no initial weights."""
    if config.run is None or config.check or config.find_lr or config.find_batch:
        return False
    folder = config.runs_folder / recipe.name / config.run
    return bool(checkpoint.checkpoints_in(folder / "checkpoints"))


def first_with_hook(networks: Mapping[str, nn.Module]) -> str:
    """The name of the first parameter with a gradient hook, or ""."""
    named = ((name, *pair) for name, network in networks.items() for pair in network.named_parameters())
    return next((f"{name}.{key}" for name, key, parameter in named if any(hooks_of(parameter).values())), "")


def check_gradient_hooks(networks: Mapping[str, nn.Module], recipe: Recipe, runtime: Runtime, accumulate: int) -> None:
    """Raises UserError for hooks that would act on each process's or micro-batch's gradients separately."""
    if runtime.world_size == 1 and accumulate == 1:
        return
    part, remedy = "process", "train on one process"
    if runtime.world_size == 1:
        part, remedy = "micro-batch", "leave out --accumulate"
    if hooked := first_with_hook(networks):
        raise UserError(
            f"recipe {recipe.name}: {hooked} has a gradient hook, which would see each {part}'s own gradient "
            f"and not the global batch's; change the gradient in before_update() instead, or {remedy}"
        )


def check_embeddings(networks: Mapping[str, nn.Module], recipe: Recipe, runtime: Runtime, accumulate: int = 1) -> None:
    """Raises UserError for embeddings whose weights or gradients depend on which examples are looked up together.

    accumulate: micro-batches of each process, of which torch counts each one's words separately.
    """
    for name, network in networks.items():
        for key, module in network.named_modules():
            if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
                continue
            full = f"recipe {recipe.name}: {'.'.join(filter(None, [name, key]))}"
            if module.max_norm is not None and runtime.world_size > 1:
                raise UserError(
                    f"{full} has max_norm, by which each process would change the rows that its own examples look up; "
                    "scale the weights in after_step() instead, or train on one process"
                )
            if module.scale_grad_by_freq and (runtime.world_size > 1 or accumulate > 1):
                raise UserError(
                    f"{full} has scale_grad_by_freq, which divides by how often a word occurs in each process's "
                    "micro-batch and not in the whole batch; leave it out, or train on one process with --accumulate 1"
                )


def is_channels_last(asked: str, recipe: Recipe) -> bool:
    """Whether convolutions have the channels-last layout: as --channels-last says, or the recipe."""
    return recipe.channels_last if asked == "recipe" else asked == "on"


Modes = dict[str, set[str]]
"""Network name -> the names of its modules that networks() gave in evaluation mode, "" for the network itself."""


def modes_of(networks: Mapping[str, nn.Module]) -> Modes:
    """Which modules are in evaluation mode."""
    return {
        name: {place for place, module in network.named_modules() if not module.training}
        for name, network in networks.items()
    }


def set_modes(networks: Mapping[str, nn.Module], trained: Collection[str], given: Modes) -> None:
    """Puts the networks that are trained in training mode; the others, such as a frozen teacher, keep the given modes.

    Of these, what has been put in evaluation mode since, such as by initial_weights(), stays in it, too.
    """
    for name in networks.keys() - trained:
        for place, module in networks[name].named_modules():
            module.training = module.training and place not in given.get(name, ())
    for name in trained:  # last: these may share modules with the others
        networks[name].train()


def has_batch_norm(networks: Mapping[str, nn.Module]) -> bool:
    """Whether a network has a BatchNorm, which needs at least two examples."""
    modules = (module for network in networks.values() for module in network.modules())
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules)


def _without_statistics(networks: Mapping[str, nn.Module]) -> list[str]:
    """The names of BatchNorms that take statistics of the batch in evaluation mode, too."""
    return [
        ".".join(filter(None, [name, key]))
        for name, network in networks.items()
        for key, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.running_mean is None and module.running_var is None
    ]


def warnings_of(networks: Mapping[str, nn.Module], recipe: Recipe, runtime: Runtime, feed: Feed) -> list[str]:
    """Notes for the plan on what may fail later or may not be intended."""
    notes = []
    modules = [module for network in networks.values() for module in network.modules()]
    if runtime.world_size > 1 and any(
        "backward" in name and hooks for m in modules for name, hooks in hooks_of(m).items()
    ):
        notes.append(
            "the network's gradient hooks see each process's part of a batch: what they change may depend on the "
            "number of processes"
        )
    if runtime.world_size > 1 and (local := _without_statistics(networks)):
        notes.append(
            f"{', '.join(local)}: without running statistics an evaluation normalises by each process's own batch, so "
            "scores depend on the number of processes; track_running_stats=True makes them exact"
        )
    left = len(feed.examples) % recipe.batch_size
    short = feed.steps_per_epoch * recipe.batch_size > len(feed.examples)  # the last, smaller batch is kept
    if short and left == 1 and has_batch_norm(networks):
        notes.append(
            f"the last batch of an epoch has 1 example (of {len(feed.examples):,}), which BatchNorm may refuse: "
            "--drop-last leaves it out"
        )
    return notes

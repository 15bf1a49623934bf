"""`--check`: what was saved after a step loads back bit for bit."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import torch

from ..distributed.blocks import local
from ..errors import UserError
from ..metrics import text_of
from ..runs import checkpoint, network_state
from ..runs.python_undo import same

if TYPE_CHECKING:
    from .trainer import Trainer


def finish_check(trainer: Trainer) -> None:
    """Loads the saved checkpoint, compares it bit for bit, each process its part, and removes the folder.

    Unsharded networks are loaded into fresh ones, as a resumed run does.
    """
    path = trainer.folder / "checkpoints" / checkpoint.folder_name(trainer.step)
    saved = trainer.sharding.read(path, trainer.networks).tensors
    named = {name: network_state.own_tensors(network) for name, network in trainer.networks.items()}
    if trainer.sharding.is_sharded:
        names = [f"{name}.{key}" for name, of_network in named.items() for key in of_network]
        held = checkpoint.network_tensors(named)
        checkpoint.check_tensors(held, saved["model.safetensors"], "model.safetensors")
        pairs = [(name, held[key], saved["model.safetensors"][key]) for name, key in zip(names, held, strict=True)]
    else:
        with torch.random.fork_rng(devices=[]):
            fresh = trainer.recipe.networks()
        network_state.load(fresh, saved)
        loaded = {name: network_state.own_tensors(network) for name, network in fresh.items()}
        pairs = [(f"{n}.{key}", t, loaded[n][key]) for n, of_network in named.items() for key, t in of_network.items()]
    problem = next((name for name, ours, theirs in pairs if not same(local(ours).cpu(), local(theirs).cpu())), "")
    problem = next(filter(None, trainer.runtime.gather_objects(problem)), "")
    if problem:
        raise UserError(f"recipe {trainer.recipe.name}: {problem} differs after loading its checkpoint")
    if not trainer.runtime.is_main:
        return
    shutil.rmtree(trainer.folder)
    steps = f"{trainer.step} step{'s' * (trainer.step > 1)}"
    print(f"check passed: {steps}, {text_of(trainer.scores)} ({trainer.data.source}), saved and loaded", flush=True)

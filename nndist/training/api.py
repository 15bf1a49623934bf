"""Training from Python or a notebook."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..errors import UserError
from ..flags.parse import OTHER_NAMES
from ..recipe.contract import Recipe
from ..recipe.loading import load_recipe


def train(recipe: str | Path | Recipe, **settings: Any) -> Any:
    """Trains a recipe (its path, or an instance) from Python or a notebook and returns a `run.Result`.

    `settings` are the command line's flags with underscores: the recipe's fields and those of `RunConfig`, as in
    `train("recipes/mnist_cnn.py", epochs=1, data_source="sample")`. Raises UserError or TrainingError, and Preempted if
    a signal stopped it after a save.
    """
    from ..distributed.runtime import forget_devices
    from .run import run

    run_fields = {field.name for field in dataclasses.fields(RunConfig)}
    for_run = {name: value for name, value in settings.items() if name in run_fields}
    for_recipe = {name: value for name, value in settings.items() if name not in run_fields}
    kind = type(recipe) if isinstance(recipe, Recipe) else load_recipe(recipe)
    recipe_fields = {field.name for field in dataclasses.fields(kind)}
    for name in for_recipe:
        if name not in recipe_fields:
            near = difflib.get_close_matches(name, [*recipe_fields, *run_fields], n=1)
            if other := OTHER_NAMES.get(name.replace("_", "-")):
                near = [other.replace("-", "_")]
            raise UserError(f"{name}={for_recipe[name]!r}: no such setting" + (f"; {near[0]}?" if near else ""))
    for name, kind_of_path in (("data_dir", Path), ("runs_dir", str), ("local_runs_dir", Path)):
        if for_run.get(name) is not None:
            for_run[name] = kind_of_path(for_run[name])
    if not isinstance(recipe, Recipe):
        made = kind(**for_recipe)
    elif for_recipe:
        made = dataclasses.replace(recipe, **for_recipe)
        vars(made).update({name: value for name, value in vars(recipe).items() if name not in recipe_fields})
    else:
        made = recipe  # not a copy: its other attributes keep their values, and the caller can inspect it afterwards
    try:
        return run(made, RunConfig(**for_run))
    finally:
        forget_devices()

"""Called by test_parity in 1 and 3 processes: the first steps of every recipe, on data that is always there."""

import dataclasses
import json
import os
from pathlib import Path

from making import FEWER, train_readers_in, with_few_examples
from torch.nn.modules.batchnorm import _BatchNorm

import nndist
from nndist.config import RunConfig
from nndist.recipe import load_recipe

ROOT = Path(__file__).parent.parent.parent
DROPOUT = {"mnist_cnn"}  # without a field to turn it off


def has_batch_norm(recipe) -> bool:
    recipe.data(RunConfig(data_source="sample").data_config(download=False))  # some count their classes there
    modules = (module for network in recipe.networks().values() for module in network.modules())
    return any(isinstance(module, _BatchNorm) for module in modules)


def main(folder: str) -> None:
    train_readers_in(20)
    histories = {}
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    for path in sorted((ROOT / "recipes").glob("*.py")):
        if path.stem in DROPOUT:
            continue
        kind = with_few_examples(load_recipe(path))
        fields = {field.name for field in dataclasses.fields(kind)}
        settings = {"dropout": 0.0} if "dropout" in fields else {}
        if path.stem in ("digits_detector", "image_folder", "imagenet_resnet"):
            # Adam's steps have the rate's size even where a gradient is a rounding error, and BatchNorm over maps of a
            # few pixels makes more of it
            settings["lr"] = 1e-6
        if path.stem == "image_folder":
            settings |= {"mixup": 0.2, "cutmix": 1.0}
        fewer = FEWER.get(path.stem, {})
        size = min(64, max(8, kind(**fewer).batch_size))
        recipe = kind(**{**settings, **fewer, "batch_size": size})
        result = nndist.train(
            recipe,
            # BatchNorm takes its statistics over what all processes see at a time: that must be the same
            accumulate=2 if world_size > 1 and not has_batch_norm(recipe) else 1,
            max_steps=4,
            log_every=1,
            data_source="sample",
            progress=False,
            figures=False,
            report=False,
            run="it",
            runs_dir=Path(folder),
            threads=1,
        )
        histories[path.stem] = result.history.records
    if int(os.environ.get("RANK", 0)) == 0:
        (Path(folder) / "histories.json").write_text(json.dumps(histories))

"""Learns the documents of a folder by the recipe text_file, in 1 and 3 processes; called by test_text_files."""

import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F

import nndist
from nndist.config import RunConfig
from nndist.recipe import load_recipe

ROOT = Path(__file__).parent.parent.parent
QUIET = {"progress": False, "figures": False, "report": False, "threads": 1, "wandb": "off", "timeout_seconds": 60}


def main(folder: str, documents: str) -> None:
    kind = load_recipe(ROOT / "recipes/text_file.py")
    fields = {"folder": Path(documents), "vocabulary": 280, "context": 24, "width": 16, "dropout": 0.0, "batch_size": 8}
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    recipe = kind(**fields, epochs=4)
    settings = {"max_steps": 6, "log_every": 1, "run": f"on{world_size}", "runs_dir": Path(folder), **QUIET}
    result = nndist.train(recipe, **settings)
    if int(os.environ.get("RANK", 0)):
        return
    losses = result.history.series("train/loss")[1]
    data = recipe.data(RunConfig().data_config(download=False))
    total, count = 0.0, 0
    network = result.networks["model"].eval()
    with torch.no_grad():
        for number in range(len(data.test)):  # one by one, without padding
            tokens, _ = data.inputs(data.test, number, number + 1)
            total += F.cross_entropy(network(tokens[:, :-1])[0], tokens[0, 1:], reduction="sum").item()
            count += tokens.shape[1] - 1
    found = {"losses": losses, "test": result.scores["test/loss"], "test by hand": total / count}
    (Path(folder) / f"found{world_size}.json").write_text(json.dumps(found))


def results(folder: Path, world_size: int) -> dict:
    return json.loads((folder / f"found{world_size}.json").read_text())

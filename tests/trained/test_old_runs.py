"""A run folder that an older nndist wrote is loaded, evaluated, shown and resumed; old recipes import what they did.

`old_runs` holds such folders, without figures and report: two_clusters, stopped after 60 of 100 steps, is of
2026-11-28, when nndist was one flat folder. A change that breaks this test breaks its users' runs.
"""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from launching import python, succeeded

import nndist

OLD_RUNS = Path(__file__).parent / "old_runs"
# What recipes imported that the README taught, or that were shipped, until 2026-11-28.
IMPORTED = {
    "nndist": "Data Recipe Resident Scaled Scaling Weighted evaluate figures load_run quality schedules train",
    "nndist.config": "RunConfig",
    "nndist.data": "Data ExampleRandom ExampleSet Resident Streamed Tensors scale_images",
    "nndist.datasets": "DataConfig dates declaration text",
    "nndist.datasets.imagenet": "decode imagenet normalise photographs",
    "nndist.datasets.mnist": "digits load_digits",
    "nndist.datasets.text": "alphabet check_sizes continuations next_character_data next_character_losses prompt_of "
    "read_corpus sample written",
    "nndist.datasets.weather": "BASELINES baselines evenings given_days load_weather",
    "nndist.errors": "UserError",
    "nndist.figures": "Table activation_functions classification confusion_matrix fitted_curve image_grid new_figure",
    "nndist.metrics": "Output Weighted",
    "nndist.prediction": "Answers Inputs",
    "nndist.quality": "image_rows measure plane principal_components trained_reader",
    "nndist.recipe": "ACTIVATIONS Activation Batch CELLS Cell Classifier Networks Objective Recipe load_recipe",
    "nndist.schedules": "ScheduleName",
    "nndist.shards": "Sharded",
    "nndist.tracking": "History",
}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs/two_clusters/first"
    shutil.copytree(OLD_RUNS / "two_clusters/first", folder)
    return folder


@pytest.mark.parametrize("module", IMPORTED)
def test_old_recipes_find_what_they_import(module):
    for name in IMPORTED[module].split():
        exec(f"from {module} import {name}", {})
    assert importlib.import_module(module)


def test_an_old_run_is_evaluated_and_predicts(run):
    assert nndist.evaluate(run, trust=True).scores["test/accuracy"] == pytest.approx(0.991)
    said = str(nndist.load_run(run).predict(torch.tensor([[2.0, 2.0], [-2.0, -2.0]])))
    assert "93.9%" in said and "77.7%" in said


def test_an_old_run_resumes_and_is_reported(run, tmp_path):
    recipe = tmp_path / "two_clusters.py"
    shutil.copy(run / "recipe.py", recipe)
    flags = ["--runs-dir", tmp_path / "runs", "--run", "first", "--wandb", "off", "--no-progress"]
    done = succeeded(python("-m", "nndist", recipe, *flags))
    evaluated = [int(step) for step in re.findall(r"^epoch .*  step (\d+) ", done.stdout, re.MULTILINE)]
    assert evaluated == [70, 80, 90, 100]
    assert json.loads((run / "run.json").read_text())["scores"]["test/loss"] == pytest.approx(0.10682, rel=1e-3)
    assert (run / "report.html").is_file()

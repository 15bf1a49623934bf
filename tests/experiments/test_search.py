"""`nndist compare --search optuna`: the same trials whatever is killed and whichever is faster. .ci/run has optuna."""

import importlib.util
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from launching import command, succeeded

import nndist
from nndist.cli.experiment_commands import compare_command
from nndist.errors import UserError
from nndist.experiments.search import Choice, Study, final_of, space_of
from nndist.recipe.loading import load_recipe
from nndist.runs.reading import read_run

COMPARE = ROOT / "launch/compare.py"
TOY = ROOT / "tests/toys.py"
SPACE = {"lr": Choice(low=1e-4, high=1.0), "width": Choice(low=4, high=64, whole=True), "kind": Choice(("a", "b"))}
with_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="pip install optuna; .ci/run does")


def study(path, *, window=3, prune=False, seed=0, sampler="tpe", lowest=True, score="val/loss") -> Study:
    return Study(path, SPACE, sampler=sampler, seed=seed, window=window, prune=prune, lowest=lowest, score=score)


def score_of(values) -> float:
    return abs(float(values["lr"]) - 0.01) + int(values["width"]) / 64 + (values["kind"] == "a")


def searched(path, order: random.Random, *, count=25, stop_after=None, **settings) -> list:
    """A search whose trials end in a random order, and which is begun again from its file after each few events."""
    found = study(path, **settings)
    events = 0
    while not (len(found.trials) == count and all(trial.state for trial in found.trials)):
        if len(found.trials) < count and found.can_ask():
            found.ask()
        else:
            number = order.choice([n for n, trial in enumerate(found.trials) if not trial.state])
            value = score_of(found.trials[number].values)
            seen = [[step, value + 1 / step] for step in (1, 2, 3)]
            cut = found.prunes_at(number, seen) if found.prune else None
            if number % 9 == 4:
                found.end(number, "failed", None, [])
            elif cut is not None:
                found.end(number, "pruned", seen[cut][1], seen[: cut + 1])
            else:
                found.end(number, "complete", value, seen if found.prune else [])
        events += 1
        if stop_after and events % stop_after == 0:
            found = study(path, **settings)
    return found.trials


@with_optuna
@pytest.mark.long
@pytest.mark.parametrize("prune, sampler", [(False, "tpe"), (True, "tpe"), (False, "random")])
def test_the_trials_are_the_same_whatever_ends_first_and_wherever_it_is_begun_again(tmp_path, prune, sampler):
    settings = {"prune": prune, "sampler": sampler}
    whole = searched(tmp_path / "whole.json", random.Random(0), **settings)
    for seed, stop_after in itertools.product((1, 2), (1, 7)):
        path = tmp_path / f"{seed}-{stop_after}.json"
        assert searched(path, random.Random(seed), stop_after=stop_after, **settings) == whole
    assert any(trial.state == "pruned" for trial in whole) == prune
    assert len({json.dumps(trial.values) for trial in whole}) == len(whole)
    other = searched(tmp_path / "other.json", random.Random(0), seed=1, **settings)
    assert [trial.values for trial in other] != [trial.values for trial in whole]
    if sampler == "tpe" and not prune:  # it learns
        early, late = ([score_of(trial.values) for trial in part] for part in (whole[:10], whole[15:]))
        assert sum(late) / len(late) < sum(early) / len(early)


@with_optuna
@pytest.mark.long
def test_another_search_of_the_same_name_is_an_error(tmp_path):
    path = tmp_path / "study.json"
    searched(path, random.Random(0), count=4)
    for changed, said in [({"seed": 1}, "search-seed was 0"), ({"window": 2}, "jobs was 3"), ({"score": "x"}, "score")]:
        with pytest.raises(UserError, match=said):
            study(path, **changed)
    text = path.read_text()
    record = json.loads(text)
    record["trials"][2]["values"]["width"] = "63"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="trial 2 would be"):
        study(path)
    path.write_text(text[:-9])
    with pytest.raises(UserError, match=r"study.json: can't be read"):
        study(path)


def test_ranges_and_choices():
    kind = load_recipe(TOY)
    space = space_of(["lr=1e-4..1e-1", "batch_size=8..64", "momentum=0,0.9"], kind)
    assert space == {
        "lr": Choice(low=1e-4, high=0.1),
        "batch_size": Choice(low=8, high=64, whole=True),
        "momentum": Choice(("0", "0.9")),
    }
    assert space["batch_size"].text(32.0) == "32" and float(space["lr"].text(0.1 + 0.2)) == 0.1 + 0.2


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--vary", "lr=0.1..0.01"], "a range goes from its lower end to its higher one"),
        (["--vary", "lr=a..b"], "the ends of a range are numbers"),
        (["--vary", "batch_size=1..2.5"], "batch_size is a whole number"),
        (["--vary", "lrr=1..2"], "did you mean lr?"),
        (["--vary", "lr=0.1..1", "--vary", "lr=1,2"], "--vary lr: given twice"),
        ([], "--search: say what is searched"),
        (["--vary", "lr=0.1..1", "--trials", "0"], "--trials 0: must be at least 1"),
        (["--vary", "lr=0.1..1", "--prune", "--folds", "3"], "--prune: needs one training for each trial"),
        (["--vary", "lr=-1..1"], "--lr -1.0: must be above 0"),
        (["--vary", "lr=0.1..1", "--score", "val/x"], "--score val/x: its name does not say whether highest"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(SystemExit) as stopped:
        compare_command([str(TOY), "--search", "optuna", *arguments])
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1 and said in line


def test_a_grid_has_no_ranges_and_optuna_may_be_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        compare_command([str(TOY), "--vary", "lr=0.1..1"])
    assert "a range needs --search optuna" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        compare_command([str(TOY), "--vary", "lr=0.1..1", "--search", "optuna"])
    assert "the package optuna is not installed: pip install optuna" in capsys.readouterr().err


LONG = [COMPARE, TOY, "--search", "optuna", "--vary", "lr=0.001..0.1", "--vary", "momentum=0,0.9", "--trials", "4"]
LONG += ["--score", "test/loss", "--jobs", "2", "--epochs", "300", "--evaluate-every", "20 epochs", "--prune"]
LONG += ["--save-every", "50 steps"]


def outcome(folder: Path) -> tuple:
    """The study, and the weights of the trials that were trained to their end."""
    text = (folder / "compare-search-lr-momentum/study.json").read_text()
    whole = [n for n, trial in enumerate(json.loads(text)["trials"]) if trial["state"] == "complete"]
    files = [next(folder.glob(f"*trial{n:04d}*/checkpoints/step-*/model.safetensors")).read_bytes() for n in whole]
    return text, files


@with_optuna
@pytest.mark.nightly
def test_a_search_that_was_killed_comes_to_the_same_trials_and_weights(tmp_path):
    """kill -9, twice, at any point of two trials."""
    for place in ("whole", "killed"):
        (tmp_path / place).mkdir()
    done = succeeded(command(*LONG, cwd=tmp_path / "whole"))
    assert "trials   4, " in done.stdout and "chooses the values, so it does not test them" in done.stdout
    runs = tmp_path / "killed/runs/toys"
    for started in (2, 3):
        process = subprocess.Popen(
            [sys.executable, *map(str, LONG)], cwd=tmp_path / "killed", stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while len([*runs.glob("*/checkpoints/step-*")]) < started:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for lock in runs.glob("*/lock"):  # no training outlives the search
            while Path(f"/proc/{lock.read_text()}").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
    succeeded(command(*LONG, cwd=tmp_path / "killed"))
    assert outcome(runs) == outcome(tmp_path / "whole/runs/toys")
    again = succeeded(command(*LONG, cwd=tmp_path / "killed"))
    assert "trained  " not in again.stdout, "nothing is trained twice"


@with_optuna
@pytest.mark.long
def test_trials_of_several_processes_and_folds(tmp_path):
    words = [COMPARE, TOY, "--search", "optuna", "--vary", "lr=0.001..0.1", "--trials", "1", "--score", "val/loss"]
    words += ["--folds", "2", "--processes", "2", "--epochs", "3", "--jobs", "1"]
    done = succeeded(command(*words, cwd=tmp_path))
    runs = tmp_path / "runs/toys"
    abouts = [json.loads(path.read_text()) for path in sorted(runs.glob("*/run.json"))]
    assert [about["fields"]["fold"] for about in abouts] == ["1/2", "2/2"]
    assert {about["world_size"] for about in abouts} == {2} and {about["status"] for about in abouts} == {"finished"}
    record = json.loads((runs / "compare-search-lr/comparison.json").read_text())
    assert [len(row["final"]["values"]) for row in record["rows"]] == [2]
    study = json.loads((runs / "compare-search-lr/study.json").read_text())
    means = sorted(trial["value"] for trial in study["trials"])
    assert [row["final"]["mean"] for row in record["rows"]] == pytest.approx(means)
    assert "mean over folds" in done.stdout and "folds share training examples" in done.stdout


def test_a_trial_counts_what_its_runs_keep(tmp_path):
    """The best score of a run that keeps its best weights, else its last."""
    flags = {"progress": False, "report": False, "figures": False, "threads": 1, "wandb": "off", "runs_dir": tmp_path}
    finals = {}
    for best in ("test/loss", None):
        folder = nndist.train(ROOT / "tests/toys.py", run=str(best)[:4], best=best, epochs=6, lr=0.9, **flags).folder
        finals[best] = final_of(SimpleNamespace(folder=folder), "test/loss"), read_run(folder)
    value, run = finals["test/loss"]
    assert value == run.about["best"]["scores"]["test/loss"] < run.series["test/loss"].values[-1]
    value, run = finals[None]
    assert value == run.series["test/loss"].values[-1]

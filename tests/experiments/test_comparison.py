"""launch/compare.py as a user runs it: real trainings, table, numbers and figure; killed and resumed."""

import json
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from launching import command, succeeded

import nndist
from nndist.cli.experiment_commands import compare_command
from nndist.experiments.comparison import Comparison, Group, Spread, grouped, told_apart
from nndist.runs.reading import Run, Series, read_run

COMPARE = ROOT / "launch/compare.py"
TOY = ROOT / "tests/toys.py"
COMMON = ["--epochs", "4", "--log-every", "1"]


def last_score(run):
    """The last record of an evaluation in a run's folder."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(record["test/loss"] for record in reversed(records) if "test/loss" in record)


def weights(folder):
    """The bytes of the final weights of every run in a folder, by name."""
    return {path.parents[2].name: path.read_bytes() for path in folder.glob("*/checkpoints/*/model.safetensors")}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Three values, one of which diverges, with two seeds each."""
    folder = tmp_path_factory.mktemp("compared")
    arguments = [COMPARE, TOY, "--vary", "lr=0.01,5e-2,1e30", "--seeds", "2", *COMMON]
    return folder, command(*arguments, cwd=folder), arguments


def test_the_table_and_the_numbers_are_those_of_the_runs(compared):
    folder, done, _ = compared
    assert done.returncode == 1, done.stdout + done.stderr  # two trainings failed, the others continued
    record = json.loads((folder / "runs/toys/compare-lr/comparison.json").read_text())
    assert [row["label"] for row in record["rows"]] == ["lr=0.01", "lr=0.05", "lr=1e+30"]
    for row, value in zip(record["rows"][:2], ("0.01", "0.05"), strict=True):
        scores = [last_score(folder / f"runs/toys/lr={value}-seed{seed}") for seed in (0, 1)]
        assert row["final"]["values"] == scores and row["seeds"] == [0, 1]
        assert row["final"]["mean"] == pytest.approx(statistics.mean(scores))
        assert row["final"]["std"] == pytest.approx(statistics.stdev(scores))
        shown = next(line for line in done.stdout.splitlines() if f"lr={value} " in line[2:10])
        assert f"{statistics.mean(scores):.4g}" in shown and f"{statistics.stdev(scores):.4g}" in shown
    means = {row["label"]: row["final"]["mean"] for row in record["rows"] if row["final"]}
    assert record["best"] == min(means, key=means.get)
    assert any(line.startswith(f"* {record['best']}") for line in done.stdout.splitlines())
    failed = [line for line in done.stdout.splitlines() if line.startswith("failed   lr=1e+30")]
    assert len(failed) == 4 and "not finite" in failed[0]  # when it happened, and below the table
    rest = [line for line in done.stdout.splitlines() if not line.startswith("failed")]
    assert max(map(len, rest)) <= 80
    assert (folder / "runs/toys/compare-lr/curves.png").stat().st_size > 10_000


def test_what_is_finished_is_not_trained_again_and_seeds_are_added(compared):
    folder, _, arguments = compared
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs/toys").glob("lr=0.0*/metrics.jsonl")}
    done = succeeded(command(*arguments[:3], "lr=0.01,0.05", "--seeds", "3", *COMMON, cwd=folder))
    assert len(before) == 4 and "6 trainings, 4 of them done" in done.stdout
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert done.stdout.count("trained ") == 2


def test_runs_that_exist_are_compared(compared):
    folder, _, _ = compared
    runs = sorted((folder / "runs/toys").glob("lr=0.0*-seed[01]"))
    done = succeeded(command(COMPARE, *runs, "--name", "both", cwd=folder))
    record = json.loads((folder / "runs/toys/compare-both/comparison.json").read_text())
    assert [(row["label"], row["seeds"]) for row in record["rows"]] == [("lr=0.01", [0, 1]), ("lr=0.05", [0, 1])]
    assert "final and best test/loss" in done.stdout


def test_other_settings_under_the_same_name_are_an_error_that_names_them(compared):
    folder, _, arguments = compared
    done = command(*arguments[:3], "lr=0.01", "--epochs", "5", cwd=folder)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "epochs 4, not 5" in done.stderr and "--name" in done.stderr


DAMAGES = [
    ("{", "can't be read"),
    ("[" * 10_000, "nested too deeply"),
    ('{"step": "many"}', "step is many where a whole number or null is expected"),
    ('{"settings": []}', "settings is a list of 0 where an object is expected"),
]


@pytest.mark.parametrize("text, expected", DAMAGES)
def test_a_damaged_description_of_a_training_is_one_line(tmp_path, monkeypatch, capsys, text, expected):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs/toys/lr=0.1-seed0"
    place.mkdir(parents=True)
    (place / "run.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        compare_command([str(TOY), "--vary", "lr=0.1"])
    said = capsys.readouterr().err
    assert (
        stop.value.code == 2 and said.startswith("error: runs/toys/lr=0.1-seed0/run.json: ") and said.count("\n") == 1
    )
    assert expected in said and "--name" in said


HELPED = """
from dataclasses import dataclass
from toys import Line
from beside import LR

@dataclass(kw_only=True)
class Helped(Line):
    epochs: int = 1
    lr: float = LR
"""


def test_a_changed_module_beside_the_recipe_is_a_different_version(tmp_path, monkeypatch, capsys):
    """Runs with a different source of it share no row, and do not count as finished."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helped.py").write_text(HELPED)
    (tmp_path / "beside.py").write_text("LR = 0.1\n")
    quiet = {"progress": False, "figures": False, "report": False, "wandb": "off", "threads": 1}
    nndist.train("helped.py", run="seed0", runs_dir="runs", **quiet)
    (tmp_path / "beside.py").write_text("LR = 0.1  # the same field\n")
    nndist.train("helped.py", run="second", seed=1, runs_dir="runs", **quiet)
    runs = [read_run(tmp_path / "runs/helped" / name) for name in ("seed0", "second")]
    assert [group.label for group in grouped(runs)] == ["source 1", "source 2"]
    with pytest.raises(SystemExit) as stop:
        compare_command(["helped.py"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "runs/helped/seed0: beside.py was different when it was trained" in said


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--vary", "lrr=1,2"], "no field 'lrr' can be varied; did you mean lr?"),
        (["--vary", "lr=0.1,fast"], "fast"),
        (["--vary", "lr=0.1,-1"], "--lr -1.0: must be above 0"),
        (["--vary", "lr"], "give a field and its values"),
        (["--vary", "lr=1e-1,0.1"], "are the same"),
        (["--vary", "shuffle=true,perhaps"], "must be true or false"),
        (["--vary", "seed=1,2"], "seeds are given by --seeds"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--run", "x"], "--run: the comparison chooses it"),
        (["--name", "a/b"], "--name 'a/b'"),
        (["--epoch", "3"], "--epoch"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_started(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        compare_command([str(TOY), *arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and len(said.splitlines()) == 1
    assert expected in said and not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights of a comparison that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    succeeded(command(*LONG, cwd=folder))
    return weights(folder / "runs/toys")


LONG = [COMPARE, TOY, "--vary", "momentum=0,0.9", "--epochs", "700", "--save-every", "50 steps", "--jobs", "2"]
LONG += ["--evaluate-every", "700 epochs"]


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGKILL, marks=pytest.mark.long), pytest.param(signal.SIGINT, marks=pytest.mark.nightly)],
)
def test_a_stopped_comparison_resumes_to_the_same_bits(uninterrupted, tmp_path, number):
    runs = tmp_path / "runs/toys"
    process = subprocess.Popen(
        [sys.executable, *map(str, LONG)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(list(runs.glob("*/checkpoints/step-*"))) < 2 or len(list(runs.glob("*/run.json"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "the same command resumes them" in errors
    for run in runs.glob("momentum=*"):  # no training outlives the comparison
        pid = int((run / "lock").read_text())
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert weights(runs) != uninterrupted
    succeeded(command(*LONG, cwd=tmp_path))
    final = weights(runs)
    assert {name: final[name] == uninterrupted[name] for name in uninterrupted} == dict.fromkeys(uninterrupted, True)
    launches = [json.loads(path.read_text())["launches"] for path in runs.glob("*/run.json")]
    assert any(len(list_of_one) > 1 for list_of_one in launches)


@pytest.mark.parametrize("kept, leader", [(("a", "a"), "rises"), (("a", None), "steady"), ((None, None), "steady")])
def test_runs_that_keep_their_best_weights_are_judged_by_them(kept, leader):
    """Early stopping ends every run at a worse score than that of the weights which it keeps."""
    names = {"a": "val/accuracy", None: None}
    groups = []
    for label, values, best in (("steady", (0.7, 0.7, 0.7), kept[0]), ("rises", (0.6, 0.9, 0.5), kept[1])):
        series = {"val/accuracy": Series("val/accuracy", (1, 2, 3), (1, 2, 3), values)}
        groups.append(Group(label, [Run(Path(label), {"fields": {"best": names[best]}}, series, 3, 3, None)]))
    comparison = Comparison(groups, "val/accuracy", lowest=False, title="it")
    assert comparison.record()["best"] == leader
    assert comparison.record()["judged_by"] == ("best" if leader == "rises" else "final")
    assert f"* {leader} " in comparison.table()


def test_means_are_told_apart_as_by_welch():
    """By integrating the density of t: p = 0.032 and 0.060."""
    first = Spread((1.0, 1.1, 0.9))
    assert told_apart(first, Spread((1.3, 1.2, 1.25))) and not told_apart(first, Spread((1.3, 1.1, 1.25)))
    assert not told_apart(first, Spread((5.0,))), "one seed tells nothing"

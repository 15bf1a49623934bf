"""TensorBoard and Trackio as sinks, with the real packages: everything is there once, and nothing harms the training.

.ci/run installs them for the long tests.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, command, succeeded

from nndist.config import RunConfig
from nndist.errors import UserError
from nndist.runs import trackers
from nndist.runs.records import without_times

CNN = ROOT / "recipes/mnist_simple_cnn.py"
FLAGS = ["--threads", 1, "--no-progress", "--no-report", "--run", "it", "--wandb", "off"]
SLOW = [*FLAGS, "--data-source", "sample", "--epochs", 2, "--no-figures", "--log-every", 3, "--save-every", "40 steps"]

installed = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, trackers.NAMES)), reason="pip install tensorboard trackio; .ci/run does"
)


@pytest.fixture(autouse=True)
def database(tmp_path, monkeypatch):
    """Trackio's database of this test."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def recorded(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every metric in metrics.jsonl, as 32-bit numbers to six digits."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name != "step" and type(value) in (int, float):
                found.setdefault(name, []).append((record["step"], float(f"{value:.6g}")))
    return found


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same, of the run's only file of events, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (_,) = (folder / "tensorboard").glob("events.*")
    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    names = [name for name in read.Tags()["scalars"] if not name.startswith(("final/", "best/"))]
    return {name: [(one.step, float(f"{one.value:.6g}")) for one in read.Scalars(name)] for name in names}


def in_trackio(database: Path, run: str) -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    """The same, of the only run in Trackio's database, in order of steps; and what else is logged there."""
    import sqlite3

    with sqlite3.connect(database / "nndist.db") as connection:
        rows = connection.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY step, id").fetchall()
    assert len({row[0] for row in rows}) == 1 and {row[1] for row in rows} == {run}
    found: dict[str, list[tuple[int, float]]] = {}
    others = []
    for _, _, step, text in rows:
        for name, value in json.loads(text).items():
            if name.startswith(("final/", "best/", "figures/")):
                others.append(name)
            else:
                found.setdefault(name, []).append((step, float(f"{value:.6g}")))
    return found, others


def near(found):
    """The same numbers, as near as TensorBoard keeps them."""
    return {name: [(step, pytest.approx(value, rel=2e-5)) for step, value in series] for name, series in found.items()}


def start(*arguments) -> subprocess.Popen:
    words = [sys.executable, ROOT / "launch/train.py", *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(condition, what: str, seconds: float = 120.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.05)
    return found


def sinks_of(training: int) -> dict[str, int]:
    """The processes of a training's trackers, by their names."""
    found = {}
    for task in Path(f"/proc/{training}/task").glob("*/children"):
        for child in task.read_text().split():
            words = Path(f"/proc/{child}/cmdline").read_bytes()
            for name in trackers.NAMES:
                if b"nndist.runs.trackers" in words and f'"tracker": "{name}"'.encode() in words:
                    found[name] = int(child)
    return found


@pytest.mark.parametrize(
    "names, said",
    [
        (("mlflow",), "--track mlflow: must be tensorboard or trackio"),
        (("missing",), "--track missing: the package missing is not installed: pip install missing"),
        (("json", "json"), "--track json: given twice"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line(monkeypatch, names, said):
    monkeypatch.setattr(trackers, "NAMES", {"tensorboard": "TensorBoard", "trackio": "Trackio"})
    if names != ("mlflow",):
        monkeypatch.setitem(trackers.NAMES, names[0], "It")
    with pytest.raises(UserError, match=said):
        RunConfig(track=names).validate()


@installed
@pytest.mark.long
def test_every_value_is_there_once_at_its_step_with_scores_and_figures(tmp_path):
    runs = tmp_path / "runs"
    flags = ["--runs-dir", runs, *FLAGS, "--track", "tensorboard", "trackio"]
    done = succeeded(command(ROOT / "launch/train.py", ROOT / "recipes/two_clusters.py", *flags))
    folder = runs / "two_clusters/it"
    assert f"track    tensorboard --logdir {folder}/tensorboard" in done.stdout
    assert in_tensorboard(folder) == near(recorded(folder))
    found, others = in_trackio(tmp_path / "trackio", "two_clusters/it")
    assert found == recorded(folder)
    assert {"final/test/accuracy", "figures/decision_boundary"} <= set(others)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    assert "figures/decision_boundary" in read.Tags()["images"] and "run" in read.Tags()["tensors"]
    final = json.loads((folder / "run.json").read_text())["scores"]["test/accuracy"]
    assert [one.value for one in read.Scalars("final/test/accuracy")] == [pytest.approx(final)]
    succeeded(command(ROOT / "launch/sync.py", folder, "--track", "tensorboard", "trackio"))  # once more, not twice
    assert in_tensorboard(folder) == near(recorded(folder))
    assert in_trackio(tmp_path / "trackio", "two_clusters/it")[0] == recorded(folder)


@installed
@pytest.mark.long
def test_a_run_that_was_killed_and_resumed_is_one_series(tmp_path):
    """kill -9; what was recorded past the last save is recorded again, and is there once."""
    runs = tmp_path / "runs"
    folder = runs / "mnist_simple_cnn/it"
    words = [CNN, *SLOW, "--runs-dir", runs, "--track", "tensorboard", "trackio"]
    training = start(*words)
    sinks = until(lambda: len(found := sinks_of(training.pid)) == 2 and found, "sinks")
    until(lambda: [*folder.glob("checkpoints/step-*")], "checkpoint")
    until(lambda: [*folder.glob("tensorboard/events.*")] and (folder / "trackio/run.json").exists(), "begun series")
    training.kill()
    training.communicate()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in sinks.values()), "end of the sinks")
    assert "resumed from step" in succeeded(command(ROOT / "launch/train.py", *words)).stdout
    assert in_tensorboard(folder) == near(recorded(folder))
    assert in_trackio(tmp_path / "trackio", "mnist_simple_cnn/it")[0] == recorded(folder)


@installed
@pytest.mark.nightly
def test_a_tracker_that_dies_or_stops_harms_nothing(tmp_path):
    """The records are those of a training without any, and the trackers get all of them afterwards."""
    runs = tmp_path / "runs"
    folder = runs / "mnist_simple_cnn/it"
    training = start(CNN, *SLOW, "--runs-dir", runs, "--track", "tensorboard", "trackio")
    sinks = until(lambda: len(found := sinks_of(training.pid)) == 2 and found, "sinks")
    os.kill(sinks["tensorboard"], signal.SIGKILL)
    os.kill(sinks["trackio"], signal.SIGSTOP)
    try:
        said, _ = training.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):  # ended by the training
            os.kill(sinks["trackio"], signal.SIGKILL)
    assert training.returncode == 0, said
    assert said.count("TensorBoard: dropped") == said.count("Trackio: dropped") == 1
    succeeded(command(ROOT / "launch/sync.py", folder, "--track", "tensorboard", "trackio"))
    assert in_tensorboard(folder) == near(recorded(folder))
    assert in_trackio(tmp_path / "trackio", "mnist_simple_cnn/it")[0] == recorded(folder)
    succeeded(command(ROOT / "launch/train.py", CNN, *SLOW, "--runs-dir", tmp_path / "alone"))
    both = [
        [without_times(json.loads(line)) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (folder, tmp_path / "alone/mnist_simple_cnn/it")
    ]
    assert both[0] == both[1]

"""Habits of ordinary training code, each compared with a loop written by hand in plain PyTorch."""

import fcntl
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conformance import habit as habits
from conformance import worker
from conformance.habit import MODES, Habit
from launching import Processes
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "habits"
NEEDED = {
    "alone": ["plain"],
    "accumulated": ["plain_accumulated"],
    "resumed": ["first", "alone"],
    "three": ["plain", "plain_three"],
    "three_resumed": ["three_first", "three"],
}


def found():
    """Every habit by name, of modules that nothing is trained from."""
    by_name = {}
    for path in sorted(FOLDER.glob("*.py")):
        specification = importlib.util.spec_from_file_location(f"listed_{path.stem}", path)
        module = importlib.util.module_from_spec(specification)
        sys.modules[module.__name__] = module
        specification.loader.exec_module(module)
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, Habit) and value.__module__ == module.__name__:
                by_name[f"{path.stem}.{name}"] = value
    return by_name


HABITS = found()


def cases():
    for mode in MODES:
        for name, kind in HABITS.items():
            if mode in kind.modes:
                marks = [pytest.mark.xfail(strict=True, reason=kind.bugs[mode])] if mode in kind.bugs else []
                yield pytest.param(mode, name, marks=marks, id=f"{mode}-{name}")


@pytest.fixture(scope="session")
def launched(request, tmp_path_factory):
    """Gives the folder of a mode's outcomes; its habits are trained in one launch, by the first test that asks."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "conformance"
    folder.mkdir(exist_ok=True)
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = [(params["mode"], params["name"]) for params in asked if "mode" in params]

    def get(mode):
        with (folder / f"{mode}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            wanted = [name for other, name in asked if other == mode or mode in every_needed(other)]
            launch(mode, folder, wanted_in(mode, dict.fromkeys(wanted)))
        return folder / mode

    return get


def every_needed(mode):
    needed = NEEDED.get(mode, [])
    return [*needed, *(more for other in needed for more in every_needed(other))]


def wanted_in(mode, names):
    if mode == "plain_three":
        return [name for name in names if HABITS[name].per_process]
    return [name for name in names if not (mode.startswith("plain") and refused(name, ""))]


def refused(name, mode):
    """The line that a habit is refused with, or ""."""
    line = HABITS[name].refused
    return line if isinstance(line, str) else line.get(mode, "")


def launch(mode, folder, names):
    """Trains the habits that were not yet; one that ends its process is noted, and the next launch goes on after it."""
    while left := [name for name in names if not (folder / mode / f"{name}.json").exists()]:
        world_size = 3 if mode.startswith("three") else 1
        processes = Processes(world_size, [mode, folder, *left], folder=folder, call=worker.main)
        codes = processes.wait(timeout=400)
        still = [name for name in left if not (folder / mode / f"{name}.json").exists()]
        if still == left:  # the process was killed, or nobody answered
            (folder / mode).mkdir(exist_ok=True)
            died = {"error": f"the process died: {codes}\n{processes.said()[-2000:]}"}
            (folder / mode / f"{still[0]}.json").write_text(json.dumps(died))


def read(folder, name):
    described = json.loads((folder / f"{name}.json").read_text())
    file = folder / f"{name}.safetensors"
    return described, load_file(file) if file.exists() else {}


@pytest.mark.parametrize("mode, name", [*cases()])
def test_habit(launched, mode, name):
    kind = HABITS[name]
    expected_line = refused(name, mode)
    needed = [] if expected_line else NEEDED[mode]
    before = {other: read(launched(other), name) for other in needed if other != "plain_three" or kind.per_process}
    got, tensors = read(launched(mode), name)
    if expected_line:
        assert expected_line in got.get("error", "nothing"), got
        assert got["steps"] == 0 and "\n" not in got["error"]
        return
    for other, (described, _) in {**before, mode: (got, tensors)}.items():
        assert "error" not in described, f"{other}: {described['error']}"
    assert kind.says.get(mode, "") in got["said"], got["said"]
    if mode not in kind.says and mode not in kind.limits:
        assert "note " not in got["said"].replace("note     the run goes on after step", ""), got["said"]
    if mode in ("resumed", "three_resumed"):
        assert before[NEEDED[mode][0]][0] == {"killed": 7, "said": before[NEEDED[mode][0]][0]["said"]}
        assert got["steps"] == 7  # from the 6th to the 12th
    if mode in kind.limits:
        assert kind.limits[mode] in got["said"] + before.get(NEEDED[mode][0], ({}, 0))[0].get("said", ""), got["said"]
        return
    wanted, wanted_tensors = before["plain_three" if mode == "three" and kind.per_process else NEEDED[mode][-1 if "resumed" in mode else 0]]
    exact = world_of(mode) == 1 or "resumed" in mode
    compare(tensors, wanted_tensors, exact)
    assert got["scores"] == pytest.approx(wanted["scores"], rel=1e-12, abs=1e-12)
    assert got["losses"].keys() == wanted["losses"].keys()
    for objective, losses in wanted["losses"].items():
        assert got["losses"][objective] == pytest.approx(losses, rel=1e-12, abs=1e-12), objective


def world_of(mode):
    return 3 if mode.startswith("three") else 1


def compare(tensors, wanted, exact):
    assert tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        if exact:
            assert torch.equal(tensors[key], tensor), f"{key}: {(tensors[key] - tensor).abs().max()}"
        else:
            torch.testing.assert_close(tensors[key], tensor, rtol=1e-12, atol=1e-12, msg=lambda text: f"{key}: {text}")

"""Whose recipes are executed from the folder of a run: the user's own, shipped ones, and what the user trusts."""

import hashlib
import json
import shutil
import threading
from pathlib import Path

import pytest
from conftest import ROOT

import nndist
from nndist import UserError, evaluate, load_run, predict
from nndist.cli import run_commands
from nndist.recipe import trust

RECIPE = '''
"""A line."""
from dataclasses import dataclass
from pathlib import Path
import torch
from torch import nn
from nndist import Data, Recipe, Resident

Path(MARK).touch()


@dataclass(kw_only=True)
class Line(Recipe):
    """A line."""

    epochs: int = 1
    lr: float = 0.1

    def data(self, config):
        x = torch.linspace(0, 1, 20).unsqueeze(1)
        return Data(train=Resident(x, 2 * x), test=Resident(x, 2 * x))

    def networks(self):
        return {"model": nn.Linear(1, 1)}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)

    def loss(self, networks, batch):
        return (networks["model"](batch[0]) - batch[1]).square().squeeze(1)
'''
QUIET = {"progress": False, "figures": False, "report": False, "wandb": "off", "threads": 1}


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that the recipe makes when it is executed."""
    return tmp_path / "executed"


@pytest.fixture
def theirs(tmp_path, mark, monkeypatch):
    """A run's folder, trained by somebody else: with another state folder, of a recipe whose file is not here."""
    return train_theirs(tmp_path, mark, monkeypatch)


def train_theirs(tmp_path, mark, monkeypatch, text=RECIPE, **helpers):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "their state"))
    source = tmp_path / "elsewhere"
    source.mkdir()
    for name, helper in helpers.items():
        (source / f"{name}.py").write_text(helper)
    (source / "line.py").write_text(text.replace("MARK", repr(str(mark))))
    folder = nndist.train(source / "line.py", run="it", runs_dir=tmp_path / "runs", **QUIET).folder
    shutil.rmtree(source)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "my state"))
    mark.unlink()
    return folder


def test_a_recipe_from_elsewhere_is_refused_in_one_line_that_names_the_file(theirs, mark):
    for use in (lambda: load_run(theirs).networks, lambda: predict(theirs, "0.5"), lambda: evaluate(theirs)):
        with pytest.raises(UserError, match=rf"read {theirs}/recipe\.py, then give --trust \(trust=True in Python\)$"):
            use()
    run = load_run(theirs)
    assert run.scores and run.history.series("train/loss") and not mark.exists(), "what executes nothing needs no trust"


def test_trust_executes_it_and_holds_from_then_on(theirs, mark):
    assert len(predict(theirs, "0.5", trust=True)) == 1 and mark.exists()
    assert evaluate(theirs).scores
    text = (theirs / "recipe.py").read_text() + "\nx = 1\n"
    (theirs / "recipe.py").write_text(text)
    about = json.loads((theirs / "run.json").read_text())
    about["source_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (theirs / "run.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="--trust"):
        evaluate(theirs)  # of this text only


@pytest.mark.parametrize("command, more", [("predict", ["0.5"]), ("evaluate", []), ("export", None)])
def test_the_commands_have_a_flag_for_it(theirs, mark, capsys, tmp_path, command, more):
    more = ["--to", "safetensors", "--output", str(tmp_path / "out.safetensors")] if more is None else more
    with pytest.raises(SystemExit) as stopped:
        getattr(run_commands, f"{command}_command")([str(theirs), *more])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and printed.count("\n") == 1 and f"{theirs}/recipe.py, then give --trust" in printed
    assert not mark.exists()
    try:
        getattr(run_commands, f"{command}_command")([str(theirs), *more, "--trust"])
    except SystemExit as stopped:
        assert not stopped.code
    assert mark.exists()


def test_the_weights_alone_need_no_trust(theirs, mark, tmp_path):
    from nndist.runs.inspection import convert

    convert(theirs, tmp_path / "weights.safetensors", step=None, ema=False)
    assert (tmp_path / "weights.safetensors").exists() and not mark.exists()


def test_ones_own_run_is_used_wherever_it_lies(tmp_path, mark, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "my state"))
    (tmp_path / "line.py").write_text(RECIPE.replace("MARK", repr(str(mark))))
    folder = nndist.train(tmp_path / "line.py", run="it", runs_dir=tmp_path / "runs", **QUIET).folder
    shutil.move(folder, tmp_path / "moved")
    assert load_run(tmp_path / "moved").networks
    (tmp_path / "line.py").unlink()
    assert load_run(tmp_path / "moved").networks


def test_a_shipped_recipe_is_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "their state"))
    folder = nndist.train(ROOT / "recipes/sum_mlp.py", max_steps=2, run="it", runs_dir=tmp_path, **QUIET).folder
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "my state"))
    assert load_run(folder).networks


def test_a_file_that_the_user_names_is_executed(theirs, mark, tmp_path):
    (tmp_path / "mine.py").write_text(RECIPE.replace("MARK", repr(str(mark))))
    assert load_run(theirs, recipe=tmp_path / "mine.py").networks and mark.exists()


HELPED = RECIPE.replace(
    "Path(MARK)",
    'from sizes import WIDTH\nimport importlib\ntry:\n    importlib.import_module("planted")\n'
    "except ImportError:\n    pass\nPath(MARK)",
)


def test_what_is_planted_beside_a_trusted_recipe_is_not_executed(tmp_path, mark, monkeypatch):
    """Neither in the folder of the helpers' copies, nor where run.json says that the recipe lay."""
    folder = train_theirs(tmp_path, mark, monkeypatch, HELPED, sizes="WIDTH = 1\n")
    about = json.loads((folder / "run.json").read_text())
    with pytest.raises(UserError, match=rf"recipe\.py and what it imports in {folder}/modules, then give --trust"):
        _ = load_run(folder).networks
    assert load_run(folder, trust=True).networks
    planted = tmp_path / "planted"
    (folder / "modules/planted.py").write_text(f"open({str(planted)!r}, 'w')")
    assert load_run(folder).networks and not planted.exists()
    other = shutil.copytree(folder / "modules", folder / "other")
    (folder / "run.json").write_text(json.dumps({**about, "recipe_file": str(other / "line.py")}))
    shutil.copy(folder / "recipe.py", other / "line.py")
    assert load_run(folder).networks and not planted.exists()
    (folder / "modules/sizes.py").write_text("WIDTH = 2\n")
    about["modules"] = {"sizes.py": hashlib.sha256(b"WIDTH = 2\n").hexdigest()}
    (folder / "run.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="--trust"):
        _ = load_run(folder).networks


def test_a_helper_that_reads_a_file_beside_itself_still_finds_it(tmp_path, mark, monkeypatch):
    """Where the user has trained it, it is imported from there."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "my state"))
    (tmp_path / "width.txt").write_text("1")
    (tmp_path / "sizes.py").write_text(
        "from pathlib import Path\nWIDTH = Path(__file__).with_name('width.txt').open()\n"
    )
    (tmp_path / "line.py").write_text(HELPED.replace("MARK", repr(str(mark))))
    folder = nndist.train(tmp_path / "line.py", run="it", runs_dir=tmp_path / "runs", **QUIET).folder
    assert load_run(folder).networks


def test_a_state_folder_that_cannot_be_written_fails_no_training(tmp_path, mark, monkeypatch):
    (tmp_path / "state").write_text("a file")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "line.py").write_text(RECIPE.replace("MARK", repr(str(mark))))
    result = nndist.train(tmp_path / "line.py", run="it", runs_dir=tmp_path / "runs", **QUIET)
    assert load_run(result).networks, "it has just been trained by this process"
    with pytest.raises(UserError, match="--trust"):
        _ = load_run(result.folder).networks
    assert load_run(result.folder, trust=True).networks


def test_many_may_record_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    modules = {f"package/{n}.py": b"x" * 1000 for n in range(20)}
    folders = [Path(f"/folder {number}") for number in range(8)]
    threads = [threading.Thread(target=trust.record, args=(b"recipe", modules, folder)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (entry,) = (tmp_path / "nndist/recipes").iterdir()
    assert {f"package/{path.name}" for path in (entry / "modules/package").iterdir()} == modules.keys()
    assert all(trust.trained_in(b"recipe", modules, folder) for folder in folders)
    assert not trust.trained_in(b"recipe", modules, Path("/else"))
    assert not trust.trained_in(b"recipe", {**modules, "more.py": b""}, folders[0])


@pytest.mark.parametrize(
    "platform, variables, expected",
    [
        ("linux", {}, "HOME/.local/state/nndist"),
        ("linux", {"XDG_STATE_HOME": "/state"}, "/state/nndist"),
        ("darwin", {}, "HOME/Library/Application Support/nndist"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/nndist"),
        ("win32", {}, "HOME/AppData/Local/nndist"),
    ],
)
def test_the_state_folder_is_where_the_platform_has_it(monkeypatch, platform, variables, expected):
    monkeypatch.setattr(trust.sys, "platform", platform)
    for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert trust.state_folder() == Path(expected.replace("HOME", str(Path.home())))

"""The command line of the training: flags, help, and one line for every error."""

import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import RECIPES, ROOT
from launching import Processes, accelerate, command, python, succeeded

from nndist.cli import train as cli
from nndist.flags.usage import flag

CNN = ROOT / "recipes/mnist_cnn.py"
TRAIN = ROOT / "launch/train.py"
COMMANDS = sorted((ROOT / "launch").glob("*.py"))


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Runs the command in this process, asserts exit code 2 and one line on stderr, and returns that line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            cli.train_command([*map(str, arguments)])
        printed = capsys.readouterr()
        assert stopped.value.code == 2
        lines = printed.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), printed.err
        assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("model.safetensors"))
        return lines[0]

    return call


def recipe_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--epoch", "3"], ["--epoch", "did you mean --epochs?"]),
        (["--epochs", "many"], ["--epochs", "'many'"]),
        (["--epochs", "-3"], ["--epochs -3", "at least 1"]),
        (["--batch-size", "0"], ["--batch-size 0", "at least 1"]),
        (["--precision", "fp8"], ["--precision", "'fp8'", "'bf16'"]),
        (["--precision", "fp16", "--cpu"], ["--precision fp16", "needs a GPU", "bf16"]),
        (["--lr"], ["--lr"]),
        (["extra"], ["extra"]),
        (["--accumulate", "0"], ["--accumulate 0", "at least 1"]),
        (["--evaluate-every", "often"], ["--evaluate-every 'often'", "'500 steps'"]),
        (["--evaluate-every", "5 minutes"], ["--evaluate-every '5 minutes'", "steps or epochs"]),
        (["--run", "a/b"], ["--run 'a/b'", "without '/'"]),
        (["--data-source", "sample", "--best", "accuracy"], ["--best accuracy", "test/accuracy"]),
        (["--data-source", "mnist", "--data-dir", "empty"], ["mnist", "empty"]),
        (["--seed", "-1"], ["--seed -1"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("-") else None,
)
def test_flags_that_cannot_be_meant(refused, monkeypatch, flags, expected):
    import urllib.error
    import urllib.request

    def closed(*arguments, **named):
        raise urllib.error.URLError("the network is closed")

    monkeypatch.setattr(urllib.request, "urlopen", closed)
    line = refused(CNN, *flags)
    for text in expected:
        assert text in line


def test_a_wrong_path_says_what_was_perhaps_meant_or_what_is_there(refused, tmp_path):
    assert "recipes/mnist_cn.py: no such file; did you mean mnist_cnn?" in refused(ROOT / "recipes/mnist_cn.py")
    (tmp_path / "weather.py").touch()
    assert "wether.py: no such file; did you mean weather.py?" in refused(tmp_path / "wether.py")
    assert f"x.py: no such file; {tmp_path} holds weather.py" in refused(tmp_path / "x.py")


def test_no_recipe(refused):
    assert "no recipe given" in refused()
    assert "the recipe comes first" in refused("--epochs", "3", CNN)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("x = 1\n", "defines no subclass of nndist.Recipe"),
        ("def f(:\n", "line 1"),
        ("import no_such_module\n", "No module named 'no_such_module'"),
        ("from nndist import Recipe\nclass A(Recipe): pass\nclass B(Recipe): pass\n", "mine.py:A"),
        (
            "from dataclasses import dataclass\nfrom nndist import Recipe\n@dataclass(kw_only=True)\n"
            "class A(Recipe):\n    seed: int = 3\n",
            "field 'seed' is also a setting of every run",
        ),
    ],
)
def test_a_module_that_is_no_recipe(refused, tmp_path, text, expected):
    line = refused(recipe_file(tmp_path, text))
    assert "mine.py" in line and expected in line


@pytest.mark.parametrize("text", ["x = 1\0", f"x = {'(' * 5000}{')' * 5000}", f"x = {'-' * 100_000}1"])
def test_a_module_that_no_parser_takes(refused, tmp_path, text):
    assert "mine.py: " in refused(recipe_file(tmp_path, text))


def test_a_file_that_is_no_module(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "must end in .py" in refused(tmp_path / "notes.txt")


def test_a_corrupt_data_file(refused, tmp_path, mnist_dir):
    raw = tmp_path / "data/MNIST/raw"
    shutil.copytree(mnist_dir / "MNIST/raw", raw)
    file = raw / "train-labels-idx1-ubyte"
    file.chmod(0o644)
    os.truncate(file, 1000)
    line = refused(CNN, "--data-dir", tmp_path / "data")
    assert "train-labels-idx1-ubyte" in line and "delete it" in line


def test_a_runs_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(CNN, "--data-source", "sample", "--runs-dir", tmp_path / "file")
    assert "--runs-dir" in line and "file" in line


def test_traceback_on_request(capsys):
    with pytest.raises(SystemExit):
        cli.train_command([str(CNN), "--epochs", "-3", "--traceback"])
    printed = capsys.readouterr().err
    assert "Traceback" in printed and printed.strip().splitlines()[-1].startswith("error: --epochs -3")


def test_the_command_itself_exits_with_2_and_one_line(tmp_path):
    done = python(TRAIN, CNN, "--epoch", "3", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "--epochs" in done.stderr


def test_two_processes_print_an_error_once(tmp_path):
    launched = Processes(2, [CNN, "--batch-size", 1, "--data-source", "sample", "--cpu"], folder=tmp_path)
    assert any(launched.wait())
    said = [line for line in launched.said().splitlines() if line.startswith("error: ")]
    assert said == [
        "error: --batch-size 1: smaller than the 2 processes it is split over; "
        "give at least 2, or start fewer processes"
    ]


@pytest.mark.parametrize(
    "world_size, options, tracebacks",
    [
        pytest.param(2, ["-q"], 1, marks=pytest.mark.long),
        *(pytest.param(1, options, lines, marks=pytest.mark.nightly) for options, lines in ((["-q"], 0), ([], 1))),
    ],
)
def test_what_a_launcher_adds_to_an_error_is_what_the_page_says(tmp_path, world_size, options, tracebacks):
    done = accelerate(world_size, *options, TRAIN, CNN, "--epochs", "-3", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("Traceback") == tracebacks
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: --epochs -3: must be at least 1"]
    assert bool(tracebacks) or done.stderr.splitlines() == said
    if world_size == 2:
        assert "--epochs -3: must be at least 1" in done.stderr.partition("Root Cause")[2]


def test_help_all_explains_every_field_of_the_recipe_and_setting_of_the_run(tmp_path):
    done = succeeded(command(TRAIN, CNN, "--help-all", cwd=tmp_path, env={"COLUMNS": "80"}))
    for text in (
        "document 000",
        "--epochs INT",
        "Passes over the training data",
        "--momentum",
        "--precision",
        "--runs-dir",
    ):
        assert text in done.stdout
    assert "recipe options" in done.stdout and "run options" in done.stdout


def screen(text: str) -> list[str]:
    """The lines of a help text; asserts that they fit one screen and that examples come first."""
    lines = text.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 80, text
    example = next(number for number, line in enumerate(lines) if line.startswith(("nndist ", "accelerate ")))
    assert example < next(number for number, line in enumerate(lines) if line.startswith("usage: ")), text
    return lines


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_help_is_one_screen_that_has_every_flag(capsys, monkeypatch, path):
    """Every option of a recipe or a run is in both help texts, wherever the data lie."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NNDIST_DATA", "/a/folder/whose/name/is/longer/than/most")
    with pytest.raises(SystemExit):
        cli.parse([f"recipes/{path.name}", "--help"])
    screen(text := capsys.readouterr().out)
    with pytest.raises(SystemExit):
        cli.parse([str(path), "--help-all"])
    flags = set(re.findall(r"^[│ ]{2}(--[a-z][\w-]*)", capsys.readouterr().out, flags=re.MULTILINE))
    # a switch is listed in the form that changes its default
    shown = {flag.replace("--no-", "--") for flag in re.findall(r"--[a-z][\w-]*", text)}
    assert len(flags) > 45 and flags <= shown, flags - shown
    assert "--help-all" in text


def test_a_tuple_is_shown_as_it_is_given():
    assert flag("layers", tuple[int, ...], (64, 32)) == "--layers 64 32"


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.stem)
def test_the_help_of_every_command_is_one_screen_with_examples_first(script):
    lines = screen(succeeded(python(script, "--help", env={"COLUMNS": "80"})).stdout)
    assert lines[0].endswith(".") and any(f"nndist {script.stem}" in line for line in lines)


def test_help_without_a_recipe():
    assert "accelerate launch -m nndist train mnist_cnn" in succeeded(command(TRAIN, "--help")).stdout


USERS_RECIPE = '''
"""A custom recipe with a helper module beside it."""
from dataclasses import dataclass
import torch
from torch import nn
from nndist import Data, Recipe, Resident
from helper import target

@dataclass(kw_only=True)
class Mine(Recipe):
    """Sums of four numbers."""
    epochs: int = 2
    lr: float = 0.1
    width: int = 8
    """Hidden units."""

    def data(self, config):
        x = torch.rand(200, 4, generator=torch.Generator().manual_seed(0))
        return Data(train=Resident(x, target(x)), test=Resident(x[:50], target(x[:50])))

    def networks(self):
        return {"model": nn.Sequential(nn.Linear(4, self.width), nn.ReLU(), nn.Linear(self.width, 1))}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)

    def loss(self, networks, batch):
        x, y = batch
        return (networks["model"](x) - y).square().squeeze(1)
'''


def test_a_users_own_recipe_anywhere_on_disk(tmp_path):
    folder = tmp_path / "somewhere else"
    folder.mkdir()
    (folder / "helper.py").write_text("def target(x):\n    return x.sum(1, keepdim=True)\n")
    (folder / "mine.py").write_text(USERS_RECIPE)
    done = succeeded(command(TRAIN, folder / "mine.py", "--width", "5", "--run", "first", cwd=tmp_path))
    assert "Sums of four numbers" in done.stdout and "test/loss" in done.stdout
    assert "31 parameters" in done.stdout  # 4 * 5 + 5 + 5 + 1
    assert (tmp_path / "runs/mine/first/checkpoints/step-00000008/model.safetensors").exists()
    assert (tmp_path / "runs/mine/first/figures/training.png").stat().st_size > 5000


def test_the_plan_fits_80_columns_and_says_what_it_must(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [CNN, "--data-source", "sample", "--max-steps", 2, "--run", "first", "--accumulate", 2, "--cpu"]
    launched = Processes(2, arguments, folder=tmp_path)
    assert launched.wait() == [0, 0], launched.said()
    said = launched.said()
    lines = dict(line.split(None, 1) for line in said.splitlines()[:8])
    assert "document 000, section 2" in lines["recipe"]
    assert lines["data"] == "MNIST sample: 4,000 to train on, 1,000 test"
    assert "1,199,882 parameters" in lines["network"]
    assert "CPU x 2 processes" in lines["device"] and "fp32" in lines["device"]
    assert lines["batch"] == "64 = 16 per process x 2 x 2 accumulated"
    assert lines["steps"] == "630 = 63 x 10 epochs, stopping after 2"
    assert lines["run"] == "runs/mnist_cnn/first"
    assert max(map(len, said.splitlines()[:8])) <= 80
    assert said.count("recipe   ") == 1, "the plan is printed once, not once per process"
    assert "\r" not in said and "it/s" not in said, "a bar is for a terminal"
    assert said.count("MNIST sample") >= 3, "and so does every result"


def test_a_recurrent_network_that_the_cpu_lacks_in_bf16_is_one_line(tmp_path, monkeypatch):
    import torch

    import nndist

    def lacking(*arguments):
        raise RuntimeError("could not create a primitive. Run with ONEDNN_VERBOSE=all")

    monkeypatch.setattr(torch.nn.LSTM, "forward", lacking)
    with pytest.raises(
        nndist.UserError, match=r"--precision bf16: this CPU has no LSTM in bf16 .*primitive\); use fp32"
    ):
        nndist.train(ROOT / "recipes/mnist_rnn.py", precision="bf16", data_source="sample", runs_dir=tmp_path)

"""The command `nndist`: its sub-commands, shipped recipes by name, the doctor; and all of it as a wheel brings it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from conftest import RECIPES, ROOT
from launching import python, succeeded
from written_commands import Wrong, check

from nndist.cli import doctor, experiment_commands, main
from nndist.cli.commands import submit_command
from nndist.cli.table import COMMANDS
from nndist.experiments.members import plan
from nndist.recipe.loading import load_recipe


def test_every_command_is_there_and_has_a_script_that_is_it():
    scripts = {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert COMMANDS.keys() - scripts == {"bisect"}, "launch/bisect.py would hide the standard library's module"
    assert not scripts & sys.stdlib_module_names and scripts <= COMMANDS.keys()
    for name in COMMANDS:
        assert callable(main.function(name))
    for name in scripts:
        assert f'main(["{name}", *sys.argv[1:]])' in (ROOT / f"launch/{name}.py").read_text()
    assert not COMMANDS.keys() & {path.stem for path in RECIPES}, "nndist NAME would be either"


def test_all_commands_are_listed_on_one_screen(capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main([])
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 2 and len(lines) < 30 and max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_are_true(name):
    examples = re.sub(r"\s*\\\n\s*", " ", COMMANDS[name].examples)
    found = re.findall(r"^((?:nndist|torchrun|accelerate) .*)", examples, flags=re.MULTILINE)
    assert found
    for example in found:
        check(example)


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"train"}))
def test_every_command_has_the_traceback_that_an_unexpected_error_points_to(capsys, name):
    with pytest.raises(SystemExit):
        main.main([name, "--help"])
    said = capsys.readouterr().out
    assert "--traceback" in said or "All other flags are the training's own" in said


def test_a_comparison_shows_the_traceback_that_is_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(experiment_commands, "compare_values", lambda *_: {}["absent"])
    for flags in ([], ["--traceback"]):
        with pytest.raises(SystemExit) as stopped:
            main.main(["compare", "sum_mlp", *flags])
        said = capsys.readouterr().err
        assert stopped.value.code == 1 and said.splitlines()[-1].startswith("error: process 0: KeyError")
        assert ("Traceback" in said) is bool(flags)


def test_an_unknown_shell_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(["completion", "fish"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "'fish'" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("wrong", ["nndist trian mnist_cnn", "torchrun --nproc-per-node 2 -m nndist train --epoch 3"])
def test_a_wrong_example_would_be_noticed(wrong):
    with pytest.raises(Wrong):
        check(wrong)


@pytest.mark.parametrize(
    "word, meant",
    [("trian", "nndist train?"), ("mnist_cn", "nndist train mnist_cnn?"), ("xyz", "nndist --help lists them")],
)
def test_a_mistyped_command_is_one_line_with_the_near_one(capsys, word, meant):
    with pytest.raises(SystemExit) as stopped:
        main.main([word, "--lr", "3"])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.err.startswith(f"error: {word}: no such command; ")
    assert meant in printed.err and printed.err.count("\n") == 1


def test_the_lists_and_helps_load_nothing_heavy():
    heavy = ["torch", "torchvision", "accelerate", "matplotlib", "wandb", "numpy"]
    for arguments in (["--help"], ["predict", "--help"], ["compare", "--help"], ["trian"]):
        code = f"""
import sys

from nndist.cli.main import main
try:
    main({arguments})
except SystemExit:
    print([name for name in {heavy} if name in sys.modules])
"""
        assert succeeded(python("-c", code)).stdout.splitlines()[-1] == "[]", arguments


def test_a_shipped_recipe_is_found_by_its_name_where_there_is_no_such_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("sum_mlp").document
    _, members = plan("sum_mlp", ["lr=0.1,0.2"], 1, [], name=None, runs_dir=Path("runs"))
    assert [member.folder for member in members] == [Path(f"runs/sum_mlp/lr={lr}-seed0") for lr in (0.1, 0.2)]
    submit_command(["sum_mlp", "--dry-run", "--epochs", "2"])
    assert "\nset -- sum_mlp --epochs 2\n" in capsys.readouterr().out
    text = (ROOT / "recipes/sum_mlp.py").read_text().replace("lr: float = ", "lr: float = 7 + ")
    (tmp_path / "sum_mlp").write_text(text)
    with pytest.raises(Exception, match=r"must end in \.py"):  # what one has oneself comes first
        load_recipe("sum_mlp")


def test_the_command_trains_what_is_named_in_place_of_a_command(tmp_path):
    flags = ["--max-steps", "2", "--no-figures", "--wandb", "off", "--run", "first"]
    for number, start in enumerate((["nndist", "sum_mlp"], ["nndist.train", "sum_mlp"])):
        done = succeeded(python("-m", *start, *flags, "--runs-dir", tmp_path / str(number), cwd=tmp_path))
        assert "recipe   sum_mlp" in done.stdout


def test_the_function_stays_the_function_when_the_module_of_its_name_is_imported():
    code = "import nndist.train, nndist; from nndist import train; print(nndist.train is train, train.__module__)"
    assert succeeded(python("-c", code)).stdout == "True nndist.training.api\n"


# The doctor.


def screen(capsys, *arguments) -> dict[str, str]:
    """What it prints, by title, after asserting that it fits one screen."""
    doctor.doctor_command([*map(str, arguments)])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 30 and max(map(len, printed.splitlines())) <= 80
    joined = re.sub(r"\n {10}", " ", printed)
    return {line[: doctor.INDENT].strip(): line[doctor.INDENT :] for line in joined.splitlines()}


def test_the_doctor_says_what_a_bug_report_needs(capsys, tmp_path, monkeypatch):
    import torch

    monkeypatch.setenv("WANDB_API_KEY", "c0ffee" * 7)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    said = screen(capsys, "--data-dir", tmp_path / "data")
    assert f"torch {torch.__version__.partition('+')[0]}" in said["packages"] and "gloo" in said["backends"]
    assert said["data"].startswith("~/data: ") and "no MNIST" in said["data"]
    assert said["W&B"] == "an API key is configured, $WANDB_MODE=online: runs would be online"
    assert "CPU x 1 process" in said["chosen"] or torch.cuda.is_available()
    assert "c0ffee" not in str(said) and str(tmp_path) not in str(said)


def test_the_doctor_knows_mnist_where_it_is(capsys, mnist_dir):
    assert screen(capsys, "--data-dir", mnist_dir)["data"].endswith("; MNIST is there")


def test_what_is_broken_is_a_line_and_not_the_end(capsys, monkeypatch):
    def broken():
        raise RuntimeError("no such library\nand more")

    monkeypatch.setattr(doctor, "backends", broken)
    said = screen(capsys)
    assert said["backends"] == "RuntimeError: no such library" and said["chosen"]


# Installed.


def test_every_folder_of_modules_is_a_package_of_the_wheel():
    """And so are the recipes and the launchers' files, from where they lie."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "nndist").rglob("*.py")}
    assert sorted(setuptools["packages"]) == sorted([*folders, *setuptools["package-dir"]])
    assert setuptools["package-dir"] == {"nndist.recipes": "recipes", "nndist.launch": "launch"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs a program of a fresh virtual environment that has the wheel of the sdist, in an empty folder."""
    root = tmp_path_factory.mktemp("installed")
    tree, programs, empty = root / "nndist-tree", root / "venv/bin", root / "empty"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    succeeded(python("-m", "venv", root / "venv"))
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "NNDIST_DATA")}

    def run(program, *arguments, cwd=empty):
        command = [programs / program, *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
        return succeeded(done).stdout

    empty.mkdir()
    run("pip", "install", "setuptools>=77")
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(root)!r})"
    run("python", "-c", build, cwd=tree)
    shutil.rmtree(tree)
    (sdist,) = root.glob("*.tar.gz")
    run("pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root, sdist)
    (wheel,) = root.glob("*.whl")
    run("pip", "install", "--no-deps", wheel)
    (packages,) = (root / "venv").glob("lib/python*/site-packages")
    (packages / "present.pth").write_text(sysconfig.get_path("purelib"))  # torch and the others as they are here
    assert run("python", "-c", "import nndist; print(nndist.__file__)").startswith(str(packages))
    return run


@pytest.mark.long
def test_the_wheel_brings_the_command_and_the_recipes(installed, tmp_path):
    """In an empty folder, without the repository."""
    trained = installed("nndist", "train", "mnist_cnn", "--epochs", "1", "--data-source", "sample", "--run", "first")
    assert "recipe   mnist_cnn: " in trained and "test/accuracy" in trained and "report.html" in trained
    from PIL import Image

    Image.new("L", (28, 28)).save(tmp_path / "digit.png")
    assert "digit.png" in installed("nndist", "predict", "runs/mnist_cnn/first", tmp_path / "digit.png")
    assert installed("nndist", "report", "runs").splitlines()[-1] == "runs/index.html"
    listed = [line for line in installed("nndist", "recipes").splitlines() if line[0] != " "]
    assert listed == [path.stem for path in RECIPES]
    said = installed("nndist", "doctor")
    assert ", installed, " in said and max(map(len, said.splitlines())) <= 80
    assert "-m nndist" in installed("nndist", "submit", "mnist_cnn", "--dry-run")
    installed("nndist", "new", "my_net.py", "--like", "sum_mlp")
    assert "check passed" in installed("nndist", "train", "my_net.py", "--check")
    assert "nndist train mnist_cnn" in installed("nndist", "--help")


@pytest.mark.long
def test_launchers_start_the_wheels_command(installed):
    folder = Path(installed("python", "-c", "from nndist.files import LAUNCH; print(LAUNCH)").strip())
    several = ["--config_file", folder / "accelerate/cpu_ddp.yaml", "--num_processes", "2"]
    for number, module in enumerate((["nndist", "train"], ["nndist.train"])):
        flags = ["-m", *module, "two_clusters", "--run-name", f"two{number}", "--max-steps", "4", "--no-figures"]
        said = installed("python", "-m", "accelerate.commands.accelerate_cli", "launch", *several, *flags)
        assert "CPU x 2 processes" in said and "two_clusters" in said


def test_imports_leave_the_collection_of_garbage_as_it_was():
    import gc

    from nndist.cli.main import function

    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            function("train")
            assert gc.isenabled() == enabled and gc.get_freeze_count() > 1000
        finally:
            gc.enable()


DROPPED = """
from dataclasses import dataclass

import torch
from torch import nn

from nndist import Data, Recipe, Resident


@dataclass(kw_only=True)
class Dropped(Recipe):
    epochs: int = 2
    share: float = 0.5

    def data(self, config):
        x = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
        return Data(train=Resident(x), test=Resident(x), source="generated")

    def networks(self):
        return {"model": nn.Sequential(nn.Linear(3, 8), nn.Dropout(self.share), nn.Linear(8, 1))}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=0.1)

    def loss(self, networks, batch):
        return nn.functional.dropout(networks["model"](batch[0]), self.share).square().squeeze(1)
"""


def test_verify_trains_without_dropout_and_notes_the_examples(tmp_path):
    """Else its rows for other numbers of processes would compare runs that draw differently."""
    (tmp_path / "dropped.py").write_text(DROPPED)
    weights = []
    for share in ("0.5", "0"):
        flags = ["--share", share, "--run", share, "--max-steps", "2", "--no-figures", "--no-progress", "--cpu"]
        words = [
            "-m",
            "nndist.cli.verified",
            "dropped.py",
            "--without-dropout",
            "--examples-to",
            f"seen{share}",
            *flags,
        ]
        succeeded(python(*words, cwd=tmp_path))
        (file,) = (tmp_path / f"runs/dropped/{share}/checkpoints").glob("*/model.safetensors")
        weights.append(file.read_bytes())
        assert len((tmp_path / f"seen{share}/rank-0.jsonl").read_text().splitlines()) == 2
    assert weights[0] == weights[1]

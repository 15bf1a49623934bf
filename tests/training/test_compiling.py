"""--compile: its own bits, which a resume ends in; keys, hooks and scores as without it; one line where it can't be."""

import json
from dataclasses import dataclass

import pytest
import torch
from launching import ROOT, python
from resuming import SAVES, Run, assert_same
from safetensors.torch import load_file
from torch import nn
from toys import Line

import nndist
from nndist.training import compiling

FLAGS = (*SAVES, "--compile")


@pytest.fixture
def train(tmp_path):
    """nndist.train into a folder of the test, quietly, compiled."""

    def call(recipe, **settings):
        made = {"runs_dir": tmp_path, "run": "it", "progress": False, "figures": False, "threads": 1, "compile": True}
        return nndist.train(recipe, wandb="off", report=False, **{**made, **settings})

    return call


def saved(result):
    """Every tensor of the newest checkpoint."""
    folder = max((result.folder / "checkpoints").glob("step-*"))
    return {f"{path.stem}/{n}": t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_resume_has_the_bits_of_an_uninterrupted_run(train, capsys):
    """Stopped after the batch of 4 at the end of an epoch, which must not change the graph of the others."""
    fields = {"dropout": 0.3, "ema_decay": 0.9}
    whole = train(Line(**fields), run="whole", max_steps=17)
    assert capsys.readouterr().out.count("compiled in the first step") == 1
    train(Line(**fields), run="halves", max_steps=8)
    halves = train(Line(**fields), run="halves", max_steps=17)
    assert_same_bits(saved(halves), saved(whole))
    assert json.loads((whole.folder / "run.json").read_text())["settings"]["compile"] is True
    plain = train(Line(**fields), run="plain", compile=False, max_steps=17)
    assert saved(whole).keys() == saved(plain).keys(), "the names of the weights are those of the recipe's networks"
    assert "compiled in" not in capsys.readouterr().out.rpartition("run ")[2]


def test_each_size_has_a_graph_of_its_own(train, monkeypatch):
    """And none is for any size: by torch's default what came before decides which graph a batch gets."""
    sizes = []

    def backend(graph, inputs):
        assert all(isinstance(given, torch.Tensor) for given in inputs), "no size is a symbol"
        sizes.append({size for tensor in inputs for size in tensor.shape})
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    train(Line(dropout=0.0), max_steps=20)  # two epochs of 100 examples by 16, and more
    assert all(type(size) is int for of_graph in sizes for size in of_graph)
    assert [{16, 4} & of_graph for of_graph in sizes[1:]] == [{16, 4}, {4}], "4 is also what an example has"


@pytest.mark.long
def test_it_is_the_same_training_up_to_rounding(train):
    compiled = saved(train(Line(dropout=0.0), run="compiled", max_steps=20))
    plain = saved(train(Line(dropout=0.0), run="plain", compile=False, max_steps=20))
    for name, tensor in plain.items():
        if name.startswith("model/"):
            torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_resume_with_another_setting_is_told(train, capsys):
    train(Line(), max_steps=3)
    train(Line(), max_steps=6, compile=False)
    assert "compile on before, off now: bits may differ" in capsys.readouterr().out


@dataclass(kw_only=True)
class Asking(Line):
    """Its network says whether it is being compiled."""

    def networks(self):
        asked = self.asked = []

        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 1)

            def forward(self, x):
                asked.append((self.training, torch.compiler.is_compiling()))
                return self.layer(x)

        return {"model": Network()}


@pytest.mark.long
def test_a_hook_is_called_from_when_it_is_added_until_it_is_removed(train):
    class Hooked(Line):
        def networks(self):
            self.called = []
            return super().networks()

        def after_step(self, networks, step):
            if step == 2:
                self.handle = networks["model"][0].register_forward_hook(lambda *_: self.called.append(1))
            if step == 4:
                self.handle.remove()

    recipe = Hooked(dropout=0.0)
    train(recipe, max_steps=6)
    assert len(recipe.called) == 2


@pytest.mark.long
def test_training_passes_are_compiled_and_evaluations_are_not(train):
    """So scores are those of `nndist evaluate`."""
    recipe = Asking()
    result = train(recipe, max_steps=6, eval_batch_size=7)
    in_training = {compiled for training, compiled in recipe.asked if training}
    in_evaluation = {compiled for training, compiled in recipe.asked if not training}
    assert (in_training, in_evaluation) == ({True}, {False})
    recipe.asked.clear()
    result.networks["model"](torch.zeros(3, 4))
    assert recipe.asked == [(True, False)], "and what is used afterwards is the plain network"


@pytest.mark.long
def test_bf16(train):
    result = train(Line(), precision="bf16", max_steps=8)
    assert all(tensor.dtype == torch.float32 for tensor in result.networks["model"].state_dict().values())


@pytest.mark.long
def test_inputs_of_too_many_sizes_are_one_line(train, monkeypatch):
    monkeypatch.setattr(compiling, "MOST_SHAPES", 1)
    with pytest.raises(nndist.UserError, match=r"^--compile: a network has been compiled 1 times.*leave the flag out$"):
        train(Line(), max_steps=7)


def test_without_a_compiler_it_is_one_line(tmp_path):
    flags = ["--compile", "--runs-dir", tmp_path, "--no-progress", "--wandb", "off"]
    env = {"PATH": str(tmp_path), "CXX": str(tmp_path / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = python(ROOT / "launch/train.py", ROOT / "recipes/sum_mlp.py", *flags, env=env)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --compile: nothing can be compiled here (") and "apt install g++" in line
    assert line.endswith("or leave the flag out")


@pytest.mark.parametrize(
    "world_size, gradient_sync",
    [
        pytest.param(1, "step", marks=pytest.mark.nightly),  # a quick test above is alike
        pytest.param(3, "step", marks=pytest.mark.nightly),
        pytest.param(3, "ddp", marks=pytest.mark.long),
    ],
)
def test_killed_while_compiled(tmp_path, uninterrupted, world_size, gradient_sync):
    """Two networks, with BatchNorm over all processes, dropout and averages."""
    flags = (*FLAGS, "--gradient-sync", gradient_sync, "--timeout-seconds", 200)
    run = Run(tmp_path, *flags, world_size=world_size).die(f"{world_size - 1} 14 kill").finish()
    assert_same(run, uninterrupted(world_size, *flags))

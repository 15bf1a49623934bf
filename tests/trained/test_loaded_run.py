"""A run that was trained, loaded again: from Python and by launch/evaluate.py."""

import json
import random
import resource
import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import ROOT
from launching import command, free_port, succeeded
from torch import nn
from toys import Line

import nndist
from nndist.cli.run_commands import evaluate_command
from nndist.trained.loaded_run import LoadedRun, load_run

RECIPE = """
from dataclasses import dataclass
import torch
from torch import nn
from nndist import Classifier, Data, Resident
from beside import WIDTH

@dataclass(kw_only=True)
class Signs(Classifier):
    lr: float = 0.1
    epochs: int = 2
    def data(self, config):
        x = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
        self.num_classes = 3
        return Data(Resident(x, y), Resident(x[:50], y[:50]), classes=("none", "one", "both"))
    def networks(self):
        return {"model": nn.Sequential(nn.Linear(3, WIDTH), nn.ReLU(), nn.Linear(WIDTH, self.num_classes))}
    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)
"""
QUIET = {"progress": False, "figures": False, "report": False, "wandb": "off", "threads": 1}


@pytest.fixture
def signs(tmp_path):
    """A recipe's file that imports a module beside it, and the result of its training."""
    (tmp_path / "beside.py").write_text("WIDTH = 8\n")
    (tmp_path / "signs.py").write_text(RECIPE)
    return nndist.train(tmp_path / "signs.py", run="it", lr=0.2, runs_dir=tmp_path / "runs", **QUIET)


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A run that kept several checkpoints, a best one and a moving average."""
    recipe = Line(ema_decay=0.9, best="test/loss", best_is="lowest", epochs=4, lr=0.3)
    settings = {**QUIET, "save_every": "7 steps", "keep": 9}
    return nndist.train(recipe, run="it", runs_dir=tmp_path_factory.mktemp("runs"), **settings)


def same(networks, others):
    ours = {f"{n}.{k}": t for n, net in networks.items() for k, t in net.state_dict().items()}
    theirs = {f"{n}.{k}": t for n, net in others.items() for k, t in net.state_dict().items()}
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def everything(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in [folder, *folder.rglob("*")]}


def test_a_run_has_its_recipes_text_and_is_rebuilt_from_it(signs):
    assert (signs.folder / "recipe.py").read_text() == RECIPE
    run = load_run(signs.folder)
    assert same(run.networks, signs.networks) and not run.networks["model"].training
    assert run.fields["lr"] == run.recipe.lr == 0.2 and run.recipe.name == "signs" and run.notes == []
    assert run.scores == signs.scores and run.classes == ["none", "one", "both"]
    steps, values = run.history.series("test/accuracy")
    assert (steps, values) == signs.history.series("test/accuracy") and type(steps) is type(values) is list
    assert same(load_run(signs).networks, signs.networks)  # a Result names its folder


def test_what_data_told_the_recipe_is_known_without_the_data(signs):
    run = load_run(signs)
    assert run.recipe.num_classes == 3  # set by data(), which has not been called


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_a_recipe_that_has_changed_or_gone_is_said_once_and_the_copy_used(signs, tmp_path, change):
    file = tmp_path / "signs.py"
    file.write_text(RECIPE.replace("nn.ReLU()", "nn.Tanh()")) if change == "changed" else file.unlink()
    found = load_run(signs.folder).predict([[1.0, 2.0, 3.0], [-1.0, 0.0, 0.0]])
    with torch.no_grad():
        expected = signs.networks["model"](torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 0.0]])).softmax(1).max(1)
    assert [row["probability"] for row in found.rows()] == pytest.approx(expected.values.tolist(), rel=1e-6)
    assert len(found.notes) == 1 and change in found.notes[0] and "recipe.py" in found.notes[0]


def test_a_run_of_an_earlier_version_needs_the_file_as_it_was(signs, tmp_path):
    (signs.folder / "recipe.py").unlink()
    about = json.loads((signs.folder / "run.json").read_text())
    for name in ("recipe_file", "recipe_class", "found", "classes"):
        del about[name]
    about["command"] = ["launch/train.py", str(tmp_path / "signs.py"), "--lr", "0.2"]
    (signs.folder / "run.json").write_text(json.dumps(about))
    run = load_run(signs.folder)
    run.recipe.num_classes = 3
    assert same(run.networks, signs.networks)
    (tmp_path / "signs.py").write_text(RECIPE + "# changed\n")
    with pytest.raises(nndist.UserError, match=r"signs.py is not what it was trained with and no copy was kept"):
        _ = load_run(signs.folder).networks
    given = load_run(signs.folder, recipe=tmp_path / "signs.py")
    given.recipe.num_classes = 3
    assert same(given.networks, signs.networks) and "as requested" in given.notes[0]


def test_a_copy_that_was_edited_is_not_taken_for_the_recipe(signs, tmp_path):
    (signs.folder / "recipe.py").write_text(RECIPE + "# edited\n")
    assert load_run(signs.folder).notes == []  # the file agrees
    (tmp_path / "signs.py").unlink()
    with pytest.raises(nndist.UserError, match="no copy was kept"):
        _ = load_run(signs.folder).recipe


def test_the_copy_is_the_text_that_was_trained_even_if_the_file_changes_meanwhile(tmp_path):
    (tmp_path / "beside.py").write_text("WIDTH = 8\n")
    file = tmp_path / "signs.py"
    file.write_text(RECIPE + f"\nfrom pathlib import Path\nPath({str(file)!r}).write_text('nothing')\n")
    before = file.read_text()
    result = nndist.train(file, run="it", runs_dir=tmp_path / "runs", **QUIET)
    assert (result.folder / "recipe.py").read_text() == before
    assert same(load_run(result).networks, result.networks)


def test_which_weights(line):
    run = load_run(line.folder)
    every = {name: run.weights(name) for name in ("auto", "best", "last", "average")}
    assert same(every["last"].networks, line.networks) and every["last"].step == line.steps
    assert line.best["step"] != line.steps, "the toy must have its best evaluation before its end"
    assert every["auto"].step == every["best"].step == line.best["step"] and same(
        every["auto"].networks, every["best"].networks
    )
    assert every["average"].step == line.steps and not same(every["average"].networks, line.networks)
    texts = {name: found.text for name, found in every.items()}
    assert "best weights" in texts["auto"] and "EMA" in texts["auto"] and "test/loss" in texts["auto"]
    assert texts["last"] == f"last weights, step {line.steps}" and "EMA" in texts["average"]


def test_weights_that_are_not_there(signs):
    run = load_run(signs)
    for which in ("best", "average"):
        with pytest.raises(nndist.UserError, match=f"--weights {which}"):
            run.weights(which)
    assert "last weights" in run.weights().text


def test_an_evaluation_gives_the_scores_that_the_training_recorded(signs, line):
    assert nndist.evaluate(signs, threads=1).scores == signs.scores
    assert nndist.evaluate(line, threads=1).scores == line.best["scores"]
    found = nndist.evaluate(signs, threads=1).sets["test"]
    assert int(found.confusion.sum()) == found.examples == 50
    rows = found.by_class()
    assert sum(row["right"] for row in rows) / 50 == pytest.approx(signs.scores["test/accuracy"])
    inputs = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))[:50]
    labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0.5).long()
    with torch.no_grad():
        answers = signs.networks["model"](inputs).argmax(1)
    for number, row in enumerate(rows):
        true, said = labels == number, answers == number
        assert (row["examples"], row["right"]) == (int(true.sum()), int((true & said).sum()))
        assert row["recall"] == pytest.approx(float((true & said).sum() / true.sum()))
        assert row["precision"] == (pytest.approx(float((true & said).sum() / said.sum())) if said.any() else None)


def test_nothing_is_written_into_the_runs_folder(signs):
    before = everything(signs.folder)
    run = LoadedRun(signs.folder)
    run.evaluate(threads=1)
    run.predict([[1.0, 2.0, 3.0]])
    assert everything(signs.folder) == before


def idx(path, values):
    """An IDX file of uint8 values, as MNIST and its kin are stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes((0, 0, 8, values.dim())) + b"".join(struct.pack(">I", size) for size in values.shape)
    path.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


def test_another_named_set_is_named_in_every_line(tmp_path, capsys):
    result = nndist.train(
        ROOT / "recipes/mnist_mlp.py", run="it", data_source="sample", max_steps=3, runs_dir=tmp_path, **QUIET
    )
    capsys.readouterr()
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 30), ("t10k", 70)):
        raw = tmp_path / "data/FashionMNIST/raw"
        idx(raw / f"{split}-images-idx3-ubyte", torch.randint(256, (count, 28, 28), generator=generator))
        idx(raw / f"{split}-labels-idx1-ubyte", torch.arange(count) % 10)
    arguments = [str(result.folder), "--data-source", "fashion-mnist", "--data-dir", str(tmp_path / "data")]
    with pytest.raises(SystemExit) as stopped:
        evaluate_command(arguments)
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [
        line for line in lines if line and "Fashion-MNIST" not in line and not line.startswith(("run", "device"))
    ] == []
    assert any("trained on MNIST sample" in line for line in lines) and max(map(len, lines)) <= 100
    with pytest.raises(SystemExit):
        evaluate_command([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["data"] == "Fashion-MNIST" and found["sets"]["test"]["examples"] == 70
    assert sum(map(sum, found["sets"]["test"]["confusion"])) == 70
    assert found["sets"]["test"]["classes"][9]["class"] == "Ankle boot"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["nowhere"], "nowhere/run.json"),
        (["RUN", "--data-source", "fashion-mnist", "--data-dir", "empty"], "fashion-mnist"),
        (["RUN", "--lr"], "--lr: needs a value"),
        (["RUN", "--bogus", "1"], "--bogus: neither a flag nor a field"),
        (["RUN", "--epochs", "many"], "--epochs many: must be a number"),
        (["RUN", "--figure", "x.jpg"], "--figure x.jpg: the file's name must end in .png"),
        (["RUN", "--weights", "average"], "--weights average"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(tmp_path, trained, capsys, monkeypatch, arguments, expected):
    result = trained("mnist_mlp", max_steps=2, figures=False, report=False, run="mistakes")
    monkeypatch.setattr("nndist.datasets.mnist.download", missing)
    with pytest.raises(SystemExit) as stopped:
        evaluate_command([str(result.folder) if word == "RUN" else word for word in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0]


def missing(archive, raw, *, progress):
    from nndist.datasets.mnist import UnavailableError

    raise UnavailableError("no network here")


def test_a_run_whose_weights_do_not_fit_is_refused(signs):
    about = json.loads((signs.folder / "run.json").read_text())
    about["found"]["num_classes"] = 4
    (signs.folder / "run.json").write_text(json.dumps(about))
    with pytest.raises(nndist.UserError, match=r"do not fit.*2\.weight"):
        _ = load_run(signs.folder).networks


def test_a_run_without_a_checkpoint_is_refused(signs):
    shutil.rmtree(signs.folder / "checkpoints")
    with pytest.raises(nndist.UserError, match="holds no checkpoint yet"):
        load_run(signs.folder).weights()


@pytest.mark.long
def test_two_processes_count_the_same(signs):
    """Started here; by Accelerate's launcher, one of launch/README.md's blocks starts them."""
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{free_port()}"}
    where |= {"ACCELERATE_USE_CPU": "true"}

    def evaluated(rank):
        env = {**where, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        return succeeded(command(ROOT / "launch/evaluate.py", signs.folder, "--json", env=env))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(evaluated, range(2))
    alone = nndist.evaluate(signs.folder).sets["test"]
    both = json.loads(first.stdout)
    assert not second.stdout and "2 processes" in both["device"]
    assert both["sets"]["test"]["confusion"] == alone.confusion.tolist()
    assert both["sets"]["test"]["scores"] == pytest.approx(alone.scores, rel=1e-6)
    refused = command(ROOT / "launch/evaluate.py", signs.folder, "--weights", "best")
    assert refused.returncode == 2 and refused.stderr.startswith("error: --weights best")


@pytest.mark.parametrize("field", ["width", "num_layers", "num_positions", "num_scales"])
def test_networks_that_the_weights_cannot_be_of_are_not_made(tmp_path, field):
    """A hostile run.json: nothing is allocated for it, wherever in the making of a network it would be."""

    @dataclass(kw_only=True)
    class Sized(Line):
        width: int = 8
        num_layers: int = 1
        num_positions: int = 4
        num_scales: int = 2

        def networks(self):
            last = [nn.Linear(self.width, 1) for _ in range(self.num_layers)]
            network = nn.Sequential(nn.Linear(4, self.width), *last)
            network.register_buffer("positions", torch.arange(self.num_positions), persistent=False)
            network.register_buffer("scales", torch.linspace(0, 1, self.num_scales))
            return {"model": network}

    result = nndist.train(Sized(), run="it", runs_dir=tmp_path, **QUIET)
    assert same(load_run(result.folder, recipe=Sized).networks, result.networks)
    about = json.loads((result.folder / "run.json").read_text())
    about["fields"][field] = 10**12
    (result.folder / "run.json").write_text(json.dumps(about))
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(nndist.UserError, match=r"run.json: its fields ask for networks far larger than its checkpoint"):
        _ = load_run(result.folder, recipe=Sized).networks
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "KiB"
    assert time.monotonic() - began < 60


KEPT = """
import random
from dataclasses import dataclass
import numpy, torch
from torch import nn
from nndist import Data, Recipe, Resident

@dataclass(kw_only=True)
class Scaled(Recipe):
    lr: float = 0.1
    epochs: int = 2
    shift: float = 0.0
    order: str = "a b"
    in_data: bool = False
    def data(self, config):
        x = torch.from_numpy(numpy.random.randn(60, 3).astype("float32")) * 5 + random.random() + self.shift
        self.mean = x[:40].mean(0)
        x = x - self.mean if self.in_data else x
        y = (x[:, 0] > 0).long()
        parts = Resident(x[:40], y[:40]), Resident(x[40:], y[40:])
        return Data(*parts, prepare=self.prepare, classes=self.order.split())
    def prepare(self, batch):
        return (batch[0] - self.mean).mul(1), batch[1]
    def networks(self):
        self.criterion = nn.CrossEntropyLoss(reduction="none")
        return {"model": nn.Linear(3, 2)}
    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)
    def loss(self, networks, batch):
        return self.criterion(networks["model"](batch[0]), batch[1])
"""


@pytest.fixture
def scaled(tmp_path):
    """The result of a recipe whose prepare and loss use what data() and networks() set on it."""
    (tmp_path / "scaled.py").write_text(KEPT)
    return nndist.train(tmp_path / "scaled.py", run="it", runs_dir=tmp_path / "runs", **QUIET)


def test_inputs_are_prepared_with_what_the_training_found(scaled):
    run = load_run(scaled)
    data = run.data_at_hand()
    assert torch.equal(data.prepare.__self__.mean, run.recipe.mean)
    random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    again = run.data_at_hand()
    assert torch.equal(again.test.tensors[0], data.test.tensors[0]), "drawn from other generators"
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    found = run.predict([[1.0, 2.0, 3.0]])
    with torch.no_grad():
        expected = scaled.networks["model"](torch.tensor([[1.0, 2.0, 3.0]]) - run.recipe.mean)[0]
    assert [found.rows()[0][f"answer {n}"] for n in (1, 2)] == pytest.approx(expected.tolist(), rel=1e-6)
    run.recipe.shift = 100.0  # other data
    assert torch.equal(run.data_at_hand().prepare.__self__.mean, run.recipe.mean), "the mean of the other data"


def test_an_evaluation_has_what_networks_set_on_the_recipe(scaled):
    assert nndist.evaluate(scaled, threads=1).scores == pytest.approx(scaled.scores)
    assert nndist.evaluate(scaled, threads=1).notes == []


def test_other_values_of_what_data_sets_are_noted(scaled):
    [note] = nndist.evaluate(scaled, threads=1, fields={"shift": 2.0}).notes
    assert "data() sets self.mean to other values" in note and "prepare" in note


def test_classes_in_another_order_are_refused_and_other_names_noted(scaled):
    with pytest.raises(nndist.UserError, match="class 0 is 'b', in training 'a': the same classes in another order"):
        nndist.evaluate(scaled, threads=1, fields={"order": "b a"})
    with pytest.raises(nndist.UserError, match="has 3 classes"):
        nndist.evaluate(scaled, threads=1, fields={"order": "a b c"})
    [note] = nndist.evaluate(scaled, threads=1, fields={"order": "a c"}).notes
    assert "class 1 is 'c', in training 'b'" in note


@pytest.mark.parametrize("raised", ["RuntimeError('Dataset not found')", "ImportError('no pandas')", "OSError('gone')"])
def test_data_that_raise_anything_are_not_available(tmp_path, raised):
    (tmp_path / "scaled.py").write_text(
        KEPT.replace("        x = torch.from", "        self.look()\n        x = torch.from")
        + f"    def look(self):\n        if open({str(tmp_path / 'away')!r}).read(): raise {raised}\n"
    )
    (tmp_path / "away").write_text("")
    result = nndist.train(tmp_path / "scaled.py", run="it", runs_dir=tmp_path / "runs", **QUIET)
    (tmp_path / "away").write_text("yes")
    with pytest.raises(nndist.UserError, match=raised.split("'")[1]) as refused:
        load_run(result).data_at_hand()
    assert "\n" not in str(refused.value)


LABELLED = """
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn
from nndist import Data, Output, Recipe, Resident, Weighted

@dataclass(kw_only=True)
class Labelled(Recipe):
    lr: float = 0.1
    epochs: int = 2
    kind: str = "plain"
    def data(self, config):
        x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
        y = (x[:, 0] > 0).long()
        if self.kind == "ignored":
            y[::4] = -100
        parts = (x, y) if self.kind != "unrelated" else (x, F.one_hot(y, 2).float(), torch.arange(60) % 2)
        return Data(Resident(*parts), Resident(*parts), classes=("no", "yes"))
    def networks(self):
        return {"model": nn.Linear(2, 1 if self.kind == "single" else 2)}
    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)
    def loss(self, networks, batch):
        logits, y = networks["model"](batch[0]), batch[1]
        if self.kind == "single":
            return F.binary_cross_entropy_with_logits(logits.squeeze(1), y.float(), reduction="none")
        return F.cross_entropy(logits, y, reduction="none")
    def score(self, networks, batch):
        logits, y = networks["model"](batch[0]), batch[1]
        if self.kind == "single":
            return {"loss": self.loss(networks, batch), "logits": Output(logits)}
        labels = y.argmax(1) if y.dim() == 2 else y
        right = (logits.argmax(1) == labels).float()
        right = Weighted(right, (labels >= 0).float()) if self.kind == "ignored" else right
        return {"accuracy": right, "logits": Output(logits)}
"""


@pytest.mark.parametrize("kind, counted", [("plain", 60), ("ignored", 45), ("single", None), ("unrelated", None)])
def test_the_confusion_matrix_counts_labels_only(tmp_path, kind, counted):
    (tmp_path / "labelled.py").write_text(LABELLED)
    run = nndist.train(tmp_path / "labelled.py", run="it", kind=kind, runs_dir=tmp_path / "runs", **QUIET)
    found = nndist.evaluate(run, threads=1)
    matrix = found.sets["test"].confusion
    assert (matrix is None) == (counted is None) and found.sets["test"].examples == 60
    assert [note for note in found.notes if "contradict the score accuracy" in note] == (
        found.notes if kind == "unrelated" else []
    )
    if counted:
        assert int(matrix.sum()) == counted
        assert int(matrix.trace()) / counted == pytest.approx(found.scores["test/accuracy"])


def test_what_predict_needs_and_no_run_keeps_is_said_in_the_plan_and_in_one_line(tmp_path, capsys):
    text = KEPT.replace("        self.mean = x[:40]", "        self.encoder = Encoder()\n        self.mean = x[:40]")
    text = text.replace("@dataclass(", "class Encoder:\n    def __call__(self, x):\n        return x\n\n@dataclass(")
    text += "    def predict(self, networks, inputs):\n"
    text += '        return inputs.measured({"model": networks["model"](self.encoder(inputs.rows(3)))})\n'
    (tmp_path / "scaled.py").write_text(text)
    result = nndist.train(tmp_path / "scaled.py", run="it", runs_dir=tmp_path / "runs", **QUIET)
    said = " ".join(capsys.readouterr().out.split())
    assert "note data() sets self.encoder to an object of Encoder, which a run can't keep" in said
    with pytest.raises(nndist.UserError, match=r"predict\(\) needs self.encoder, which is not stored in the run"):
        load_run(result).predict([[1.0, 2.0, 3.0]])

"""What somebody relies on who writes a first recipe: right answers by default, and slips said in one line."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

import nndist
from nndist import Recipe, Scaled, Scaling, UserError, load_run
from nndist.directions import direction_of
from nndist.recipe.fields import comparable, from_json, hints_of, to_json
from nndist.recipe.kept import kept, restored
from nndist.recipe.loading import load_recipe

QUIET = {"progress": False, "figures": False, "report": False, "wandb": "off", "threads": 1}
HEAD = """
from dataclasses import dataclass
import torch
from torch import nn
from nndist import Classifier, Data, Recipe, Resident, Scaled, Scaling
"""
LINE = """
class Line(Recipe):
    lr = 0.5
    width: int = 4
    def data(self, config):
        x = torch.linspace(0, 1, 40).unsqueeze(1)
        return Data(train=Resident(x[:30], 2 * x[:30]), test=Resident(x[30:], 2 * x[30:]))
    def networks(self):
        return {"model": nn.Linear(1, 1)}
    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)
    def loss(self, networks, batch):
        x, y = batch
        return (networks["model"](x) - y).square().squeeze(1)
"""


@pytest.fixture
def train(tmp_path):
    """Writes a recipe's file and trains it."""

    def do(text=LINE, **settings):
        (tmp_path / "mine.py").write_text(HEAD + text)
        return nndist.train(tmp_path / "mine.py", **{**QUIET, "runs_dir": tmp_path / "runs", **settings})

    return do


def about(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize(
    "name, direction",
    [
        *(
            (f"test/{name}", "lowest")
            for name in ("loss", "loss/generator", "val_loss", "error_celsius/network", "RMSE")
        ),
        *((f"test/{name}", "lowest") for name in ("perplexity", "negative_log_likelihood", "cross_entropy", "myLoss")),
        *((f"test/{name}", "highest") for name in ("accuracy", "accuracy_top5", "f1_macro", "mAP50", "r2", "mean_iou")),
        *((f"test/{name}", "highest") for name in ("exact_match", "neg_mean_squared_error", "accuracy/real")),
        *((f"test/{name}", "highest") for name in ("recall_negative", "negative_recall", "f1_neg", "neg_log_loss")),
        *((f"test/{name}", "highest") for name in ("precision_negative", "accuracy/negative", "likelihood_of_neg")),
        *((f"test/{name}", "lowest") for name in ("loss_negative", "mean_negative_log_likelihood", "negLogLikelihood")),
        *((f"test/{name}", "lowest") for name in ("fpr_at_95_recall", "one_minus_accuracy", "1-ssim", "oneMinusF1")),
        *((f"test/{name}", "lowest") for name in ("time_to_accuracy", "stepsToReward", "loss_gap")),
        *((f"test/{name}", "highest") for name in ("mIoU", "IoU", "meanIoU50", "IoU/class", "recall_at_95_fpr")),
        *((f"test/{name}", "highest") for name in ("1-shot_accuracy", "precision_at_recall", "one_step_accuracy")),
        *((f"test/{name}", None) for name in ("accuracy_gap", "step_accuracy_gap")),
        ("test/neg_reward", None),
        *((f"test/{name}", None) for name in ("likeness", "accuracy_error", "false_positive_rate", "lossless")),
        *(("error_cases/accuracy", "highest"), ("loss", "lowest"), ("error_set/likeness", None)),
    ],
)
def test_the_direction_of_a_score_follows_from_its_name(name, direction):
    assert direction_of(name) == direction


def test_the_best_loss_is_the_lowest_and_the_plan_says_so(train, capsys):
    result = train(best="test/loss", epochs=4, lr=0.5, run="it")
    _, losses = result.history.series("test/loss")
    assert min(losses) < max(losses) and result.best["scores"]["test/loss"] == min(losses)
    assert "best     test/loss, lowest" in capsys.readouterr().out
    assert f"best weights, step {result.best['step']}" in load_run(result).weights().text


def test_where_the_direction_cant_be_told_it_must_be_given(train):
    text = LINE + "    def score(self, networks, batch):\n        return {'likeness': self.loss(networks, batch)}\n"
    with pytest.raises(UserError, match=r"--best test/likeness: its name does not say .* --best-is highest"):
        train(text, best="test/likeness")
    assert train(text, best="test/likeness", best_is="lowest").best


def test_a_run_of_an_earlier_version_goes_on(train):
    folder = train(run="old", max_steps=1).folder
    said = about(folder)
    said["fields"]["best_is"] = "highest"  # what such a run has where nothing was said
    (folder / "run.json").write_text(json.dumps(said))
    assert load_run(folder).recipe.best_is == "highest"
    assert train(run="old").steps == 1
    before, now = {"best": "test/loss", "best_is": "highest"}, {"best": "test/loss", "best_is": None}
    assert comparable(before) != comparable(now)  # it kept the worst: that is a change


def test_a_run_that_was_cut_says_so(train, capsys):
    folder = train(run="it", epochs=9, batch_size=10, max_steps=5, report=True).folder
    said = about(folder)
    assert (said["status"], said["ended"]) == ("cut", "stopped at --max-steps 5 of 27")
    assert said["launches"][0]["status"] == "cut" and "stopped at --max-steps 5 of 27" in capsys.readouterr().out
    nndist.report.write_index(folder.parent.parent)
    for page in (folder / "report.html", folder.parent.parent / "index.html"):
        assert "stopped at --max-steps 5 of 27" in page.read_text()
    assert "has finished training" not in (folder / "report.html").read_text()
    train(run="it", epochs=9, batch_size=10)
    assert (about(folder)["status"], about(folder)["ended"]) == ("finished", "")


def test_early_stopping_says_so(train):
    folder = train(run="it", epochs=50, lr=1e-12, best="test/loss", best_is="highest", patience=2, report=True).folder
    said = about(folder)
    assert said["status"] == "finished" and said["ended"].startswith("stopped early: test/loss has not improved in 2")
    assert "stopped early: test/loss" in (folder / "report.html").read_text()


@pytest.mark.parametrize("name", ["file", "name", "fields", "source", "found", "data", "loss", "predict"])
def test_a_field_of_a_reserved_name_is_refused(tmp_path, name):
    text = HEAD + f"@dataclass(kw_only=True)\nclass Mine(Recipe):\n    {name}: str = 'x'\n"
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=rf"mine.py: Mine.{name}: '{name}' is taken.*such as {name}_"):
        load_recipe(tmp_path / "mine.py")


def test_an_attribute_of_a_reserved_name_is_refused_in_a_notebook_too():
    with pytest.raises(UserError, match="'file' is taken"):
        type("Mine", (Recipe,), {"file": "x"})
    with pytest.raises(UserError, match="'data' is taken"):
        Recipe().data = torch.zeros(2)


def test_a_class_without_the_decorator_has_its_own_fields(train):
    result = train(width=7)
    assert about(result.folder)["fields"]["width"] == 7 and about(result.folder)["fields"]["lr"] == 0.5

    class Mine(Recipe):
        lr = 0.25
        width: int = 3

    class Child(Mine):
        epochs = 4

    assert (Mine().lr, Mine(width=5).width, Child().lr, Child().epochs) == (0.25, 5, 0.25, 4)
    assert Recipe().lr == 1e-3 and {f.name for f in dataclasses.fields(Child)} >= {"width", "epochs"}


def test_what_a_dataclass_would_ignore_or_refuse_is_one_line(tmp_path):
    for line, said in {
        "lr = 0.1": "Mine.lr = 0.1: without a type a dataclass ignores it; write lr: float = 0.1",
        "layers: list = [64, 32]": r"Mine.layers: a list can't be the default.*layers: tuple = \(64, 32\)",
    }.items():
        (tmp_path / "mine.py").write_text(HEAD + f"@dataclass(kw_only=True)\nclass Mine(Recipe):\n    {line}\n")
        with pytest.raises(UserError, match=said):
            load_recipe(tmp_path / "mine.py")
    text = "class Mine(Recipe):\n    def __init__(self, width=3):\n        self.width = width\n"
    (tmp_path / "mine.py").write_text(HEAD + text)
    with pytest.raises(UserError, match="Mine: a recipe is a dataclass, so its settings are fields"):
        load_recipe(tmp_path / "mine.py")


class Colour(Enum):
    RED = "r"
    BLUE = "b"


@dataclasses.dataclass(kw_only=True)
class Kinds(Recipe):
    colour: Colour = Colour.RED
    other: Colour | None = None
    choice: Literal["a", 3] | None = None
    path: Path = Path("x")
    no_path: Path | None = None
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, Path] = (1, Path("y"))
    colours: tuple[Colour, ...] = (Colour.RED,)
    rate: float | None = None
    text_or_path: str | Path = "z"
    names: dict[str, int] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"colour": Colour.BLUE, "other": Colour.RED, "choice": 3, "path": Path("/a/b"), "no_path": Path("c")},
        {"sizes": (), "pair": (2, Path("q")), "colours": (Colour.BLUE, Colour.RED), "rate": 1.0, "choice": "a"},
        {"rate": 0.1, "text_or_path": "a/b", "names": {"a": 1}, "lr": 0.1 + 0.2, "clip_norm": 1},
    ],
)
def test_every_kind_of_field_comes_back_as_it_was(fields):
    recipe, hints = Kinds(**fields), hints_of(Kinds)
    said = json.loads(json.dumps(recipe.fields()))
    again = Kinds(**{name: from_json(value, hints[name]) for name, value in said.items()})
    assert again == recipe and said == recipe.fields()
    assert [type(v) for v in vars(again).values()] == [type(v) for v in vars(recipe).values()]
    assert from_json("Colour.BLUE", Colour) is Colour.BLUE  # as earlier versions wrote it
    assert to_json(Colour.BLUE) == "BLUE"


ENUM = """
from enum import Enum
class Kind(Enum):
    SMALL = 1
    LARGE = 2
""" + LINE.replace("width: int = 4", "kind: Kind = Kind.SMALL").replace(
    "return {",
    "width = 9 if self.kind is Kind.LARGE else 3\n"
    "        return {'model': nn.Sequential(nn.Linear(1, width), nn.Linear(width, 1))}\n        return {",
)


def test_a_network_of_an_enum_is_the_one_that_was_trained(train, tmp_path):
    kind = load_recipe_of(tmp_path, ENUM)
    large = hints_of(kind)["kind"].LARGE
    result = nndist.train(kind(kind=large), **QUIET, runs_dir=tmp_path / "runs")
    load_recipe_of(tmp_path, ENUM)  # another reading has other members
    assert load_run(result).networks["model"][0].weight.shape == (9, 1)
    assert load_run(result).evaluate().scores == pytest.approx(result.scores)


def load_recipe_of(folder, text):
    (folder / "mine.py").write_text(HEAD + text)
    return load_recipe(folder / "mine.py")


def test_what_data_found_is_kept_as_it_was():
    values = {
        "words": ["a", "b"],
        "codes": {0: "a", 1: "b"},
        "pair": (1, (2.5, None)),
        "seen": {"x", "y"},
        "place": Path("a/b"),
        "weights": torch.rand(3, dtype=torch.float64),
        "nested": {"w": [torch.arange(3)]},
        "scaling": Scaling(torch.tensor([1.0]), torch.tensor([2.0])),
    }
    found, tensors = kept({**values, "huge": torch.zeros(1_000_001), "other": object(), "method": values.get})
    again = restored(json.loads(json.dumps(found)), tensors)
    assert again.keys() == values.keys()
    assert all(again[name] == values[name] for name in ("words", "codes", "pair", "seen", "place", "scaling"))
    assert torch.equal(again["weights"], values["weights"]) and again["weights"].dtype == torch.float64
    assert torch.equal(again["nested"]["w"][0], torch.arange(3))


CLASSES = """
from pathlib import Path
class Signs(Classifier):
    folder: str = ""
    def data(self, config):
        self.names = tuple(Path(self.folder, "classes.txt").read_text().split())
        self.shift = torch.tensor([0.5])
        x = torch.rand(40, 2)
        y = (x[:, 0] > 0.5).long()
        return Data(train=Resident(x, y), test=Resident(x, y), classes=self.names)
    def networks(self):
        WEIGHTS
        return {"model": nn.Linear(2, len(self.names))}
    def initial_weights(self, networks):
        networks["model"].weight.data.fill_(float(Path(self.folder, "weights.txt").read_text()))
    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)
"""


def test_a_run_stands_on_its_own(train, tmp_path, monkeypatch):
    files = tmp_path / "files"
    files.mkdir()
    (files / "classes.txt").write_text("low high")
    (files / "weights.txt").write_text("0.125")
    result = train(CLASSES.replace("WEIGHTS", "pass"), folder=str(files), lr=1e-9, run="it", epochs=1)
    assert torch.allclose(result.networks["model"].weight.cpu(), torch.tensor(0.125))
    (files / "weights.txt").unlink()
    assert train(CLASSES.replace("WEIGHTS", "pass"), folder=str(files), lr=1e-9, run="it").steps == result.steps
    shutil.rmtree(files)
    (tmp_path / "mine.py").unlink()
    monkeypatch.chdir("/")
    run = load_run(result.folder)
    assert run.recipe.names == ("low", "high") and torch.equal(run.recipe.shift, torch.tensor([0.5]))
    assert torch.equal(run.networks["model"].weight, result.networks["model"].weight.cpu())


def test_networks_that_read_a_file_say_which_and_what_to_do(train, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    (files / "classes.txt").write_text("low high")
    (files / "weights.txt").write_text("0.125")
    text = CLASSES.replace("WEIGHTS", "open(self.folder + '/classes.txt').close()")
    result = train(text, folder=str(files))
    (files / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"networks\(\) of its recipe reads .*classes.txt .*initial_weights\(\)"):
        _ = load_run(result).networks


HELPED = LINE.replace(
    "return {",
    "from sizes import WIDTH\n"
    "        return {'model': nn.Sequential(nn.Linear(1, WIDTH), nn.Linear(WIDTH, 1))}\n        return {",
)


def test_a_field_that_cannot_be_printed_is_refused_in_one_line(train):
    path = train(run="it").folder / "run.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "fields": {**described["fields"], "batch_size": "\ud800"}}))
    with pytest.raises(UserError, match=r"batch_size has changed from '\\ud800' to \d+ since"):
        train(run="it")


def test_a_helper_beside_the_recipe_is_kept_with_the_run(train, tmp_path):
    (tmp_path / "sizes.py").write_text("from more import WIDTH\n")
    (tmp_path / "more.py").write_text("WIDTH = 5\n")
    folder = train(HELPED, run="it").folder  # a late import, within networks()
    assert {p.name for p in (folder / "modules").iterdir()} == {"sizes.py", "more.py"}
    (tmp_path / "more.py").write_text("WIDTH = 11\n")
    run = load_run(folder)
    assert run.networks["model"][0].weight.shape == (5, 1)
    assert run.notes == ["more.py, which the recipe imports, has changed since the run: the run's own copy is used"]
    with pytest.raises(
        UserError, match=r"more\.py, which the recipe imports, has changed since .*--allow-change source"
    ):
        train(HELPED, run="it")
    other = train(HELPED, run="other").folder
    shutil.move(tmp_path / "more.py", tmp_path / "gone.py")
    first, second = load_run(folder), load_run(other)
    assert [r.networks["model"][0].weight.shape[0] for r in (second, first)] == [11, 5]  # each its own


HOUSES = """
class Houses(Recipe):
    epochs: int = 60
    lr: float = 0.05
    def data(self, config):
        x = torch.stack([torch.linspace(30, 300, 200), torch.linspace(2020, 1900, 200)[torch.randperm(200)]], 1)
        y = 100_000 + 800 * x[:, :1] + 50 * (x[:, 1:] - 1960)
        train = torch.randperm(200)[:160]
        self.x_scaling, self.y_scaling = Scaling.fit(x[train]), Scaling.fit(y[train])
        return Data(train=Resident(x[train], y[train]), test=Resident(x, y))
    def networks(self):
        return {"model": Scaled(nn.Linear(2, 1), inputs=self.x_scaling, outputs=self.y_scaling)}
    def optimizer(self, name, network):
        return torch.optim.Adam(network.parameters(), lr=self.lr)
    def loss(self, networks, batch):
        x, y = batch
        return self.y_scaling.difference(networks["model"](x), y).square().squeeze(1)
    def score(self, networks, batch):
        x, y = batch
        return {"loss": self.loss(networks, batch), "error": (networks["model"](x) - y).abs().squeeze(1)}
"""


def gone(self, config):
    raise FileNotFoundError(2, "No such file or directory", "houses.csv")


def test_a_table_is_learned_and_answered_in_its_own_units(train):
    result = train(HOUSES)
    assert result.scores["test/loss"] < 0.01 and 1 < result.scores["test/error"] < 8000
    run = load_run(result)
    answer = run.predict([100.0, 1960.0]).rows()[0]["answer"]
    assert answer == pytest.approx(180_000, rel=0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.recipe), "data", gone)
        assert run.predict([100.0, 1960.0]).rows()[0]["answer"] == answer
        assert [row["answer"] for row in run.predict("100, 1960").rows()] == [answer]
    assert run.recipe.y_scaling.std > 1000 and run.evaluate().scores == pytest.approx(result.scores)


def test_a_scaling_is_the_mean_and_deviation_of_each_column():
    values = torch.randn(1000, 3, dtype=torch.float64) * torch.tensor([1.0, 100.0, 0.0])
    values += torch.tensor([5.0, 2020.0, 7.0])
    scaling = Scaling.fit(values)
    assert torch.allclose(scaling.mean.double(), values.mean(0)) and scaling.std[2] == 1
    scaled = scaling.scale(values)
    assert torch.allclose(scaled[:, :2].std(0, correction=0), torch.ones(2), atol=1e-3)
    assert torch.allclose(scaling.unscale(scaled).double(), values, rtol=1e-5)
    assert torch.allclose(scaling.difference(values[:5], values[5:10]), scaled[:5] - scaled[5:10], atol=1e-3)
    assert Scaling.fit(torch.rand(8, 3, 4, 4), dim=(0, 2, 3)).mean.shape == (3, 1, 1)
    values[3, 1] = torch.nan
    with pytest.raises(UserError, match=r"no finite number at \[3, 1\]"):
        Scaling.fit(values)
    network = nn.Linear(3, 1)
    assert "inputs_mean" in Scaled(network, inputs=scaling).state_dict()


PHOTOS = """
class Photos(Classifier):
    def data(self, config):
        x = torch.rand(40, 3, 16, 16) * 0.2
        y = torch.arange(40) % 2
        x[y == 0, 0] += 0.8  # red
        x[y == 1, 2] += 0.8  # blue
        x[:2, :, 0, 0], x[:2, :, 0, 1] = 0, 1  # photographs have something black and something white
        x = MADE
        return Data(train=Resident(x, y), test=Resident(x, y), classes=("red", "blue"))
    def networks(self):
        return {"model": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))}
    def optimizer(self, name, network):
        return torch.optim.Adam(network.parameters(), lr=0.1)
"""


BY_COLOUR = ".view(3, 1, 1)"
IMAGENET = f"(x - torch.tensor([0.485, 0.456, 0.406]){BY_COLOUR}) / torch.tensor([0.229, 0.224, 0.225]){BY_COLOUR}"
OWN = f"((255 * x.clamp(0, 1)).round() / 255 - 0.1) / torch.tensor([0.3, 0.7, 1.1]){BY_COLOUR}"


@pytest.fixture
def photographs(tmp_path):
    """Files of one colour each, of sizes that no example has, and what they show."""
    from PIL import Image

    files = []
    for number, size in enumerate([(64, 64), (16, 16), (200, 90)]):
        for name, colour in (("red", (240, 20, 20)), ("blue", (20, 20, 240))):
            files.append(tmp_path / f"{name}{number}.png")
            Image.new("RGB", size, colour).save(files[-1])
    return files


@pytest.mark.parametrize("made", ["x", "(255 * x).to(torch.uint8)", "2 * x - 1", IMAGENET, OWN])
def test_photographs_are_given_to_the_network_as_its_examples_were(train, photographs, made):
    """Of any size, answered with the classes' names; the values are those that the training had for such colours."""
    seen = []
    prepare = "prepare=lambda b: (b[0].float() / 255 if b[0].dtype == torch.uint8 else b[0], b[1]), "
    result = train(
        PHOTOS.replace("MADE", made).replace("test=Resident(x, y), ", f"test=Resident(x, y), {prepare}"), epochs=40
    )
    run = load_run(result)
    run.weights = lambda which: loaded
    loaded = load_run(result).weights()
    loaded.networks["model"].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    rows = run.predict(*photographs).rows()
    assert [row["answer"] for row in rows] == [path.stem[:-1] for path in photographs]
    x = torch.tensor([[240, 20, 20], [20, 20, 240]]).view(2, 3, 1, 1) / 255
    expected = eval(made, {"x": x, "torch": torch})
    expected = expected.float() / 255 if expected.dtype == torch.uint8 else expected
    torch.testing.assert_close(seen[0][:2], expected.expand(2, 3, 16, 16), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "made", ["x * 0.4", "x.sqrt() * 3 - 0.7", "((255 * x).round() / 255 - 0.1).clamp(max=0.5) / 0.3"]
)
def test_photographs_normalised_who_knows_how_are_one_line(train, photographs, made):
    result = train(PHOTOS.replace("MADE", made), epochs=1)
    with pytest.raises(UserError, match=r"normalised before they became examples.*Data\(prepare=...\).*define predict"):
        load_run(result).predict(*photographs)


def test_the_report_leads_with_what_the_recipe_says(train):
    said = LINE.replace("lr = 0.5", "lr = 0.5\n    headline = ('verdict',)") + (
        "    def figures(self, networks, data, history):\n        return {'verdict': 'all ten digits appear'}\n"
    )
    folder = train(said, figures=True, report=True, epochs=3).folder
    page = (folder / "report.html").read_text()
    cards = page.partition('<dl class="cards">')[2].partition("</dl>")[0]
    assert cards.index("all ten digits appear") < cards.index("Data") and "of all evaluations" not in cards
    folder = train(report=True, epochs=1).folder
    assert "of all evaluations" not in (folder / "report.html").read_text()  # there was one


def test_a_batch_larger_than_the_data_is_noted(train, capsys):
    train(batch_size=10_000)
    assert "note     --batch-size 10,000: there are 30 examples" in capsys.readouterr().out


def test_what_was_perhaps_meant(train):
    with pytest.raises(UserError, match=r"recipe mnist_cn: no such file; did you mean mnist_cnn\?"):
        load_recipe("mnist_cn")
    with pytest.raises(UserError, match=r"learning_rate=0.1: no such setting; lr\?"):
        train(learning_rate=0.1)


def test_ctrl_c_says_how_to_resume(tmp_path):
    (tmp_path / "mine.py").write_text(HEAD + LINE)
    flags = ["--epochs", "9000000", "--batch-size", "3", "--evaluate-every", "900000 epochs", "--no-progress"]
    command = [sys.executable, "-m", "nndist", "mine.py", *flags, "--no-figures", "--wandb", "off"]
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("runs/mine/*/metrics.jsonl")) and running.poll() is None:
        time.sleep(0.05)
    time.sleep(1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    (folder,) = tmp_path.glob("runs/mine/*-*")
    assert running.returncode == 130 and "error" not in said
    assert said.startswith("stopped  by Ctrl-C after step ") and f"--run {folder.name}" in said
    assert "; resume with: python -m nndist mine.py --epochs 9000000" in said and said.count("\n") == 1


def test_a_flags_usual_name_is_understood(tmp_path):
    from nndist.flags.parse import parse

    (tmp_path / "mine.py").write_text(HEAD + LINE)
    with pytest.raises(UserError, match=r"did you mean --lr\?"):
        parse([str(tmp_path / "mine.py"), "--learning-rate", "0.1"])


UNKNOWN = LINE + "    def score(self, networks, batch):\n        return {'likeness': self.loss(networks, batch)}\n"


def test_a_score_of_unknown_direction_is_not_called_best(train, tmp_path):
    from nndist.experiments.comparison import Comparison, choose_score, grouped
    from nndist.runs.reading import read_run

    folders = [train(UNKNOWN, run=f"lr{lr}", lr=lr, epochs=3, report=True).folder for lr in (0.1, 0.2)]
    page = (folders[0] / "report.html").read_text()
    assert "of all evaluations" not in page and ", the highest" not in page
    runs = [read_run(folder) for folder in folders]
    comparison = Comparison(grouped(runs), *choose_score(runs, "test/likeness"), "two")
    table = comparison.table()
    assert "not known which is better" in table and "\n* lr" not in table and "--best-is highest" in table
    assert comparison.record()["best"] is None and comparison.record()["lowest_is_best"] is None
    two = UNKNOWN.replace("'likeness': ", "'other': self.loss(networks, batch), 'likeness': ")
    page = (train(two, run="two", epochs=3, report=True).folder / "report.html").read_text()
    assert page.count("<td>not known</td>") == 2 and "<td>highest</td>" not in page
    known = train(two, run="known", epochs=3, best="test/other", best_is="highest", report=True).folder
    assert "<td>highest</td>" in (known / "report.html").read_text()


def test_frozen_parameters_are_counted_apart(train):
    frozen = LINE.replace(
        'return {"model": nn.Linear(1, 1)}',
        'network = nn.Linear(1, 1)\n        network.bias.requires_grad_(False)\n        return {"model": network}',
    )
    assert about(train(frozen, run="frozen").folder)["plan"]["network"] == "model 2 parameters (1 trained)"
    assert about(train(run="whole").folder)["plan"]["network"] == "model 2 parameters"


def test_the_report_leads_with_the_test_that_was_looked_at_once(train):
    folder = train(hold_out=0.2, best="val/loss", best_is="highest", epochs=3, report=True).folder
    cards = (folder / "report.html").read_text().partition('<dl class="cards">')[2].partition("</dl>")[0]
    step = about(folder)["best"]["step"]
    assert "Final val loss" in cards and "Test loss" in cards
    assert f"evaluated once, with the best weights, of step {step}" in cards and step < about(folder)["step"]
    assert "24 examples to train on, 6 to validate, 10 to test" in cards


def test_a_note_of_the_data_and_its_remedy_are_two_lines(train, capsys):
    train(LINE.replace("return Data(", "return Data(note='not the whole set; for all of it, fetch it', "), epochs=1)
    assert "note     not the whole set\n         for all of it, fetch it\n" in capsys.readouterr().out


def test_a_method_with_other_parameters_is_refused_before_anything_runs(train):
    wrong = "    def scheduler(self, name, optimizer):\n        return None\n"
    line = (
        r"mine.py: Line.scheduler: takes other parameters .* write def scheduler\(self, name, optimizer, total_steps\)"
    )
    with pytest.raises(UserError, match=line):
        train(LINE + wrong)
    for right in ("self, *given", "self, name, opt, steps, more=1"):
        train(LINE + f"    def scheduler({right}):\n        return None\n", max_steps=1)


def test_all_that_a_recipe_lacks_is_said_at_once(train):
    text = "\nclass Mine(Recipe):\n    def networks(self):\n        return {'model': nn.Linear(1, 1)}\n"
    with pytest.raises(UserError, match=r"Mine does not define data\(\), optimizer\(\), loss\(\), as every"):
        train(text)
    with pytest.raises(UserError, match=r"Mine does not define data\(\), optimizer\(\), as every recipe does"):
        train(text + "    def objectives(self):\n        return {'model': lambda networks, batch: batch}\n")


WORDS = """
def padded(examples):
    tokens, lengths, labels = zip(*examples)
    return nn.utils.rnn.pad_sequence(tokens, batch_first=True), torch.tensor(lengths), torch.tensor(labels)


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, tokens, lengths):
        inside = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
        return self.head((self.embedding(tokens) * inside.unsqueeze(2)).sum(1) / lengths.unsqueeze(1))


class Words(Classifier):
    class_scores = True
    def data(self, config):
        random = torch.Generator().manual_seed(0)
        lengths = torch.randint(2, 7, (60,), generator=random).tolist()
        tokens = [torch.randint(1, 9, (length,), generator=random) for length in lengths]
        labels = [int(t[0] > 3) + int(t[0] > 7) for t in tokens]
        self.loss_weights = balanced_weights(torch.tensor(labels[:40]), 3)
        examples = list(zip(tokens, lengths, labels))
        sets = [Streamed(part, 0, collate=padded) for part in (examples[:40], examples[40:])]
        return Data(train=sets[0], test=sets[1], classes=("low", "middle", "high"))
    def networks(self):
        return {"model": Mean()}
    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=0.1)
"""


def test_a_classifier_of_padded_sequences_weighs_its_classes_and_has_f1(train, capsys):
    words = "from nndist import Streamed, balanced_weights\n" + WORDS
    result = train(words, best="test/macro_f1", run="it", figures=True)
    assert "figures of the recipe failed" not in capsys.readouterr().out
    run = load_run(result.folder)
    data = run.data_at_hand()
    tokens, lengths, labels = data.inputs(data.test)
    network = result.networks["model"].eval()
    logits = network(tokens, lengths)
    guesses, f1 = logits.argmax(1), []
    for number in range(3):
        both = ((guesses == number) & (labels == number)).sum().item()
        f1.append(2 * both / max(1, (guesses == number).sum().item() + (labels == number).sum().item()))
    assert result.scores["test/macro_f1"] == pytest.approx(sum(f1) / 3, rel=1e-12)
    assert result.best["scores"].keys() == {
        f"test/{name}" for name in ("loss", "accuracy", "macro_precision", "macro_recall", "macro_f1")
    }
    batch = data.inputs(data.train)
    weighted = run.recipe.loss({"model": network}, batch)
    weights = torch.tensor(run.recipe.loss_weights)
    counts = torch.bincount(batch[2], minlength=3)
    assert weights * counts == pytest.approx(torch.full((3,), 40 / 3))
    wanted = nn.functional.cross_entropy(network(*batch[:2]), batch[2], weight=weights)
    mean = (weighted.values * weighted.weights).sum() / weighted.weights.sum()
    assert mean.item() == pytest.approx(wanted.item(), rel=1e-6)
    (counted,) = (one.confusion for one in run.evaluate(cpu=True, threads=1).sets.values())
    assert counted.tolist() == [[((labels == a) & (guesses == b)).sum().item() for b in range(3)] for a in range(3)]
    with pytest.raises(UserError, match=r"the network takes 2 inputs \(tokens, lengths\): define predict"):
        run.predict("1, 2, 3")
    with pytest.raises(UserError, match=r"no such score.*class_scores = True in the recipe adds .*macro_f1"):
        train(words.replace("class_scores = True", "class_scores = False"), best="test/macro_f1")


def test_the_means_over_classes_are_those_of_scikit_learn():
    from nndist.metrics import class_means

    # by hand: class 1 is never the answer, class 3 never occurs
    counts = torch.tensor([[3, 0, 1, 0], [2, 0, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0]])
    found = class_means(counts)
    assert found["macro_precision"] == pytest.approx((3 / 5 + 0 + 4 / 5) / 3)
    assert found["macro_recall"] == pytest.approx((3 / 4 + 0 + 1) / 3)
    assert found["macro_f1"] == pytest.approx((6 / 9 + 0 + 8 / 9) / 3)


ROOT_OF_MEAN = """
    def score(self, networks, batch):
        return {"squared_error": self.loss(networks, batch)}
    def set_scores(self, means, totals):
        return {"rmse": means["squared_error"] ** 0.5}
"""


def test_a_score_of_the_whole_set_is_one_like_any_other(train):
    result = train(LINE + ROOT_OF_MEAN, best="test/rmse", epochs=3, run="it")
    assert result.scores["test/rmse"] == result.scores["test/squared_error"] ** 0.5
    assert result.history.series("test/rmse")[1] and result.best["scores"]["test/rmse"] < 1
    evaluated = nndist.evaluate(result.folder, weights="last", cpu=True).scores
    assert evaluated == pytest.approx(result.scores)
    with pytest.raises(UserError, match="set_scores: 'rmse' is a str, it must be a number"):
        train(LINE + ROOT_OF_MEAN.replace('means["squared_error"] ** 0.5', '"low"'))


@pytest.mark.parametrize(
    "method, said",
    [
        (
            "score(self, networks, batch): return batch[0][:, 0]",
            "score: returns a Tensor; return a dict of names and va",
        ),
        ("score(self, networks, batch): pass", "score: returns None; return a dict of names and values, one per"),
        ("set_scores(self, means, totals): pass", "set_scores: returns None; return a dict of names and numbers"),
        ("set_scores(self, means, totals): return 0.5", "set_scores: returns a float; return a dict of names and num"),
    ],
)
def test_scores_without_names_are_refused(train, method, said):
    with pytest.raises(UserError, match=said):
        train(f"{LINE}    def {method}\n", epochs=1)


def test_a_run_is_shown_beside_the_one_it_is_compared_with(train, capsys, tmp_path):
    before = train(run="before", epochs=1).folder
    result = train(run="after", epochs=4, compare_with=before, report=True)
    gap = result.scores["test/loss"] - load_run(before).scores["test/loss"]
    said = capsys.readouterr().out
    assert "baseline mine/before: test/loss" in said and f"({gap:+.3g})  (mine/before, " in said
    page = (result.folder / "report.html").read_text()
    assert "Baseline: mine/before" in page and f"this run: {gap:+.3g}" in page
    head = page.partition("<header>")[2].partition("</header>")[0]
    assert "document" not in said.lower() and head and "document" not in head.lower()
    with pytest.raises(UserError, match=r"--compare-with .*nothing/run.json: No such file"):
        train(run="again", compare_with=tmp_path / "nothing")
    assert not (tmp_path / "runs/mine/again").exists()


def test_a_baseline_in_words_is_no_documents_figure(train):
    text = LINE.replace("    lr = 0.5\n", "    lr = 0.5\n    documented = 'the mean: 0.9'\n")
    page = (train(text, report=True, run="it").folder / "report.html").read_text()
    assert "Baseline" in page and "the mean: 0.9" in page and "document's figure" not in page


def test_the_result_of_a_held_out_test_is_that_of_the_chosen_weights(train, capsys):
    held = LINE.replace("test=Resident", "val=Resident(x[20:30], 2 * x[20:30]), test=Resident")
    result = train(held, epochs=9, best="val/loss", best_is="highest", run="it")
    lines = {line[:8].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "test/loss" in lines["result"] and "val/loss" not in lines["result"]
    assert f"best weights, of step {result.best['step']}" in lines["result"]
    assert "test/loss" not in lines["last"] + lines["best"].removeprefix("best     val/loss, highest")


def test_metrics_become_csv_with_all_their_digits(train, tmp_path):
    import csv

    from nndist.report import write_csv

    folder = train(run="it", epochs=3).folder
    train(run="other", epochs=1)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader(write_csv(folder, tmp_path / "one.csv").read_text().splitlines()))
    assert len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        del record["chain"]
        assert {name: value for name, value in row.items() if value} == {n: str(v) for n, v in record.items()}
    both = list(csv.DictReader(write_csv(folder.parent.parent, tmp_path / "all.csv").read_text().splitlines()))
    assert {(row["recipe"], row["run"]) for row in both} == {("mine", "it"), ("mine", "other")}
    with pytest.raises(UserError, match=r"--csv .*there is no folder"):
        write_csv(folder, tmp_path / "no" / "one.csv")
    lines = (folder / "metrics.jsonl").read_text().replace('"step": ', '"step": 1', 1)
    (folder / "metrics.jsonl").write_text(lines)
    with pytest.raises(UserError, match=r"metrics.jsonl: line 1 is not as written"):
        write_csv(folder, tmp_path / "one.csv")


SCALED_BY_HAND = """
class Scaled_(Recipe):
    def data(self, config):
        x = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)) * 200 + torch.tensor([30.0, 1900.0])
        y = x[:, :1] * 1000
        x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
        return Data(train=Resident(x[:40], y[:40]), test=Resident(x[40:], y[40:]))
    def networks(self):
        return {"model": nn.Linear(2, 1)}
    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=0.1)
    def loss(self, networks, batch):
        return (networks["model"](batch[0]) - batch[1]).square().squeeze(1)
"""


def test_raw_numbers_for_a_table_that_was_scaled_by_hand_are_noted(train):
    run = load_run(train(SCALED_BY_HAND, run="it").folder)
    (note,) = run.predict("150, 1990", "0.5, 0.1").notes
    assert note.startswith("150, 1990: 150 in column 1, where the networks were evaluated on -") and "Scaled" in note
    assert not run.predict("0.5, 0.1", "-2.5, 3").notes


def test_a_report_and_the_index_say_why_a_run_failed(train, tmp_path):
    broken = LINE.replace(
        "return (networks", "return float(self.lr != 0.25) / (networks[" + '"model"](x).sum() * 0) * (networks'
    )
    with pytest.raises(nndist.TrainingError, match="not finite"):
        train(broken, run="it", report=True)
    why = about(tmp_path / "runs/mine/it")["problem"]
    assert about(tmp_path / "runs/mine/it")["status"] == "failed" and "not finite" in why
    from nndist.report.markup import text

    index = nndist.report.write_index(tmp_path / "runs").read_text()
    page = nndist.report.write_run(tmp_path / "runs/mine/it").read_text()
    assert text(why.rstrip(".")) in page and f">{text(why[:40])}" in index


def test_figures_show_the_weights_that_were_tested(train):
    text = LINE.replace("test=Resident", "val=Resident(x[20:30], 2 * x[20:30]), test=Resident") + (
        "    def figures(self, networks, data, history):\n"
        "        return {'weight': repr(networks['model'].weight.item())}\n"
    )
    result = train(text, epochs=9, best="val/loss", best_is="highest", figures=True, run="it")
    run = load_run(result.folder)
    best, last = (run.weights(which).networks["model"].weight.item() for which in ("best", "last"))
    assert best != last and (result.folder / "figures/weight.txt").read_text().strip() == repr(best)
    assert result.networks["model"].weight.item() == last  # a training gives its last weights back


def test_a_total_counts_no_example_twice():
    from nndist import Total
    from nndist.training.score_sums import ScoreSums

    sums, index = ScoreSums(), torch.arange(3)
    sums.add("pairs", Total(torch.tensor([1, 2])), index, list, True)
    sums.add("pairs", Total(torch.tensor([5, 5])), index, list, False)  # of a process without examples
    assert sums.totals["pairs"].tolist() == [1, 2]
    with pytest.raises(UserError, match=r"a Total of shape \(3,\) after one of \(2,\)"):
        sums.add("pairs", Total(torch.tensor([1, 2, 3])), index, list, True)

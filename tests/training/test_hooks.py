"""What a recipe's own methods change: it holds in training, comes back when the run is resumed, and is what is used."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toys import Line

import nndist
from nndist.errors import UserError
from nndist.trained.loaded_run import load_run


@pytest.fixture
def train(tmp_path):
    """nndist.train into a folder of the test, quietly."""

    def call(recipe, **settings):
        options = {"runs_dir": tmp_path, "progress": False, "figures": False, "report": False, "threads": 1}
        return nndist.train(recipe, **{**options, "wandb": "off", **settings})

    return call


def weights(result):
    (file,) = result.folder.glob(f"checkpoints/step-{result.steps:08d}/model.safetensors")
    return load_file(file)


def assert_resumed_as_whole(train, make, **settings):
    """A run that was cut in an epoch and resumed by a new recipe has the bits of one that was not."""
    whole = train(make(), run="whole", **settings)
    train(make(), run="halves", max_steps=10, **settings)
    resumed = train(make(), run="halves", **settings)
    theirs, ours = weights(whole), weights(resumed)
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []
    assert resumed.scores == whole.scores
    return whole, resumed


def test_a_layer_that_initial_weights_freezes_stays_frozen(train):
    """A resumed run does not read the initial weights again."""

    @dataclass(kw_only=True)
    class Frozen(Line):
        def initial_weights(self, networks):
            networks["model"][0].requires_grad_(False)

    _, resumed = assert_resumed_as_whole(train, lambda: Frozen(epochs=3))
    assert not resumed.networks["model"][0].weight.requires_grad


def test_a_field_that_a_hook_changes_is_no_changed_setting(train):
    @dataclass(kw_only=True)
    class Annealed(Line):
        beta: float = 0.0

        def loss(self, networks, batch):
            return super().loss(networks, batch) * (1 + self.beta)

        def after_step(self, networks, step):
            self.beta = step / 100

    whole, _ = assert_resumed_as_whole(train, lambda: Annealed(epochs=3))
    assert json.loads((whole.folder / "run.json").read_text())["fields"]["beta"] == 0.0


def test_an_evaluation_scores_by_what_training_has_made_of_the_recipe(train):
    @dataclass(kw_only=True)
    class Weighs(Line):
        def data(self, config):
            self.factor = 1.0
            return super().data(config)

        def after_epoch(self, networks, epoch):
            self.factor = 10.0 * epoch

        def score(self, networks, batch):
            return {"loss": self.factor * super().loss(networks, batch)}

    result = train(Weighs(epochs=2), run="it")
    evaluated = load_run(result.folder, recipe=Weighs).evaluate()
    assert evaluated.sets["test"].scores["loss"] == pytest.approx(result.scores["test/loss"], rel=1e-6)


def test_nothing_follows_from_the_evaluation_of_a_run_that_is_cut(train):
    """Between two evaluations: a scheduler that listens would hear a score that a longer run has not."""

    @dataclass(kw_only=True)
    class Listening(Line):
        lr: float = 0.5

        def optimizer(self, name, network):
            return torch.optim.SGD(network.parameters(), lr=self.lr)

        def scheduler(self, name, optimizer, total_steps):
            return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=100.0)

        def after_evaluation(self, networks, scores):
            self.heard = [*getattr(self, "heard", []), scores["test/loss"]]

    made = []
    assert_resumed_as_whole(train, lambda: made.append(Listening(epochs=3)) or made[-1])
    assert len(made[0].heard) == len(made[2].heard) == 3


@dataclass(kw_only=True)
class OnPlateau(Line):
    """A scheduler that lowers the rate where its score gets no better."""

    best: str | None = "test/accuracy"
    mode: str = "min"
    monitors: str | None = None

    def __post_init__(self):
        self.scheduler_monitors = self.monitors

    def scheduler(self, name, optimizer, total_steps):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode=self.mode, patience=0)

    def score(self, networks, batch):
        loss = self.loss(networks, batch)
        return {"loss": loss, "accuracy": -loss, "likeness": -loss}


@pytest.mark.parametrize(
    "settings, line",
    [
        ({}, "mode 'min' and monitors test/accuracy, which is best where it is highest; give it mode='max', or .* as "),
        ({}, "scheduler_monitors = 'test/loss' in the recipe's class"),
        ({"mode": "max", "best": None}, "mode 'max' and monitors test/loss, which is best where it is lowest"),
        ({"mode": "max", "monitors": "test/loss"}, "mode 'max' and monitors test/loss"),
        ({"best": "test/likeness", "best_is": "highest"}, "monitors test/likeness, which is best where it is highest"),
    ],
)
def test_a_scheduler_that_waits_for_its_score_to_get_worse_is_refused(train, settings, line):
    with pytest.raises(UserError, match=line):
        train(OnPlateau(**settings), run="it")


@pytest.mark.parametrize(
    "settings, score",
    [
        ({"mode": "max"}, "test/accuracy"),
        ({"monitors": "test/loss"}, "test/loss"),
        ({"monitors": "test/likeness", "mode": "max"}, "test/likeness"),  # its name does not tell
        ({"best": None}, "test/loss"),
    ],
)
def test_a_scheduler_hears_the_score_that_it_is_to_monitor(train, monkeypatch, settings, score):
    heard = []
    monkeypatch.setattr(torch.optim.lr_scheduler.ReduceLROnPlateau, "step", lambda self, value: heard.append(value))
    result = train(OnPlateau(epochs=2, **settings), run="it")
    assert heard == result.history.series(score)[1]


def test_a_score_that_a_scheduler_cant_hear_is_named(train):
    with pytest.raises(UserError, match="monitors val/loss, which is not a score; name one with scheduler_monitors"):
        train(OnPlateau(monitors="val/loss"), run="it")


def test_a_scheduler_goes_on_where_more_epochs_are_asked_for(train):
    @dataclass(kw_only=True)
    class Falling(Line):
        def scheduler(self, name, optimizer, total_steps):
            return torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)

    train(Falling(epochs=2), run="it", log_every=1)
    result = train(Falling(epochs=3), run="it", log_every=1, allow_change=("epochs",))
    rates = [record["lr"] for record in result.history.records if "lr" in record]
    assert rates == pytest.approx([Falling.lr * 0.5 ** (step // 4) for step in range(21)])


def test_a_frozen_network_gives_no_gradient_to_another(train):
    """The discriminator rests, and its loss does not detach what the generator made."""

    @dataclass(kw_only=True)
    class Resting(Line):
        def networks(self):
            return {"judge": nn.Linear(4, 1), "maker": nn.Linear(4, 4)}

        def objectives(self):
            return {"judge": self.judged, "maker": self.made}

        def judged(self, networks, batch):
            return networks["judge"](networks["maker"](batch[0])).squeeze(1)

        def made(self, networks, batch):
            return 0.0 * networks["maker"](batch[0]).sum(1)

        def score(self, networks, batch):
            return {"loss": self.made(networks, batch)}

        def after_step(self, networks, step):
            networks["judge"].requires_grad_(False)

    first = Resting()
    result = train(first, run="it", max_steps=5)
    torch.manual_seed(0)
    start = train(Resting(), run="start", max_steps=1)
    assert torch.equal(weights(result)["maker.weight"], weights(start)["maker.weight"])

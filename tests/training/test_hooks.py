"""What a recipe's own methods change: it holds in training, comes back when the run is resumed, and is what is used."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toys import Line

import nndist
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

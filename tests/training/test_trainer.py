"""What a training does, against loops written by hand."""

import json
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from launching import Processes
from safetensors.torch import load_file
from torch import nn
from toys import Line

import nndist
from nndist.data.feed import Feed
from nndist.data.sets import Data, Resident, Streamed, permutation
from nndist.distributed.runtime import Runtime
from nndist.errors import TrainingError, UserError
from nndist.metrics import Output, Weighted
from nndist.recipe import Classifier
from nndist.runs import checkpoint
from nndist.training.losses import LossWindow


@pytest.fixture
def train(tmp_path):
    """nndist.train into a folder of the test, quietly."""

    def call(recipe, **settings):
        return nndist.train(
            recipe, **{"runs_dir": tmp_path, "progress": False, "figures": False, "threads": 1, **settings}
        )

    return call


def raw_loop(recipe, seed=0, epochs=None, clip_norm=None, norms=None):
    """The same training in plain PyTorch: mean loss, backward, step; gives the trained network and the losses.

    The gradients' norms before clipping are appended to `norms`.
    """
    runtime = Runtime(threads=1)
    x, y = recipe.data(None).train.tensors
    runtime.seed(seed)
    network = recipe.networks()["model"]
    optimizer = recipe.optimizer("model", network)
    runtime.seed(seed, rank=0)
    losses = []
    for epoch in range(epochs or recipe.epochs):
        for batch in permutation(len(x), seed, epoch, recipe.shuffle).split(recipe.batch_size):
            optimizer.zero_grad()
            loss = F.mse_loss(network(x[batch]), y[batch])
            loss.backward()
            if norms is not None:
                norms.append(torch.cat([p.grad.flatten() for p in network.parameters()]).norm().item())
            if clip_norm:
                nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
            optimizer.step()
            losses.append(loss.item())
    return network, losses


def assert_same_weights(ours, theirs, rel=1e-5):
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=rel, atol=1e-6, msg=name)


@pytest.mark.parametrize("fields", [{}, {"shuffle": False}, {"batch_size": 100}, {"batch_size": 7}, {"dropout": 0.5}])
def test_it_is_the_loop_that_one_would_write(train, fields):
    recipe = Line(**fields)
    network, losses = raw_loop(recipe)
    result = train(recipe, log_every=1)
    assert_same_weights(result.networks["model"], network)
    assert result.history.series("train/loss")[1] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("accumulate", [2, 3, 16])
@pytest.mark.parametrize("batch_size", [16, 7])
def test_accumulation_gives_the_same_result(train, accumulate, batch_size):
    network, _ = raw_loop(Line(batch_size=batch_size))
    result = train(Line(batch_size=batch_size), accumulate=accumulate)
    assert_same_weights(result.networks["model"], network)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradient_clipping(train, accumulate):
    network, _ = raw_loop(Line(), clip_norm=0.05)
    unclipped, _ = raw_loop(Line())
    result = train(Line(clip_norm=0.05), accumulate=accumulate)
    assert_same_weights(result.networks["model"], network)
    with pytest.raises(AssertionError):
        assert_same_weights(result.networks["model"], unclipped)


@dataclass(kw_only=True)
class Exact(Line):
    """In float64, so that rounding can't hide a difference."""

    def data(self, config):
        data = super().data(config)
        train, test = ((tensor.double() for tensor in examples.tensors) for examples in (data.train, data.test))
        return Data(train=Resident(*train), test=Resident(*test))

    def networks(self):
        return {name: network.double() for name, network in super().networks().items()}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_recorded_gradient_norms_are_those_before_clipping(train, accumulate):
    norms = []
    raw_loop(Exact(), clip_norm=2.0, norms=norms)
    assert min(norms) < 2.0 < max(norms), "some steps are clipped, some are not"
    each = train(Exact(clip_norm=2.0), accumulate=accumulate, log_every=1)
    assert each.history.series("gradient_norm")[1] == pytest.approx(norms, rel=1e-9)
    steps, means = train(Exact(clip_norm=2.0), accumulate=accumulate, log_every=4).history.series("gradient_norm")
    assert steps == [4, 7, 8, 12, 14, 16, 20, 21]
    since = [sum(norms[start:stop]) / (stop - start) for start, stop in pairwise([0, *steps])]
    assert means == pytest.approx(since, rel=1e-9)


def test_without_clipping_no_gradient_norm_is_recorded(train):
    assert "gradient_norm" not in train(Line(), max_steps=1).history.names()


def test_the_schedule_sets_the_learning_rate_of_every_step(train):
    recipe = Line(schedule="cosine", warmup_steps=3)
    result = train(recipe, log_every=1)
    steps, lrs = result.history.series("lr")
    assert lrs == pytest.approx([recipe.lr * recipe.lr_factor(step - 1, 21) for step in steps])


def test_bf16_trains_and_keeps_weights_in_fp32(train):
    exact = train(Line(epochs=20))
    rounded = train(Line(epochs=20), precision="bf16")
    weight = rounded.networks["model"][0].weight
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, exact.networks["model"][0].weight)
    assert rounded.scores["test/loss"] == pytest.approx(exact.scores["test/loss"], abs=0.02)


def test_the_moving_average_is_evaluated_and_saved(train):
    recipe = Line(ema_decay=0.9, epochs=4)
    averages = None
    x, y = recipe.data(None).train.tensors
    network, _ = raw_loop(recipe, epochs=1)  # the trajectory of the weights does not depend on the average
    result = train(recipe, max_steps=7)
    assert_same_weights(result.networks["model"], network)
    # the definition, step by step
    from nndist.distributed.runtime import Runtime

    Runtime(threads=1).seed(0)
    network = recipe.networks()["model"]
    optimizer = recipe.optimizer("model", network)
    averages = {name: p.detach().clone() for name, p in network.named_parameters()}
    for step, batch in enumerate(permutation(100, 0, 0).split(16), 1):
        optimizer.zero_grad()
        F.mse_loss(network(x[batch]), y[batch]).backward()
        optimizer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, parameter in network.named_parameters():
            averages[name] = decay * averages[name] + (1 - decay) * parameter.detach()
    saved = load_file(result.folder / "checkpoints/step-00000007/ema.safetensors")
    for name, tensor in averages.items():
        torch.testing.assert_close(saved[name], tensor)
    averaged = recipe.networks()["model"]
    averaged.load_state_dict(saved)
    tested = recipe.data(None).test.tensors
    assert result.scores["test/loss"] == pytest.approx(F.mse_loss(averaged(tested[0]), tested[1]).item(), rel=1e-5)


def test_scores_are_means_over_every_example(train):
    result = train(Line(), eval_batch_size=7)  # 30 test examples: the last batch has 2
    x, y = Line().data(None).test.tensors
    expected = F.mse_loss(result.networks["model"](x), y).item()
    assert result.scores == {"test/loss": pytest.approx(expected, rel=1e-6)}


def test_records_hold_the_exact_mean_loss_of_their_steps(train):
    _, losses = raw_loop(Line())  # 7 steps an epoch, the last of 4 examples
    result = train(Line(), log_every=4)
    steps, means = result.history.series("train/loss")
    assert steps == [4, 7, 8, 12, 14, 16, 20, 21]
    sizes = [16] * 6 + [4]
    expected = (sum(loss * n for loss, n in zip(losses[4:7], sizes[4:7], strict=True))) / (16 + 16 + 4)
    assert means[1] == pytest.approx(expected, rel=1e-5)


def test_the_run_is_written_down(train, tmp_path):
    result = train(Line(), run="first")
    assert result.folder == tmp_path / "toys/first"
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(len(line.pop("chain")) == 12 for line in lines), "each line is sealed"
    assert lines == result.history.records
    said = json.loads((result.folder / "run.json").read_text())
    assert said["status"] == "finished" and said["step"] == 21 and said["world_size"] == 1
    assert said["fields"]["lr"] == 0.05 and said["settings"]["seed"] == 0 and said["data"]["source"] == "generated"
    assert said["scores"] == result.scores
    saved = load_file(result.folder / "checkpoints/step-00000021/model.safetensors")
    state = result.networks["model"].state_dict()
    assert saved.keys() == state.keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    checkpoint.read(result.folder / "checkpoints/step-00000021")


def test_the_description_says_what_the_run_is_and_how_long_each_launch_took(train):
    @dataclass(kw_only=True)
    class Slow(Line):
        """A network that takes its time.

        What follows is not its title.
        """

        documented: ClassVar[str] = "0.02 on the test set"

        def score(self, networks, batch):
            time.sleep(0.15)
            return super().score(networks, batch)

    began = time.perf_counter()
    train(Slow(), run="it", max_steps=9)
    folder = train(Slow(), run="it").folder
    elapsed = time.perf_counter() - began
    said = json.loads((folder / "run.json").read_text())
    assert said["title"] == "A network that takes its time"
    assert said["documented"] == "0.02 on the test set"
    assert set(said["plan"]) == {"recipe", "data", "network", "device", "batch", "steps", "run"}
    assert said["plan"]["data"] == "generated: 100 to train on, 30 test"
    assert said["plan"]["network"] == "model 49 parameters"  # 4 * 8 + 8 + 8 + 1
    assert said["plan"]["steps"] == "21 = 7 x 3 epochs" and said["plan"]["run"] == str(folder)
    first, second = said["launches"]
    assert (first["from_step"], first["to_step"], first["status"]) == (0, 9, "cut")
    assert (second["from_step"], second["to_step"], second["status"]) == (9, 21, "finished")
    for launch in (first, second):
        assert launch["world_size"] == 1 and launch["host"] and launch["seconds"] >= 0.3  # two evaluations each
        assert datetime.fromisoformat(launch["began"]) <= datetime.fromisoformat(said["updated"]) <= datetime.now()
    assert said["seconds"] == pytest.approx(first["seconds"] + second["seconds"]) and said["seconds"] < elapsed + 0.1


def test_the_best_model_is_kept(train):
    # so large a learning rate that the loss rises after the first evaluations
    result = train(Line(epochs=8, lr=0.4, best="test/loss", best_is="lowest"), log_every=100)
    steps, losses = result.history.series("test/loss")
    best = min(zip(losses, steps, strict=True))
    assert result.best["step"] == best[1] < result.steps
    assert result.best["scores"]["test/loss"] == best[0]
    kept = sorted(path.name for path in (result.folder / "checkpoints").iterdir())
    assert kept == [checkpoint.folder_name(best[1]), checkpoint.folder_name(result.steps)]


def test_early_stopping(train, capsys):
    result = train(Line(epochs=50, lr=0.4, best="test/loss", best_is="lowest", patience=2))
    evaluations = [record["step"] for record in result.history.records if "test/loss" in record]
    assert result.steps == evaluations[-1] < 50 * 7
    assert evaluations.index(result.best["step"]) == len(evaluations) - 3
    assert "stopped early: test/loss has not improved in 2 evaluations" in capsys.readouterr().out


def test_a_best_that_is_no_score_is_refused_before_training(train):
    with pytest.raises(UserError, match="--best test/acuracy: no such score; choose from test/loss"):
        train(Line(best="test/acuracy"))


def test_evaluation_leaves_the_training_as_it_was(train):
    @dataclass(kw_only=True)
    class Noisy(Line):
        def score(self, networks, batch):
            return {"noise": torch.rand(len(batch[0]))}

    often = train(Noisy(dropout=0.5, evaluate_every="1 step"))
    seldom = train(Noisy(dropout=0.5, evaluate_every="100 epochs"))
    for name, tensor in often.networks["model"].state_dict().items():
        assert torch.equal(tensor, seldom.networks["model"].state_dict()[name])
    assert often.networks["model"].training


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(train):
    first, again, other = (train(Line(dropout=0.5), seed=seed) for seed in (1, 1, 2))
    name = "0.weight"
    assert torch.equal(first.networks["model"].state_dict()[name], again.networks["model"].state_dict()[name])
    assert not torch.equal(first.networks["model"].state_dict()[name], other.networks["model"].state_dict()[name])


@pytest.mark.parametrize("log_every", [1, 5, 100])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_examples(train, log_every, accumulate):
    bad_example, bad_step = 42, 1 + permutation(100, 0, 0).tolist().index(42) // 16

    @dataclass(kw_only=True)
    class Poisoned(Line):
        def data(self, config):
            data = super().data(config)
            data.train.tensors[0][bad_example] = float("inf")
            return data

    with pytest.raises(TrainingError) as stopped:
        train(Poisoned(), log_every=log_every, accumulate=accumulate, run="poisoned")
    message = str(stopped.value)
    assert f"at step {bad_step} of 21" in message and f"example {bad_example};" in message and "\n" not in message


@dataclass(kw_only=True)
class Sparse(Exact):
    """Five steps an epoch; no example of the second one weighs anything."""

    epochs: int = 1
    batch_size: int = 20
    momentum: float = 0.0
    shuffle: bool = False
    poisoned: int | None = None

    def data(self, config):
        data = super().data(config)
        x, y = data.train.tensors
        if self.poisoned is not None:
            x[self.poisoned] = float("nan")
        weights = torch.ones(100)
        weights[20:40] = 0
        return Data(train=Resident(x, y, weights), test=Resident(*data.test.tensors, torch.ones(30)))

    def loss(self, networks, batch):
        x, y, weights = batch
        return Weighted(F.mse_loss(networks["model"](x), y, reduction="none").squeeze(1), weights)

    def snapshot(self, networks, data):
        return {"weights": torch.cat([p.flatten() for p in networks["model"].parameters()])}


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_batch_of_which_nothing_weighs_changes_nothing_and_stops_nothing(train, accumulate, clip_norm):
    recipe = Sparse(epochs=2, clip_norm=clip_norm, evaluate_every="1 step")
    result = train(recipe, accumulate=accumulate, log_every=1, save_every="1 step")
    assert result.steps == 10 and result.networks["model"][0].weight.isfinite().all()
    after = [tensors["weights"] for _, tensors in result.history.snapshots]
    unchanged = [step for step, (one, other) in enumerate(pairwise(after), 2) if torch.equal(one, other)]
    assert len(after) == 10 and unchanged == [2, 7]
    # such a step has no mean loss; the others have theirs
    losses = {record["step"]: record["train/loss"] for record in result.history.records if "train/loss" in record}
    assert [step for step, loss in losses.items() if loss is None] == [2, 7] and len(losses) == 10
    # as if the examples were not there
    assert_same_weights(result.networks["model"], raw_sparse(recipe))


def raw_sparse(recipe):
    """The network that a plain loop over the examples that weigh makes."""
    from nndist.distributed.runtime import Runtime

    x, y, weights = recipe.data(None).train.tensors
    Runtime(threads=1).seed(0)
    network = recipe.networks()["model"]
    optimizer = recipe.optimizer("model", network)
    for _ in range(recipe.epochs):
        for batch in weights.nonzero().flatten().split(recipe.batch_size):
            optimizer.zero_grad()
            F.mse_loss(network(x[batch]), y[batch]).backward()
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
            optimizer.step()
    return network


def test_a_record_leaves_out_a_batch_of_which_nothing_weighs(train):
    each = train(Sparse(), log_every=1).history.series("train/loss")
    assert each[0] == [1, 3, 4, 5]
    both = train(Sparse(), log_every=2).history.series("train/loss")
    assert both[0] == [2, 4, 5] and both[1][0] == pytest.approx(each[1][0], rel=1e-9)


@pytest.mark.parametrize("log_every", [1, 2, 100])
def test_a_loss_that_is_not_finite_still_stops_a_run_in_which_some_weigh_nothing(train, log_every):
    with pytest.raises(TrainingError, match=r"not finite at step 3 of 5, training example 57;"):
        train(Sparse(poisoned=57), log_every=log_every)


def test_a_run_that_failed_says_so(train, tmp_path):
    with pytest.raises(TrainingError):
        train(Line(lr=1e30), run="diverged")
    assert json.loads((tmp_path / "toys/diverged/run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "toys/diverged/checkpoints").exists()


def test_a_loss_that_is_a_mean_is_refused(train):
    @dataclass(kw_only=True)
    class Mean(Line):
        def loss(self, networks, batch):
            return super().loss(networks, batch).mean()

    with pytest.raises(UserError, match="one loss per example"):
        train(Mean())


def test_a_score_that_is_a_mean_is_refused(train):
    @dataclass(kw_only=True)
    class Mean(Line):
        def score(self, networks, batch):
            return {"loss": self.loss(networks, batch).mean()}

    with pytest.raises(UserError, match=r"score 'loss'.*one score per example"):
        train(Mean())


VARYING = """
from dataclasses import dataclass

import torch
from toys import Line

from nndist import Data, Output, Streamed

ROWS = [(torch.rand(4), torch.zeros(1), size) for size in range(1, 9)]


@dataclass(kw_only=True)
class Varying(Line):
    fixed: int = 0

    def data(self, config):
        # of two examples a third process has none that counts
        return Data(Streamed(ROWS, 0), Streamed(ROWS[:2] if self.fixed else ROWS, 0))

    def loss(self, networks, batch):
        return super().loss(networks, batch[:2])

    def score(self, networks, batch):
        length = self.fixed or int(batch[2].max())  # of the longest in its batch
        return {"loss": self.loss(networks, batch), "rows": Output(torch.ones(len(batch[0]), length))}
"""


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_output_whose_shape_varies_is_one_line(tmp_path, world_size):
    recipe = tmp_path / "varying.py"
    recipe.write_text(VARYING)
    flags = ["--runs-dir", tmp_path, "--no-progress", "--no-figures", "--threads", 1, "--eval-batch-size", 3]
    failed = Processes(world_size, [recipe, *flags], folder=tmp_path)
    assert set(failed.wait()) <= {2, -9} and 2 in failed.wait()
    lines = {line for line in failed.said().splitlines() if line.startswith("error:")}
    assert (
        len(lines) == 1 and "score 'rows': an Output has the shapes [3] and [6] for an example; it must" in lines.pop()
    )
    whole = Processes(world_size, [recipe, *flags, "--fixed", 5], folder=tmp_path)
    assert set(whole.wait()) == {0}, whole.said()


def test_a_classifier_of_dicts_is_one_line(train):
    @dataclass(kw_only=True)
    class Named(Classifier):
        epochs: int = 1
        batch_size: int = 8
        lr: float = 0.1

        def data(self, config):
            rows = [{"x": torch.rand(4), "y": number % 3} for number in range(20)]
            return Data(Streamed(rows, 0), Streamed(rows, 0))

        def networks(self):
            return {"model": nn.Linear(4, 3)}

        def optimizer(self, name, network):
            return torch.optim.SGD(network.parameters(), lr=self.lr)

    with pytest.raises(
        UserError, match=r"^Named: let an example .* be a tuple \(x, y\), .*: its batches are dicts of x, y"
    ):
        train(Named())
    with pytest.raises(UserError, match=r"are \(Tensor\) and not \(inputs, labels\)"):
        Named().score({}, (torch.zeros(2),))


def test_an_objective_without_a_network_is_refused(train):
    @dataclass(kw_only=True)
    class Lost(Line):
        def objectives(self):
            return {"generator": self.loss}

    with pytest.raises(UserError, match=r"objective 'generator' has no network of that name; networks.. returns model"):
        train(Lost())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_lbfgs_is_given_the_whole_batch_by_its_closure(train, accumulate):
    @dataclass(kw_only=True)
    class Second(Exact):
        """Fitted by curvature."""

        def optimizer(self, name, network):
            return torch.optim.LBFGS(network.parameters(), lr=0.1, max_iter=4)

    recipe = Second(batch_size=100, epochs=5)
    x, y = recipe.data(None).train.tensors
    Runtime.seed(None, 0)
    network = recipe.networks()["model"]
    optimizer = recipe.optimizer("model", network)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(network(x), y)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    ours = train(recipe, accumulate=accumulate).networks["model"].state_dict()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def test_each_objective_updates_its_own_network_only(train):
    @dataclass(kw_only=True)
    class Two(Line):
        def networks(self):
            return {"first": nn.Linear(4, 1), "second": nn.Linear(4, 1)}

        def optimizer(self, name, network):
            return torch.optim.SGD(network.parameters(), lr=0.0 if name == "first" else 0.1)

        def objectives(self):
            return {"first": self.both, "second": self.both}

        def both(self, networks, batch):
            x, y = batch
            assert all(p.grad is None for n in networks.values() for p in n.parameters())
            return (networks["first"](x) + networks["second"](x) - y).square().squeeze(1)

        def score(self, networks, batch):
            return {"loss": self.both_at_once(networks, batch)}

        def both_at_once(self, networks, batch):
            x, y = batch
            return (networks["first"](x) + networks["second"](x) - y).square().squeeze(1)

    torch.manual_seed(0)
    result = train(Two())
    fresh = train(Two(), max_steps=1)
    assert torch.equal(result.networks["first"].weight, fresh.networks["first"].weight)
    assert not torch.equal(result.networks["second"].weight, fresh.networks["second"].weight)
    saved = load_file(result.folder / "checkpoints/step-00000021/model.safetensors")
    assert set(saved) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    assert set(result.history.names()) >= {"train/loss/first", "train/loss/second"}


def test_a_figure_that_fails_costs_a_line_not_the_run(train, capsys):
    @dataclass(kw_only=True)
    class Bad(Line):
        def figures(self, networks, data, history):
            raise RuntimeError("no paper")

    result = train(Bad(), figures=True)
    assert "figures of the recipe failed (RuntimeError: no paper)" in capsys.readouterr().out
    assert [path.name for path in result.figures] == ["training.png"]


def test_snapshots_are_kept_for_the_figures(train):
    @dataclass(kw_only=True)
    class Watched(Line):
        def snapshot(self, networks, data):
            return {"weight": networks["model"][0].weight}

    result = train(Watched())
    steps = [step for step, _ in result.history.snapshots]
    assert steps == [7, 14, 21]
    assert torch.equal(result.history.snapshots[-1][1]["weight"], result.networks["model"][0].weight)
    assert not torch.equal(result.history.snapshots[0][1]["weight"], result.networks["model"][0].weight)


def test_check_takes_a_step_and_leaves_nothing(train, tmp_path, capsys):
    assert train(Line(), check=True).steps == 1
    assert list((tmp_path / "toys").iterdir()) == []
    assert "check passed: 1 step, test/loss" in capsys.readouterr().out


def test_check_compares_bits_so_that_nan_equals_itself(train, capsys):
    @dataclass(kw_only=True)
    class Unset(Line):
        def networks(self):
            networks = super().networks()
            networks["model"].register_buffer("limits", torch.full((2,), torch.nan))
            return networks

    train(Unset(), check=True)
    assert "check passed" in capsys.readouterr().out


def test_throughput_counts_the_examples_since_its_clock_was_restarted():
    feed = Feed(Resident(torch.zeros(8, 1)), batch_size=4, seed=0)
    window = LossWindow(["model"], feed, Runtime(cpu=True))
    window.add(next(feed.epoch(0)), {"model": [torch.zeros(4)]}, {})
    window.start_clock()
    assert window.examples == 4 and window.examples_per_second is None


def test_check_notices_a_network_that_does_not_come_back(train, monkeypatch):
    read = checkpoint.read

    def read_wrongly(path, *keep):
        found = read(path, *keep)
        found.tensors["model.safetensors"]["0.bias"] += 1
        return found

    monkeypatch.setattr(checkpoint, "read", read_wrongly)
    with pytest.raises(UserError, match=r"model\.0\.bias differs after loading its checkpoint"):
        train(Line(), check=True)


def test_settings_from_python_are_checked(train):
    with pytest.raises(UserError, match="epoch=3: no such setting; epochs"):
        train(Line(), epoch=3)


def test_resident_data_moves_once(train):
    examples = Resident(torch.zeros(4, 1))
    data = Data(train=examples, test=examples, more={"again": examples}).to(torch.device("cpu"))
    assert data.train is data.test is data.more["again"]


def test_deterministic_operations_on_request(train):
    seen = []

    @dataclass(kw_only=True)
    class Asking(Line):
        def score(self, networks, batch):
            seen.append(torch.are_deterministic_algorithms_enabled())
            return super().score(networks, batch)

    train(Asking(), max_steps=1, deterministic=True)
    train(Asking(), max_steps=1)
    assert seen == [True, False]


def test_tied_weights_and_their_average_are_saved_under_both_names(train):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.last = nn.Linear(4, 1)

        def forward(self, x):
            return self.last(self.second(torch.relu(self.first(x))))

    @dataclass(kw_only=True)
    class Shared(Line):
        def networks(self):
            return {"model": Tied()}

    result = train(Shared(ema_decay=0.5), run="tied")
    for name in ("model", "ema"):
        saved = load_file(result.folder / f"checkpoints/step-00000021/{name}.safetensors")
        assert torch.equal(saved["first.weight"], saved["second.weight"])
    again = train(Shared(ema_decay=0.5, epochs=4), run="tied", allow_change=("epochs",))
    assert again.steps == 28 and again.networks["model"].second.weight is again.networks["model"].first.weight


def test_a_recipe_of_a_notebook_has_no_file(train):
    scope: dict = {"__name__": "__notebook__"}
    exec("from toys import Line\nclass InACell(Line):\n    pass", scope)
    result = train(scope["InACell"](), run="cell")
    assert result.folder.parent.name == "inacell" and result.steps == 21


def test_a_choice_that_is_none_is_refused_from_python_too(train):
    with pytest.raises(UserError, match="--resume 'Must': must be one of auto, must, never"):
        train(Line(), resume="Must")


@pytest.mark.parametrize("field", ["lr", "clip_norm", "ema_decay"])
def test_a_field_that_is_not_finite_is_refused(train, field):
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')} (inf|nan)"):
        train(Line(**{field: float("inf")}))


def test_the_documented_cnn_takes_the_steps_of_a_plain_loop(train):
    """In float64, over the end of an epoch with its short last batch: equal but for the last digits."""
    from workers.parity import Watched

    from nndist.config import RunConfig
    from nndist.distributed.runtime import Runtime

    class Fewer(Watched):
        def data(self, config):
            data = super().data(config)
            data.train = Resident(*(tensor[:1000] for tensor in data.train.tensors))
            data.test = Resident(*(tensor[:100] for tensor in data.test.tensors))
            return data

    recipe = Fewer(batch_size=64)
    result = train(recipe, max_steps=20, seed=3, data_source="sample")
    Runtime(threads=1).seed(3)
    network = recipe.networks()["model"]
    data = recipe.data(RunConfig(data_source="sample").data_config(download=False))
    images, labels, _ = data.prepare(data.train.tensors)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    batches = [b for epoch in range(2) for b in permutation(len(images), 3, epoch).split(64)][:20]
    assert {len(batch) for batch in batches} == {64, 40}
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(images[batch]), labels[batch]).backward()
        optimizer.step()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(result.networks["model"].state_dict()[name], tensor, rtol=1e-12, atol=1e-14)


@dataclass(kw_only=True)
class Edited(Line):
    """The same recipe on examples that a user may edit."""

    offset: ClassVar[float] = 0.0

    def data(self, config):
        data = super().data(config)
        data.train.tensors[1][17] += self.offset
        return data


def test_examples_that_were_edited_are_noticed(train, monkeypatch):
    train(Edited(), run="it", max_steps=3)
    train(Edited(), run="it", max_steps=5)
    monkeypatch.setattr(Edited, "offset", 1e-3)
    with pytest.raises(UserError, match=r"the training examples of 'generated' have changed .* --allow-change data"):
        train(Edited(), run="it", max_steps=7)
    assert train(Edited(), run="it", max_steps=7, allow_change=("data",)).steps == 7


def test_the_last_evaluations_outputs_are_kept_for_the_figures(train):
    @dataclass(kw_only=True)
    class Answers(Line):
        def score(self, networks, batch):
            answers = networks["model"](batch[0])
            return {"error": (answers - batch[1]).abs().squeeze(1), "answers": Output(answers)}

        def figures(self, networks, data, history):
            answers = networks["model"](*data.inputs(data.test)[:1])
            return {"same": str(torch.allclose(history.outputs["answers"], answers))}

    result = train(Answers(), figures=True, eval_batch_size=7)
    assert result.scores.keys() == {"test/error"}
    assert (result.folder / "figures/same.txt").read_text() == "True\n"
    with pytest.raises(UserError, match="--best test/answers: no such score; choose from test/error"):
        train(Answers(best="test/answers", best_is="highest"))


def test_what_a_module_beside_the_recipe_counts_is_resumed(tmp_path):
    """A recipe's own helper module is loaded anew by each launch; the values in it come back with the checkpoint."""
    (tmp_path / "tally_beside.py").write_text("seen = {'steps': 0}\n")
    (tmp_path / "counting.py").write_text(
        "import tally_beside\nimport torch\nfrom torch import nn\n\nfrom nndist import Data, Recipe, Resident\n\n\n"
        "class Counting(Recipe):\n    batch_size: int = 4\n\n    def data(self, config):\n"
        "        x = torch.arange(40.0).unsqueeze(1)\n"
        "        return Data(train=Resident(x), test=Resident(x[:4]), source='made')\n\n"
        "    def networks(self):\n        return {'model': nn.Linear(1, 1)}\n\n"
        "    def optimizer(self, name, network):\n        return torch.optim.SGD(network.parameters(), lr=1e-5)\n\n"
        "    def loss(self, networks, batch):\n        if networks['model'].training:\n"
        "            tally_beside.seen['steps'] += 1\n        return networks['model'](batch[0]).square().squeeze(1)\n"
    )
    settings = {"runs_dir": tmp_path, "run": "it", "progress": False, "figures": False, "report": False, "threads": 1}
    for steps in (3, 5):
        nndist.train(tmp_path / "counting.py", max_steps=steps, wandb="off", **settings)
    assert sys.modules["tally_beside"].seen == {"steps": 5}

"""The recipes of generated data: networks, data, what they reach, and what one sees afterwards."""

from itertools import pairwise

import pytest
import torch
from making import data_of, figure, is_drawn, make, module_of
from PIL import Image, ImageChops
from torch import nn, optim

import nndist
from nndist.recipe.fields import from_json, hints_of

LAYERS = {
    "sum_mlp": [(60, 30), (60, 60), (1, 60)],
    "sine_regression": [(10, 1), (1, 10)],
    "quadratic_regression": [(10, 1), (1, 10)],
    "two_clusters": [(10, 2), (2, 10)],
    "optimizers": [(20, 1), (1, 20)],
}
PARAMETERS = {"sum_mlp": 5581, "sine_regression": 31, "quadratic_regression": 31, "two_clusters": 52, "optimizers": 61}
ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "softplus": nn.Softplus}
OPTIMIZERS = ["sgd", "momentum", "nag", "adagrad", "adadelta", "rmsprop", "adam"]
SMALL = pytest.mark.parametrize("name", LAYERS)


# Every small recipe.


@SMALL
def test_the_layers_are_the_documented_ones(name):
    for network in make(name).networks().values():
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        assert [tuple(layer.weight.shape) for layer in linear] == LAYERS[name]
        assert all(layer.bias is not None for layer in linear)
        assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


@SMALL
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_function_can_be_chosen(name, activation):
    for network in make(name, activation=activation).networks().values():
        used = {type(module) for module in network.modules()} & set(ACTIVATIONS.values())
        assert used == {ACTIVATIONS[activation]}
    assert make(name).activation == "relu"


@SMALL
def test_the_data_depend_on_the_data_seed_alone(name):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = data_of(name)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    same, other = data_of(name), data_of(name, data_seed=1)
    for a, b in zip(one.train.tensors + one.test.tensors, same.train.tensors + same.test.tensors, strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(one.train.tensors, other.train.tensors, strict=True))


# The sum of thirty numbers.


def test_sum_the_numbers_are_0_to_100_and_the_target_is_their_sum():
    data = data_of("sum_mlp")
    (numbers,) = data.train.tensors
    assert numbers.shape == (3000 * 32, 30) and numbers.dtype == torch.uint8
    assert numbers.unique().tolist() == list(range(101))
    assert len(numbers.unique(dim=0)) == len(numbers)  # no step sees an example again
    inputs, sums = data.inputs(data.train, 0, 1000)
    torch.testing.assert_close(inputs * 100, numbers[:1000].float())
    torch.testing.assert_close(sums[:, 0] * 100, numbers[:1000].sum(1).float())


def test_sum_steps_and_batches_change_the_training_set_only():
    short, longer = data_of("sum_mlp", steps=7), data_of("sum_mlp", steps=9, batch_size=64)
    assert (len(short.train), len(longer.train)) == (7 * 32, 9 * 64)
    assert torch.equal(short.test.tensors[0], longer.test.tensors[0]) and len(short.test) == 1000


def test_sum_refuses_no_steps():
    with pytest.raises(nndist.UserError, match="--steps 0"):
        make("sum_mlp", steps=0)


def test_sum_learns_and_prints_the_table(trained):
    result = trained("sum_mlp")
    assert result.steps == 3000
    assert result.scores["test/loss"] < 1e-4 and result.scores["test/absolute_error"] < 0.01
    lines = figure(result, "predictions.txt").read_text().splitlines()
    assert len(lines) == 11
    for line in lines[1:]:
        predicted, target, error = map(float, line.split()[-3:])
        assert 5 < target < 25 and error < 0.05 and error == pytest.approx(abs(predicted - target), abs=2e-4)
    assert is_drawn(figure(result, "errors.png"))


def test_sum_ends_in_a_relu_only_where_that_is_asked_for():
    for last_relu in (True, False):
        torch.manual_seed(0)
        network = make("sum_mlp", last_relu=last_relu).networks()["model"]
        with torch.no_grad():
            network.fc3.bias.fill_(-1000.0)
        assert (network(torch.rand(10, 30)) == 0).all() == last_relu


def test_sum_an_output_that_is_always_0_never_learns():
    """Why the last layer has no ReLU here: about a quarter of the document's networks start so."""
    fields = {"last_relu": True, "steps": 30}
    recipe, data = make("sum_mlp", **fields), data_of("sum_mlp", **fields)
    batch = data.inputs(data.train)
    dead = 0
    for seed in range(100):
        torch.manual_seed(seed)
        networks = recipe.networks()
        recipe.loss(networks, batch).mean().backward()
        dead += all(not p.grad.any() for p in networks["model"].parameters())
    assert 10 <= dead <= 40


# The noisy sine.


def test_sine_the_points_are_noisy_and_the_test_is_not():
    data = data_of("sine_regression")
    x, y = data.inputs(data.train)
    assert x.shape == y.shape == (100, 1) and 0 <= x.min() < 0.1 and 0.9 < x.max() < 1
    assert 0.32 < (y - x * torch.sin(2 * torch.pi * x)).std() < 0.48
    x, y = data.inputs(data.test)
    torch.testing.assert_close(x[:, 0], torch.arange(100) / 100)
    torch.testing.assert_close(y, x * torch.sin(2 * torch.pi * x))


def test_sine_defaults_are_single_examples_in_their_own_order():
    recipe = make("sine_regression")
    optimizer = recipe.optimizer("model", recipe.networks()["model"])
    assert (recipe.batch_size, recipe.epochs, recipe.shuffle, recipe.schedule) == (1, 500, False, "constant")
    assert isinstance(optimizer, optim.SGD)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (1e-3, 0.9)


def test_sine_fast_keeps_what_was_given():
    fast = make("sine_regression", fast=True)
    assert (fast.batch_size, fast.epochs, fast.lr, fast.shuffle, fast.schedule) == (50, 1000, 0.1, True, "cosine")
    given = make("sine_regression", fast=True, batch_size=25, epochs=7)
    assert (given.batch_size, given.epochs, given.lr) == (25, 7, 0.1)
    hints = hints_of(type(fast))
    fields = {name: from_json(value, hints[name]) for name, value in fast.fields().items()}
    assert make("sine_regression", **fields) == fast  # as a resumed run makes it again


def test_sine_fast_fits(trained):
    result = trained("sine_regression", fast=True)
    assert result.steps == 2000
    assert result.scores["test/loss"] < 0.07  # a flat line: 0.14
    assert is_drawn(figure(result, "fit.png"))


def test_sine_single_examples_fit_at_the_default_rate_and_die_at_the_documents(trained):
    assert trained("sine_regression", epochs=40, figures=False).scores["test/loss"] < 0.1
    dead = trained("sine_regression", epochs=10, figures=False, lr=0.1)
    fit = dead.networks["model"](torch.linspace(0, 1, 50).unsqueeze(1))
    assert fit.max() - fit.min() < 0.05


# The parabola.


def test_parabola_the_noise_lies_above_the_curve():
    data = data_of("quadratic_regression")
    x, y = data.inputs(data.train)
    torch.testing.assert_close(x[:, 0], torch.linspace(-1, 1, 100))
    noise = y - x.square()
    assert noise.min() >= 0 and noise.max() <= 0.2 and 0.08 < noise.mean() < 0.12
    x, y = data.inputs(data.test)
    torch.testing.assert_close(y, x.square() + 0.1)


def test_parabola_is_fitted_in_100_full_steps(trained):
    result = trained("quadratic_regression")
    assert result.steps == 100 and result.history.series("lr")[1] == [0.3] * 100
    assert result.scores["test/loss"] < 0.02  # the best constant: 0.09
    assert is_drawn(figure(result, "fit.png")) and is_drawn(figure(result, "activation_functions.png"))


def test_parabola_the_live_plot_is_an_animation(trained):
    result = trained("quadratic_regression")
    assert [step for step, _ in result.history.snapshots] == list(range(5, 101, 5))
    with Image.open(figure(result, "learning.gif")) as gif:
        frames = []
        for number in range(gif.n_frames):
            gif.seek(number)
            frames.append(gif.convert("RGB"))
    assert len(frames) == 20
    assert all(ImageChops.difference(a, b).getbbox() for a, b in pairwise(frames))
    assert len({frame.tobytes() for frame in frames}) == 20


def test_parabola_a_long_run_has_no_endless_animation():
    learning = module_of("quadratic_regression").learning
    x = torch.linspace(-1, 1, 100).unsqueeze(1)
    for number in (1, 40, 41, 400):
        animation = learning(x, x.square(), [(step + 1, {"fit": x * step}) for step in range(number)], "title")
        frames = list(animation.new_frame_seq())
        assert 1 <= len(frames) <= 40
        animation._draw_frame(frames[-1])
        assert f"step {number}," in animation._fig.axes[0].get_title()
        animation._draw_was_started = True  # or it warns that nobody looked at it


def test_parabola_in_small_batches_needs_a_shuffle(trained):
    settings = {"batch_size": 5, "epochs": 5, "figures": False, "evaluate_every": "5 epochs"}
    shuffled, ordered = (trained("quadratic_regression", shuffle=shuffle, **settings) for shuffle in (True, False))
    assert shuffled.steps == ordered.steps == 100
    assert 2 * shuffled.scores["test/loss"] < ordered.scores["test/loss"]


# The two clouds.


def test_clouds_lie_around_their_means_and_the_test_points_are_fresh():
    data = data_of("two_clusters")
    for examples, count in ((data.train, 100), (data.test, 500)):
        points, labels = data.inputs(examples)
        for label, mean in ((0, 2.0), (1, -2.0)):
            cloud = points[labels == label]
            assert cloud.shape == (count, 2)
            torch.testing.assert_close(cloud.mean(0), torch.full((2,), mean), atol=0.35, rtol=0)
            torch.testing.assert_close(cloud.std(0), torch.ones(2), atol=0.2, rtol=0)
    both = torch.cat([data.train.tensors[0], data.test.tensors[0]])
    assert len(both.unique(dim=0)) == 1200


def test_clouds_are_told_apart(trained):
    result = trained("two_clusters")
    assert result.steps == 100
    assert result.scores["test/accuracy"] > 0.97
    assert is_drawn(figure(result, "decision_boundary.png"))


def test_clouds_the_two_styles_give_the_same(trained):
    one, other = trained("two_clusters"), trained("two_clusters", style="sequential")
    assert isinstance(other.networks["model"], nn.Sequential) and not isinstance(one.networks["model"], nn.Sequential)
    assert one.scores == other.scores
    assert one.history.series("train/loss") == other.history.series("train/loss")
    for a, b in zip(one.networks["model"].parameters(), other.networks["model"].parameters(), strict=True):
        assert torch.equal(a, b)


# The seven optimizers.


def test_optimizers_start_from_the_same_weights():
    networks = make("optimizers").networks()
    assert list(networks) == OPTIMIZERS
    first = networks["sgd"].state_dict()
    for network in networks.values():
        assert all(torch.equal(value, first[key]) for key, value in network.state_dict().items())
    assert len({p.data_ptr() for network in networks.values() for p in network.parameters()}) == 7 * 4


@pytest.mark.parametrize(
    "name, kind, options",
    [
        ("sgd", optim.SGD, {"lr": 0.01, "momentum": 0, "nesterov": False}),
        ("momentum", optim.SGD, {"lr": 0.01, "momentum": 0.8, "nesterov": False}),
        ("nag", optim.SGD, {"lr": 0.01, "momentum": 0.8, "nesterov": True}),
        ("adagrad", optim.Adagrad, {"lr": 0.01}),
        ("adadelta", optim.Adadelta, {"lr": 1.0, "rho": 0.9}),
        ("rmsprop", optim.RMSprop, {"lr": 0.01, "alpha": 0.9, "momentum": 0}),
        ("adam", optim.Adam, {"lr": 0.01, "betas": (0.9, 0.99)}),
    ],
)
def test_optimizers_are_the_named_ones(name, kind, options):
    recipe = make("optimizers")
    optimizer = recipe.optimizer(name, recipe.networks()[name])
    assert type(optimizer) is kind
    assert {key: optimizer.param_groups[0][key] for key in options} == options


def test_optimizers_train_in_lock_step_and_are_compared(trained):
    result = trained("optimizers")
    assert result.steps == 384
    losses = {name: result.scores[f"test/loss/{name}"] for name in OPTIMIZERS}
    assert max(losses, key=losses.get) == "sgd"  # the document: the slowest of them
    assert losses["adam"] < 0.01 and losses["sgd"] < 0.09 and len(set(losses.values())) == 7
    assert all(len(result.history.series(f"train/loss/{name}")[0]) > 100 for name in OPTIMIZERS)
    assert is_drawn(figure(result, "optimizers.png")) and is_drawn(figure(result, "fits.png"))


def test_optimizers_a_loss_reaches_its_own_network_only():
    recipe, data = make("optimizers"), data_of("optimizers")
    batch = data.inputs(data.train, 0, 32)
    for name, loss in recipe.objectives().items():
        torch.manual_seed(0)
        networks = recipe.networks()
        loss(networks, batch).mean().backward()
        assert all((p.grad is not None) == (key == name) for key in networks for p in networks[key].parameters())


def test_optimizers_the_data_are_a_noisy_parabola():
    data = data_of("optimizers")
    x, y = data.inputs(data.train)
    torch.testing.assert_close(x[:, 0], torch.linspace(-1, 1, 1000))
    noise = y - x.square()
    assert 0.09 < noise.std() < 0.11 and noise.mean().abs() < 0.015
    x, y = data.inputs(data.test)
    torch.testing.assert_close(y, x.square())

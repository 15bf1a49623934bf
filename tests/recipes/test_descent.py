"""Nine ways down a loss: where they end, Newton's method and the closed form."""

import pytest
import torch
from making import data_of, figure, is_drawn, make
from torch import nn, optim

import nndist
from nndist.datasets import hills
from nndist.training.newton import Newton

OPTIMIZERS = ("gd", "momentum", "nag", "adagrad", "adadelta", "rmsprop", "adam", "lbfgs", "newton")


@pytest.fixture(scope="module")
def ends(trained):
    """(weights, loss, steps) by (start, optimizer), as the table of a training says; and the training."""
    result = trained("descent", epochs=40)
    found = {}
    for row in figure(result, "ends.txt").read_text().splitlines()[1:]:
        name, _, rest = row.partition("(")
        numbers = rest.replace(")", "").replace(",", "").split()
        found[name[:7].strip(), name[7:].strip()] = (tuple(map(float, numbers[:2])), float(numbers[2]), int(numbers[3]))
    return found, result


def test_the_start_decides_which_optimum_is_found(ends):
    """From the left all end at the lower hill, from the right at the higher one, whose loss is the global optimum."""
    found, result = ends
    centre = torch.cartesian_prod(torch.linspace(-4, 4, 161), torch.linspace(-1, 2, 61))
    least = hills.mean_losses(centre, *data_of("descent").train.tensors, linear=False).min().item()
    for optimizer in OPTIMIZERS:
        (left, _), (right, _) = (found[start, optimizer][0] for start in ("left", "right"))
        assert abs(left + 1.5) < 0.3 and abs(right - 1.5) < 0.3, optimizer
        assert found["right", optimizer][1] < least + 0.002 < found["left", optimizer][1] - 0.05, optimizer
    assert is_drawn(figure(result, "paths.png"))


def test_newton_needs_one_step_for_a_line_and_gradient_descent_many(ends):
    found, _ = ends
    assert found["line", "newton"][2] == 1 and found["line", "lbfgs"][2] < 8 < found["line", "gd"][2]
    for optimizer in ("gd", "nag", "adagrad", "lbfgs", "newton"):
        assert found["line", optimizer][0] == pytest.approx(found["line", "least squares"][0], abs=2e-3)


def test_the_closed_form_is_the_minimum():
    x, _, flat = data_of("descent").train.tensors
    weights = hills.least_squares(x, flat).requires_grad_()
    (hills.line(x, *weights) - flat).square().mean().backward()
    assert weights.grad.abs().max() < 1e-6
    assert weights.tolist() == pytest.approx(hills.LINE, abs=0.02)


def test_newtons_step_is_the_textbooks_where_the_loss_is_convex_and_leads_off_a_saddle():
    matrix, aim = torch.tensor([[3.0, 1.0], [1.0, 2.0]]), torch.tensor([0.4, -0.7])
    weights = nn.Parameter(torch.zeros(2))
    optimizer = Newton([weights])

    def quadratic():
        weights.grad = None
        loss = (weights - aim) @ matrix @ (weights - aim) / 2
        loss.backward()
        return loss.detach()

    optimizer.step(quadratic)
    torch.testing.assert_close(weights.detach(), aim, atol=1e-4, rtol=0)
    weights = nn.Parameter(torch.tensor([0.3, 0.1]))  # x^2 - y^2: plain Newton would go to the saddle at 0
    optimizer = Newton([weights])

    def saddle():
        weights.grad = None
        loss = weights[0] ** 2 - weights[1] ** 2
        loss.backward()
        return loss.detach()

    optimizer.step(saddle)
    torch.testing.assert_close(weights.detach(), torch.tensor([0.0, 0.2]), atol=1e-4, rtol=0)


def test_a_step_is_no_longer_than_was_asked_for():
    weights = nn.Parameter(torch.tensor([30.0, 40.0]))
    optimizer = Newton([weights], longest=5.0)

    def bowl():
        weights.grad = None
        loss = weights.square().sum()
        loss.backward()
        return loss.detach()

    optimizer.step(bowl)
    torch.testing.assert_close(weights.detach(), torch.tensor([27.0, 36.0]), atol=1e-2, rtol=0)


def test_gradient_descent_takes_all_examples_at_once_and_lr_scales_each_rate():
    recipe = make("descent", lr=0.5)
    assert recipe.batch_size == len(data_of("descent").train)
    rates = {name: recipe.optimizer(f"{name}_left", nn.Linear(1, 1)).param_groups[0]["lr"] for name in OPTIMIZERS}
    assert rates["gd"] == rates["momentum"] == rates["nag"] == 0.15 and rates["newton"] == 0.5
    assert isinstance(recipe.optimizer("lbfgs_line", nn.Linear(1, 1)), optim.LBFGS)


def test_it_predicts(ends):
    _, result = ends
    answers = nndist.predict(result, 1.5, -1.5)
    (high, low), (after, before) = zip(*((row["hills"], row["line"]) for row in answers.rows()), strict=True)
    assert high == pytest.approx(1.0, abs=0.03) and abs(low) < 0.01  # the global optimum covers the higher hill only
    assert after - before == pytest.approx(0.5 * 3 / 4, abs=0.02)

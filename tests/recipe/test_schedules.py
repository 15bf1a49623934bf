"""Schedules are pure functions; where torch has the same one, they give its numbers."""

import pytest
import torch
from toys import Line

from nndist.errors import UserError
from nndist.schedules import SCHEDULES, lr_factor

STEPS = 40


def torch_factors(make):
    """The learning rates that a torch scheduler gives an optimizer of learning rate 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    factors = []
    for _ in range(STEPS):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


def factors(name, **options):
    return [lr_factor(step, STEPS, name, **options) for step in range(STEPS)]


def test_constant_is_one():
    assert factors("constant") == [1.0] * STEPS


def test_warmup_rises_linearly_then_stays():
    assert factors("warmup", warmup_steps=4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_is_torchs():
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=STEPS - 1))
    assert factors("cosine") == pytest.approx(expected, abs=1e-9)


def test_cosine_after_a_warmup_starts_at_one_and_ends_at_the_final_factor():
    found = factors("cosine", warmup_steps=5, final_factor=0.1)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[5] == 1.0 and found[-1] == pytest.approx(0.1) and found[5:] == sorted(found[5:], reverse=True)


def test_step_is_torchs():
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=15, gamma=0.5))
    assert factors("step", decay_steps=15, decay_factor=0.5) == pytest.approx(expected)


def test_one_cycle_is_torchs():
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=STEPS))
    assert factors("one-cycle") == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_shortest_runs(name, total_steps):
    for step in range(total_steps):
        assert 0 <= lr_factor(step, total_steps, name, warmup_steps=1, decay_steps=1) <= 1


@pytest.mark.parametrize(
    "fields, flag",
    [
        ({"schedule": "step"}, "--decay-steps"),
        ({"schedule": "warmup"}, "--warmup-steps"),
        ({"epochs": -1}, "--epochs -1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"clip_norm": -1.0}, "--clip-norm"),
        ({"ema_decay": 1.0}, "--ema-decay"),
        ({"patience": 2}, "--best"),
        ({"patience": 0, "best": "test/loss"}, "--patience 0"),
        ({"warmup_steps": -1}, "--warmup-steps -1"),
    ],
)
def test_fields_that_cannot_be_meant_are_named(fields, flag):
    with pytest.raises(UserError, match=flag):
        Line(**fields).validate()

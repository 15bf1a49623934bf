"""The loop steps torch's optimizers without their wrapping: the same bits, hooks kept, no compiler imported."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from launching import ROOT, python, succeeded
from torch import optim
from torch.optim import lr_scheduler

from nndist.errors import UserError
from nndist.recipe.contract import Recipe
from nndist.torch_internals import backward, plain_step
from nndist.training.learning_rates import LearningRates
from nndist.training.optimizers import closures_after_backward, make_optimizer
from nndist.training.wrapped_steps import ShardedStep

KINDS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw_fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: optim.Adadelta(p),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5),
}


def networks():
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return first, copy.deepcopy(first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_step_and_backward_are_the_usual_ones(kind):
    ours, theirs = networks()
    our_optimizer, their_optimizer = KINDS[kind](ours.parameters()), KINDS[kind](theirs.parameters())
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(6, 4, generator=generator)
        weights = torch.rand(6, generator=generator)
        for network in (ours, theirs):
            for parameter in network.parameters():
                parameter.grad = None
        backward(ours(x).square().squeeze(1), weights)
        theirs(x).square().squeeze(1).backward(weights)
        plain_step(our_optimizer)
        their_optimizer.step()
        for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(our.grad, their.grad) and torch.equal(our, their)
    assert str(our_optimizer.state_dict()) == str(their_optimizer.state_dict())


CHOSEN = [{}, {"fused": False}, {"fused": True}, {"foreach": False}, {"foreach": True}, {"differentiable": True}]


@pytest.mark.parametrize("chosen", CHOSEN, ids=str)
def test_what_a_recipe_chose_of_its_optimizer_stands(chosen):
    class Any:
        name = "any"

        def optimizer(self, name, network):
            return optim.Adam(network.parameters(), lr=0.01, **chosen)

    names = ("fused", "foreach", "differentiable")
    (ours,) = make_optimizer(Any(), "model", networks()[0]).param_groups
    (theirs,) = Any().optimizer("model", networks()[0]).param_groups
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_of_torchs_own_is_not_wrapped(kind, monkeypatch):
    """What torch wraps around it begins a profile's record, which fails here."""
    network, _ = networks()
    optimizer = KINDS[kind](network.parameters())
    network(torch.ones(1, 4)).backward()
    before = [parameter.clone() for parameter in network.parameters()]

    def begins(record):
        raise RuntimeError("recorded")

    monkeypatch.setattr("torch.autograd.profiler.record_function.__enter__", begins)
    with pytest.raises(RuntimeError, match="recorded"):
        optimizer.step()
    plain_step(optimizer)
    assert not any(map(torch.equal, before, network.parameters()))


def test_hooks_are_called():
    network, _ = networks()
    called = []
    hooked = optim.SGD(network.parameters(), lr=0.1)
    hooked.register_step_pre_hook(lambda *_: called.append("before"))
    hooked.register_step_post_hook(lambda *_: called.append("after"))
    plain_step(hooked)
    assert called == ["before", "after"]


def test_a_step_of_the_recipes_own_is_called(monkeypatch):
    """Of a class, of an instance, and one that was put in the place of torch's."""
    network, _ = networks()

    class Own(optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("mine")

    patched = optim.SGD(network.parameters(), lr=0.1)
    patched.step = lambda: Own.step(patched)
    for optimizer in (Own(network.parameters(), lr=0.1), patched):
        with pytest.raises(RuntimeError, match="mine"):
            plain_step(optimizer)
    monkeypatch.setattr(optim.Adagrad, "step", Own.step)
    with pytest.raises(RuntimeError, match="mine"):
        plain_step(optim.Adagrad(network.parameters()))


SCHEDULES = {
    "onecycle": lambda o, n: lr_scheduler.OneCycleLR(o, 0.1, total_steps=n),
    "cosine": lambda o, n: lr_scheduler.CosineAnnealingLR(o, n),
    "lambda": lambda o, n: lr_scheduler.LambdaLR(o, lambda step: 1 - step / n),
    "warm": lambda o, n: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, n - 2)], [2]
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("taken, longer", [(3, 6), (3, 12), (6, 12)])
def test_a_schedule_has_the_length_of_now_when_it_goes_on(kind, taken, longer):
    class Scheduled(Recipe):
        def scheduler(self, name, optimizer, total_steps):
            return SCHEDULES[kind](optimizer, total_steps)

    def begun(total_steps):
        optimizers = {"model": optim.SGD(networks()[0].parameters(), lr=0.1, momentum=0.9)}
        return LearningRates(Scheduled(), optimizers, total_steps), optimizers["model"]

    def steps(rates, optimizer, count):
        seen = []
        for _ in range(count):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            rates.after_step()
        return seen

    (first, optimizer), whole = begun(6), begun(longer)
    steps(first, optimizer, taken)
    rates, resumed = begun(longer)
    resumed.load_state_dict(optimizer.state_dict())
    rates.load(json.loads(json.dumps(first.state())))
    wanted = steps(*whole, longer)[taken:]
    assert steps(rates, resumed, longer - taken) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_a_step_that_sharded_parameters_do_not_allow_is_one_line():
    class Normed(optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("aten.add_.Tensor: in-place operations that require placement changes\nare many")

    network, _ = networks()
    step = object.__new__(ShardedStep)
    step.networks, step.optimizers = {"model": network}, {"model": Normed(network.parameters(), lr=0.1)}
    step.runtime = SimpleNamespace(scaler=None)
    with pytest.raises(
        UserError, match=r"^--shard fsdp: the step of Normed, the optimizer of 'model'.* as AdamW"
    ) as caught:
        step._update("model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [True, "model", ("net",)])
def test_closures_after_backward_are_of_named_networks(given):
    class Declared(Recipe):
        closure_after_backward = given

    with pytest.raises(UserError, match=r"it must be a tuple of names of networks, such as \('model',\)"):
        closures_after_backward(Declared(), {"model": optim.SGD(networks()[0].parameters(), lr=0.1)})


def test_torch_is_left_as_it_was():
    before = {name: vars(method).copy() for name, method in vars(optim.Optimizer).items() if callable(method)}

    class Any:
        name = "any"

        def optimizer(self, name, network):
            return optim.SGD(network.parameters(), lr=0.1)

    make_optimizer(Any(), "model", networks()[0])
    after = {name: vars(method) for name, method in vars(optim.Optimizer).items() if callable(method)}
    assert {n: set(d) for n, d in after.items()} == {n: set(d) for n, d in before.items()}


def test_a_training_starts_without_what_takes_seconds_to_import(tmp_path):
    heavy = ["torch._dynamo", "torch._inductor", "sympy", "torchvision", "matplotlib", "wandb", "pandas", "scipy"]
    code = (
        "import sys, nndist; "
        f"nndist.train({str(ROOT / 'recipes/mnist_simple_cnn.py')!r}, data_source='sample', "
        f"max_steps=6, figures=False, progress=False, runs_dir={str(tmp_path)!r}, save_every='2 steps', "
        "ema_decay=0.9, clip_norm=1.0); "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    assert succeeded(python("-c", code)).stdout.splitlines()[-1] == "[]"

"""The loop steps torch's optimizers without their wrapping: the same bits, hooks kept, no compiler imported."""

import copy
from dataclasses import dataclass

import pytest
import torch
from launching import ROOT, python, succeeded
from torch import optim
from toys import Line

import nndist
from nndist.optimizers import bare_step, make_optimizer, prefer_fused
from nndist.step import backward

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
def test_a_bare_step_and_backward_are_the_usual_ones(kind):
    ours, theirs = networks()
    our_optimizer, their_optimizer = KINDS[kind](ours.parameters()), KINDS[kind](theirs.parameters())
    step = bare_step(our_optimizer)
    assert getattr(step, "__self__", None) is None
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(6, 4, generator=generator)
        weights = torch.rand(6, generator=generator)
        for network in (ours, theirs):
            for parameter in network.parameters():
                parameter.grad = None
        backward(ours(x).square().squeeze(1), weights)
        theirs(x).square().squeeze(1).backward(weights)
        step()
        their_optimizer.step()
        for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(our.grad, their.grad) and torch.equal(our, their)
    assert str(our_optimizer.state_dict()) == str(their_optimizer.state_dict())


FUSED = {
    "momentum": lambda p, **kw: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, **kw),
    "adam": lambda p, **kw: optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.01, **kw),
    "adamw": lambda p, **kw: optim.AdamW(p, lr=0.01, maximize=True, **kw),
}


@pytest.mark.parametrize("kind", FUSED)
def test_the_fused_update_is_the_plain_one(kind):
    """In float64 over 50 steps, so that rounding can't hide a difference; a recipe's own choice stands."""
    ours, theirs = (network.double() for network in networks())
    our_optimizer = FUSED[kind](ours.parameters())
    their_optimizer = FUSED[kind](theirs.parameters(), foreach=False)
    prefer_fused(our_optimizer)
    prefer_fused(their_optimizer)
    assert our_optimizer.param_groups[0]["fused"] and not their_optimizer.param_groups[0]["fused"]
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        for network, optimizer in ((ours, our_optimizer), (theirs, their_optimizer)):
            network(x).tanh().sum().backward()
            bare_step(optimizer)()
            network.zero_grad()
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(our, their, rtol=1e-12, atol=1e-14)


def test_a_training_updates_a_recipes_adam_in_one_kernel(tmp_path):
    made = []

    @dataclass(kw_only=True)
    class Adaptive(Line):
        def optimizer(self, name, network):
            made.append(optim.Adam(network.parameters(), lr=self.lr))
            return made[-1]

    settings = {"runs_dir": tmp_path, "cpu": True, "progress": False, "figures": False, "report": False, "threads": 1}
    nndist.train(Adaptive(epochs=1), **settings)
    assert [group["fused"] for optimizer in made for group in optimizer.param_groups] == [True]


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize(
    "chosen",
    [{"fused": False}, {"fused": True}, {"foreach": False}, {"foreach": True}, {"differentiable": True}],
    ids=str,
)
def test_what_a_recipe_chose_of_its_optimizer_stands(kind, chosen):
    class Any:
        name = "any"

        def optimizer(self, name, network):
            return FUSED[kind](network.parameters(), **chosen)

    names = ("fused", "foreach", "differentiable")
    (ours,) = make_optimizer(Any(), "model", networks()[0]).param_groups
    (theirs,) = Any().optimizer("model", networks()[0]).param_groups
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def test_plain_sgd_and_other_optimizers_are_left_alone():
    for make in (lambda p: optim.SGD(p, lr=0.1), optim.Adagrad, optim.RMSprop):
        optimizer = make(networks()[0].parameters())
        prefer_fused(optimizer)
        assert not optimizer.param_groups[0].get("fused")


def test_hooks_and_foreign_optimizers_keep_their_method():
    network, _ = networks()
    hooked = optim.SGD(network.parameters(), lr=0.1)
    hooked.register_step_post_hook(lambda *_: None)
    assert bare_step(hooked) == hooked.step

    class Own(optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("mine")

    own = Own(network.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="mine"):
        bare_step(own)()


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
        "import sys, nndist, nndist.engines; nndist.engines.TapedStep.LONGEST = 60; "  # so that a tape is made
        f"nndist.train({str(ROOT / 'recipes/mnist_simple_cnn.py')!r}, data_source='sample', "
        f"max_steps=6, figures=False, progress=False, runs_dir={str(tmp_path)!r}, save_every='2 steps', "
        "ema_decay=0.9, clip_norm=1.0); "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    assert succeeded(python("-c", code)).stdout.splitlines()[-1] == "[]"

"""The recipe of resumable.py on a machine that computes wrongly: one bit of a number is another one.

In the environment, FLIP is "RANK STEP WHAT WHEN": what is flipped on that rank in that step, a "weight" after the step
before it, an "activation" of the generator's first layer, or a "gradient" behind it; WHEN is the number of the call in
that step, from 1, in which it happens, or "always".
"""

import os
import threading
from dataclasses import dataclass

import torch
from torch import nn
from workers.resumable import Resumable

process = threading.local()  # what a machine does wrong, no program undoes


def flips(what):
    """Whether this call is one of those that are wrong."""
    at_rank, at_step, kind, when = os.environ.get("FLIP", "-1 0 none 0").split()
    if (
        int(os.environ.get("RANK", 0)) != int(at_rank)
        or getattr(process, "step", 0) + 1 != int(at_step)
        or kind != what
    ):
        return False
    process.calls = getattr(process, "calls", 0) + 1
    return when == "always" or process.calls == int(when)


def with_a_flipped_bit(tensor):
    other = tensor.clone()
    other.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 12)
    return other


class Wrong(torch.autograd.Function):
    """Nothing, on a machine that works."""

    @staticmethod
    def forward(ctx, given):
        return with_a_flipped_bit(given) if flips("activation") else given.clone()

    @staticmethod
    def backward(ctx, gradient):
        return with_a_flipped_bit(gradient) if flips("gradient") else gradient


class Layer(nn.Linear):
    def forward(self, given):
        result = super().forward(given)
        return Wrong.apply(result) if self.training and torch.is_grad_enabled() and result.requires_grad else result


@dataclass(kw_only=True)
class Corrupted(Resumable):
    """It also keeps every kind of Python object that a pass may change."""

    clock: bool = False
    """Whether the losses depend on the time."""

    def networks(self):
        networks = super().networks()
        networks["generator"][0] = Layer(4, self.width)
        self.passes, self.seen, self.drawn = 0, [], torch.Generator().manual_seed(5)
        self.running, self.named = torch.zeros(3), {"inner": {"count": 0}}
        return networks

    def generator_loss(self, networks, batch):
        self.passes += 1
        self.seen.append(self.passes)
        self.named["inner"]["count"] += 2
        self.running += torch.rand(3, generator=self.drawn)
        self.last = float(self.running.sum())
        losses = super().generator_loss(networks, batch) * (1 + 0.01 * self.last + 1e-4 * len(self.seen))
        if self.clock:
            import time

            losses = losses * (1 + 1e-3 * (time.perf_counter() % 1))
        return losses

    def after_step(self, networks, step):
        process.step, process.calls = step, 0
        if flips("weight"):
            weight = networks["generator"][0].weight
            weight.data = with_a_flipped_bit(weight.data)
        process.calls = 0

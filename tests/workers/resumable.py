"""A recipe with everything that has to survive a kill: two networks, BatchNorm, dropout, momentum, Adam, average.

In the environment, FAULT says what befalls a process: "RANK CALL kill" sends that rank SIGKILL in the CALL-th loss that
it computes, "stop" SIGSTOP, "raise" an exception; with FAULT_ONCE, a path, only if that file does not exist yet.
"""

import os
import random
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import nn

from nndist.data import Data, Resident
from nndist.recipe import Recipe

process = threading.local()  # what is counted there belongs to the process: a resumed run starts without it


@dataclass(kw_only=True)
class Resumable(Recipe):
    """Two networks that train against each other, with every kind of state."""

    epochs: int = 3
    batch_size: int = 10
    lr: float = 0.02
    schedule: str = "one-cycle"
    ema_decay: float | None = 0.95
    clip_norm: float | None = 1.0
    best: str | None = "test/realness"
    best_is: str = "lowest"
    optimizers: str = "SGD"
    width: int = 16
    momentum: float = 0.9

    def data(self, config):
        generator = torch.Generator().manual_seed(1)
        points = torch.randn(107, 2, generator=generator) * 0.3 + 1.0  # 11 batches, the last of 7
        noise = torch.randn(107, 4, generator=generator)
        return Data(train=Resident(points, noise, torch.arange(107)), test=Resident(points[:31], noise[:31]))

    def networks(self):
        def mlp(inputs, outputs):
            layers = [
                nn.Linear(inputs, self.width),
                nn.BatchNorm1d(self.width),
                nn.ReLU(),
                nn.Dropout(0.3),
                nn.Linear(self.width, outputs),
            ]
            return nn.Sequential(*layers)

        return {"discriminator": mlp(2, 1), "generator": mlp(4, 2)}

    def optimizer(self, name, network):
        kind = "Adam" if name == "generator" and self.optimizers == "SGD" else self.optimizers
        options = {
            "SGD": {"momentum": self.momentum, "nesterov": True},
            "Plain": {},
            "AdamFused": {"fused": True},
            "AdamWForeach": {"foreach": True},
            "RMSprop": {"momentum": 0.5, "centered": True},
        }.get(kind, {})
        kinds = {"Plain": "SGD", "AdamFused": "Adam", "AdamWForeach": "AdamW"}
        return getattr(torch.optim, kinds.get(kind, kind))(network.parameters(), lr=self.lr, **options)

    def objectives(self):
        return {"discriminator": self.discriminator_loss, "generator": self.generator_loss}

    def discriminator_loss(self, networks, batch):
        real, noise, numbers = batch
        self.suffer(numbers)
        # draws from Python's and NumPy's generators, cached Gaussians included
        jitter = random.gauss(0, 0.01) + numpy.random.standard_normal() * 0.01
        judged = networks["discriminator"](torch.cat([real + jitter, networks["generator"](noise).detach()]))
        wanted = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
        losses = F.binary_cross_entropy_with_logits(judged, wanted, reduction="none").squeeze(1)
        return losses[: len(real)] + losses[len(real) :]

    def generator_loss(self, networks, batch):
        judged = networks["discriminator"](networks["generator"](batch[1]))
        return F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged), reduction="none").squeeze(1)

    def score(self, networks, batch):
        return {"realness": torch.sigmoid(networks["discriminator"](networks["generator"](batch[1]))).squeeze(1)}

    def snapshot(self, networks, data):
        return {"weight": networks["generator"][0].weight}

    def suffer(self, numbers):
        """Writes down which examples these are, and does what FAULT says."""
        process.calls = getattr(process, "calls", 0) + 1
        rank = int(os.environ.get("RANK", 0))
        if "SEEN" in os.environ:
            with Path(f"{os.environ['SEEN']}-{rank}").open("a") as file:
                file.write(" ".join(map(str, numbers.tolist())) + "\n")
        at_rank, at_call, what = os.environ.get("FAULT", "-1 0 none").split()
        if rank == int(at_rank) and process.calls == int(at_call):
            once = os.environ.get("FAULT_ONCE")
            if once and Path(once).exists():
                return
            if once:
                Path(once).touch()
            if what == "raise":
                raise ValueError("the disk with the pictures is gone")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[what])

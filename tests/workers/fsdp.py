"""Called by test_fsdp in 2 and 3 processes: trains the same recipes under DDP and split, and says what each held.

`fsdp.py:TinyGPT` is a recipe to be launched by train.py, too. In the environment, FAULT "RANK CALL kill" sends that
rank SIGKILL in the CALL-th loss that it computes.
"""

import json
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import nndist
from nndist.data import Data, Resident
from nndist.recipe import Recipe, load_recipe
from nndist.torch_internals import recorded_collectives

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from workers.parity import Sequences, TinyGAN  # noqa: E402

CharGPT = load_recipe(ROOT / "recipes/char_gpt.py")
process = threading.local()  # what is counted there belongs to the process: a resumed run starts without it


@dataclass(kw_only=True)
class TinyGPT(CharGPT):
    """char_gpt, so small and of such a width that no tensor can be split evenly over 2 or 3 processes; in float64."""

    batch_size: int = 7
    num_layers: int = 3
    num_heads: int = 1
    width: int = 5
    context: int = 8
    warmup_steps: int = 2
    clip_norm: float | None = 0.5
    evaluate_every: str = "5 steps"
    kind: str = "AdamW"
    """The optimizer."""
    double: bool = True
    """In float64."""

    def networks(self):
        network = super().networks()["model"]
        return {"model": network.double() if self.double else network}

    def optimizer(self, name, network):
        if self.kind == "AdamW":
            return super().optimizer(name, network)
        options = {"SGD": {"momentum": 0.9}}.get(self.kind, {})
        return getattr(torch.optim, self.kind)(network.parameters(), lr=self.lr, **options)

    def loss(self, networks, batch):
        process.calls = getattr(process, "calls", 0) + 1
        rank, call, _ = os.environ.get("FAULT", "-1 0 kill").split()
        if int(os.environ.get("RANK", 0)) == int(rank) and process.calls == int(call):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(networks, batch)


@dataclass(kw_only=True)
class Tied(Recipe):
    """Blocks of which two share a matrix, and a head that shares one with a third."""

    epochs: int = 1
    batch_size: int = 20
    lr: float = 0.1

    def data(self, config):
        x = torch.rand(101, 6, generator=torch.Generator().manual_seed(0)).double()
        return Data(train=Resident(x), test=Resident(x[:30]))

    def networks(self):
        return {"model": TiedNetwork().double()}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr, momentum=0.9)

    def loss(self, networks, batch):
        return F.mse_loss(networks["model"](batch[0]), batch[0].flip(1), reduction="none")


@dataclass(kw_only=True)
class Matrices(Tied):
    """Blocks of matrices alone, as Muon takes them, of which none can be split evenly; the last ones are frozen."""

    def networks(self):
        network = nn.Sequential(*(nn.Linear(6, 7, bias=False), nn.Tanh(), nn.Linear(7, 6, bias=False)) * 2)
        network[-1].weight.requires_grad_(False)
        return {"model": network.double()}

    def optimizer(self, name, network):
        optimizer = torch.optim.Muon(network.parameters(), lr=self.lr)
        self.schedule_ = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return optimizer


class TiedNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.head = nn.Linear(6, 6)
        self.blocks[1].weight = self.blocks[3].weight
        self.head.weight = self.blocks[0].weight

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def sent_since(number: int) -> tuple[set[tuple[str, str]], int]:
    """(collective, dtype) of what was recorded from that number on, and the next number."""
    entries = recorded_collectives().get("gloo", {}).get("entries", [])
    found = {(e["profiling_name"], dtype) for e in entries if e["record_id"] >= number for dtype in e["input_dtypes"]}
    return found, 1 + max((entry["record_id"] for entry in entries), default=-1)


OPTIMIZERS = ("SGD", "Adam", "Adafactor")
MORE_OPTIMIZERS = ("RMSprop", "Adagrad", "Adadelta", "NAdam", "Adamax")


def main(folder: str, only_more_optimizers: str = "") -> None:
    folder = Path(folder)
    text = folder / "text.txt"
    if int(os.environ["RANK"]) == 0:
        text.write_text("".join(chr(97 + (n * n + n // 7) % 23) for n in range(900)))
    rank = int(os.environ["RANK"])
    outcomes = {}

    def run(name, recipe, *, only_sharded=(), **settings):
        for shard in ("none", "fsdp"):
            _, before = sent_since(0)
            common = {"progress": False, "runs_dir": folder, "timeout_seconds": 60, "figures": False, "log_every": 1}
            common |= {"report": False, "keep": 9, "threads": 1}
            common |= settings | (dict(only_sharded) if shard == "fsdp" else {})
            result = nndist.train(recipe, run=f"{name}-{shard}", shard=shard, **common)
            parameters = [p for network in result.networks.values() for p in network.parameters()]
            outcomes[f"{name}-{shard}"] = {
                "history": result.history.records,
                "scores": result.scores,
                "best": result.best,
                "kinds": sorted({type(p).__name__ for p in parameters}),
                "held": sum(getattr(p, "_local_tensor", p).numel() for p in parameters),
                "whole": sum(p.numel() for p in parameters),
                "sent": sorted(sent_since(before)[0]),
            }

    def write():
        (folder / f"outcomes-{rank}.json").write_text(json.dumps(outcomes, default=str))

    gpt = {"text": text, "dropout": 0.1}
    if only_more_optimizers:
        for kind in MORE_OPTIMIZERS:
            run(kind, TinyGPT(**gpt, kind=kind), max_steps=5)
        return write()
    # an epoch is 14 batches of 7 windows and one of 3, of which some processes have no micro-batch, or none at all
    run("plain", TinyGPT(**gpt), max_steps=16)
    run("accumulated", TinyGPT(**gpt, ema_decay=0.9, best="test/loss", best_is="lowest"), accumulate=3, max_steps=16)
    run("last1", TinyGPT(text=text, batch_size=50, clip_norm=None), eval_batch_size=2)
    run("recomputed", TinyGPT(**gpt), checkpoint_activations=True, max_steps=16)
    run("tied", Tied())
    run("gan", TinyGAN(), max_steps=12)
    run("sequences", Sequences(), accumulate=2)
    run("short", TinyGPT(**gpt), max_steps=5)
    run("bf16", TinyGPT(**gpt), max_steps=5, gradient_compression="bf16")
    if torch.distributed.get_world_size() == 3:
        for kind in OPTIMIZERS:
            run(kind, TinyGPT(**gpt, kind=kind), max_steps=5)
        for until in (2, 4):  # and resumed
            run("Muon", Matrices(), max_steps=until)
        run("exact", TinyGPT(**gpt, double=False), max_steps=5)
        gathered = {"weight_compression": "bf16"}
        run("mixed", TinyGPT(**gpt, double=False), max_steps=5, precision="bf16", only_sharded=gathered)
    write()

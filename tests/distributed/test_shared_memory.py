"""Sums over the processes of one machine: the right bits on each, and an end where one of them ends or hangs."""

import platform
import time
from pathlib import Path

import pytest
import torch
from launching import Forked, Processes
from safetensors.torch import load_file
from workers import host_sums

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="shares memory on Linux and x86-64 only"
)


def start(folder, world_size, what):
    """The processes."""
    return [
        Forked(host_sums.main, folder, rank, world_size, what, output=folder / f"output-{rank}")
        for rank in range(world_size)
    ]


def left_over(processes):
    """Files in memory of these processes."""
    return [path for p in processes for path in Path("/dev/shm").glob(f"nndist-{p.process.pid}-*")]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "what",
    ["sums", "sizes", "sizes grow", "sizes at first", "too large", "no room", "no room for one", "another machine"],
)
def test_all_processes_have_the_sum_or_none(tmp_path, world_size, what):
    processes = start(tmp_path, world_size, what)
    for process in processes:
        code, said = process.wait()
        assert code == 0, said
    assert not left_over(processes)


@pytest.mark.parametrize(
    "what, words",
    [
        ("killed", "Connection closed by peer"),
        ("killed before it grows", "Connection closed by peer"),
        ("stopped", "Timed out after 3 s"),
    ],
)
def test_a_process_that_ends_or_hangs_is_not_waited_for(tmp_path, what, words):
    processes = start(tmp_path, 3, what)
    began = time.monotonic()
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() - began < 60
            time.sleep(0.01)
        began = time.monotonic()
        for rank in (0, 2):
            code, said = processes[rank].wait()
            assert code == 1 and f"RuntimeError: {words}" in said and "process 1" in said
        assert time.monotonic() - began < 20
        assert not left_over(processes)
    finally:
        processes[1].process.kill()


BRANCHES = '''
from dataclasses import dataclass
import torch
from torch import nn
from nndist.data import Data, Resident
from nndist.recipe import Recipe

class Branches(nn.Module):
    """Two branches of one size, of which a batch takes the one that its first number says, and one that none takes."""
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

    def forward(self, x):
        return self.branches[int(x[0, 0] > 0)](x)

@dataclass(kw_only=True)
class Branched(Recipe):
    """Trained on examples that take turns between the branches."""
    epochs: int = 2
    batch_size: int = 6
    lr: float = 0.1
    shuffle: bool = False

    def data(self, config):
        x = torch.randn(36, 4, dtype=torch.float64)
        x[:, 0] = (torch.arange(36) // 2 % 3 == 0).double() * 2 - 1
        set = Resident(x, x.sum(1, keepdim=True))
        return Data(set, set)

    def networks(self):
        return {"model": Branches().double()}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr, momentum=0.9, weight_decay=0.1)

    def loss(self, networks, batch):
        return (networks["model"](batch[0]) - batch[1]).square().squeeze(1)
'''


def test_parameters_that_only_some_processes_use(tmp_path):
    """As with micro-batches of the same examples on one process: others get no gradient, and no weight decay."""
    recipe = tmp_path / "branched.py"
    recipe.write_text(BRANCHES)
    flags = ["--runs-dir", tmp_path, "--no-progress", "--no-figures", "--threads", 1]
    found = {}
    for world_size, accumulate in ((1, 3), (3, 1)):
        run = f"on{world_size}"
        launched = Processes(world_size, [recipe, *flags, "--run", run, "--accumulate", accumulate], folder=tmp_path)
        assert not any(launched.wait()), launched.said()
        (path,) = tmp_path.glob(f"branched/{run}/checkpoints/step-*/model.safetensors")
        found[world_size] = load_file(path)
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[3][name], tensor, rtol=1e-12, atol=1e-12)

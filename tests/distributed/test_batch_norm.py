"""BatchNorm over all processes: each module stays what the recipe made, and so do its copies."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nndist.distributed import batch_norm
from nndist.distributed.batch_norm import Sums, is_global, with_global_batch_norm


class Momentum(nn.BatchNorm1d):
    def __init__(self, width):
        super().__init__(width, momentum=0.5)


class Rectified(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.fixture
def passes(monkeypatch):
    """The numbers of rows in the passes that took statistics over all processes, of which there is one."""
    rows = []

    def normalised(module, x):
        rows.append(len(x))
        return whole(module, x)

    whole = batch_norm._normalised
    monkeypatch.setattr(batch_norm, "_normalised", normalised)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(Sums, "all_reduce", Sums.all_reduce)
    return rows


def over_processes(*layers, on_cpu=True):
    network = nn.Sequential(*layers).double()
    with_global_batch_norm(network, lambda tensor: tensor, on_cpu=on_cpu)
    return network


def test_modules_keep_their_class_and_names(passes):
    network = over_processes(nn.BatchNorm1d(3), Momentum(3), Rectified(3), nn.SyncBatchNorm(3))
    assert [type(layer) for layer in network] == [nn.BatchNorm1d, Momentum, Rectified, nn.SyncBatchNorm]
    assert [is_global(layer) for layer in network] == [True, True, False, True], "one has a forward pass of its own"
    assert not any("forward" in vars(layer) for layer in network)
    network(torch.randn(5, 3).double())
    assert passes == [5, 5, 5]
    assert not is_global(over_processes(nn.SyncBatchNorm(3), on_cpu=False)[0]), "torch's own does so on GPUs"


def test_copies_change_their_own_statistics(passes):
    network = over_processes(nn.BatchNorm1d(3))
    plain = nn.BatchNorm1d(3).double()
    teacher, x = copy.deepcopy(network), torch.randn(5, 3).double()
    torch.testing.assert_close(teacher(x), plain(x))
    torch.testing.assert_close(teacher[0].running_var, plain.running_var)
    assert passes == [5] and network[0].num_batches_tracked == 0


def test_other_batch_norms_and_evaluations_are_torchs(passes):
    network = over_processes(nn.BatchNorm1d(3)).eval()
    network(torch.randn(5, 3).double())
    nn.BatchNorm1d(3)(torch.randn(5, 3))
    assert passes == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*torch.jit.script:FutureWarning")
def test_torchscript_reads_the_plain_forward_pass(passes):
    """Also of the networks that a recipe makes after those of a training."""
    over_processes(nn.BatchNorm1d(3))
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3)))
    assert scripted(torch.randn(5, 3)).shape == (5, 3) and passes == []

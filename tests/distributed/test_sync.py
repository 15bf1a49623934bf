"""What several processes add up in each step: buffers that the network's code changes are told beforehand."""

import torch

from nndist.distributed.sync import BufferSync


class Written(torch.nn.Module):
    """Buffers that its code changes, in each of the ways that people write, and some that it only reads."""

    def __init__(self):
        super().__init__()
        for name in ("bound", "in_place", "by_data", "element", "part", "added", "read", "looked_up"):
            self.register_buffer(name, torch.zeros(3))
        self.norm = torch.nn.InstanceNorm1d(3, track_running_stats=True)
        self.untracked = torch.nn.InstanceNorm1d(3)

    def forward(self, x):
        self.bound = 0.9 * self.bound + x
        self.in_place.mul_(0.9).add_(x)
        self.by_data.data.lerp_(x, 0.1)
        self.element[0] = x.sum()
        self.part[:2] = x[:2]
        self.added += x
        seen = {"read": self.read * 2}
        seen["again"] = self.read
        x = x + self.looked_up[0]
        return x.add_(1)


class Two:  # processes
    world_size = 2


def test_a_buffer_that_holds_nan_has_not_changed_until_it_does():
    network = torch.nn.Module()
    network.register_buffer("table", torch.tensor([1.0, float("nan")]))
    sync = BufferSync({"model": network}, Two())
    assert not sync._has_changed("model.table", network.table)
    network.table[0] = 2
    assert sync._has_changed("model.table", network.table)


def test_buffers_that_code_changes_are_told_before_the_first_step():
    expected = BufferSync({"model": Written()}, Two()).expected
    names = ["bound", "in_place", "by_data", "element", "part", "added"]
    # an InstanceNorm as it comes has none
    names += ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert expected == [f"model.{name}" for name in names]

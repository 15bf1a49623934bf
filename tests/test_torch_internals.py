"""torch has what nndist uses of it unpublished: on a release that lacks some of it, this says what to look at."""

import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launching import Forked
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

from nndist import torch_internals
from nndist.torch_internals import (
    OF_OPTIMIZERS,
    SEEN_ON,
    hooks_of,
    non_persistent_buffers,
    plain_step,
    unaveraged_cross_entropies,
)

RELEASE = ".".join(torch.__version__.split(".")[:2])


def test_this_release_of_torch_is_one_that_was_looked_at():
    assert RELEASE in SEEN_ON, f"torch {RELEASE}: let the tests of this file pass on it, then add it to SEEN_ON"


def hook(*_):
    """Does nothing."""


REGISTERED = {
    "of a parameter": lambda module, optimizer: (module.weight, module.weight.register_hook(hook)),
    "of a parameter, later": lambda m, o: (m.weight, m.weight.register_post_accumulate_grad_hook(hook)),
    "forward": lambda module, optimizer: (module, module.register_forward_hook(hook)),
    "before forward": lambda module, optimizer: (module, module.register_forward_pre_hook(hook)),
    "backward": lambda module, optimizer: (module, module.register_full_backward_hook(hook)),
    "before backward": lambda module, optimizer: (module, module.register_full_backward_pre_hook(hook)),
    "before a step": lambda module, optimizer: (optimizer, optimizer.register_step_pre_hook(hook)),
    "after a step": lambda module, optimizer: (optimizer, optimizer.register_step_post_hook(hook)),
}


@pytest.mark.parametrize("kind", REGISTERED)
def test_every_hook_is_seen(kind):
    module = nn.Linear(1, 1)
    owner, handle = REGISTERED[kind](module, torch.optim.SGD(module.parameters(), lr=0.1))
    assert [function for hooks in hooks_of(owner).values() for function in hooks.values()] == [hook]
    handle.remove()
    assert not any(hooks_of(owner).values())


def test_buffers_that_no_state_holds_are_told():
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert non_persistent_buffers(module) == {"scratch"}


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_hooks_of_all_optimizers_are_called(register):
    called = []
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(1)
    handle = register(lambda *_: called.append(1))
    plain_step(optimizer)
    handle.remove()
    plain_step(optimizer)
    assert called == [1]
    torch.testing.assert_close(parameter.detach(), torch.tensor([0.8]))


def test_what_makes_steps_cheap_is_there():
    """Without it training is right, and slower."""
    assert torch_internals._run_backward is not None
    assert torch_internals._within(torch.optim.SGD) is not None
    assert not any(torch_internals._global_hooks())


def one_process_sums(folder):
    torch_internals.record_collectives()
    assert torch_internals.recorded_collectives() == {}, "nothing yet"
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
    for size in (3, 5):
        dist.all_reduce(torch.ones(size))
    deadline = time.monotonic() + 30
    while True:  # an entry is retired by a thread, a little after the sum has returned
        (recorded,) = torch_internals.recorded_collectives().values()
        if all(entry["retired"] for entry in recorded["entries"]) or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    assert [entry["input_sizes"] for entry in recorded["entries"]] == [[[3]], [[5]]]
    assert all(entry["profiling_name"] == "gloo:all_reduce" and entry["retired"] for entry in recorded["entries"])
    print(os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"], "kept", flush=True)
    os._exit(0)


def test_cross_entropies_are_read_from_what_autograd_keeps():
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, -100, 2])
    found = [*unaveraged_cross_entropies(F.cross_entropy(logits, labels, torch.ones(3), reduction="none"))]
    assert found == [(True, -100)]
    in_parts = torch.stack([F.cross_entropy(logits, labels, reduction="none"), logits.sum(1)]).sum(0)
    assert [*unaveraged_cross_entropies(in_parts)] == [(False, -100)]
    for reduction in ("mean", "sum"):
        assert not [*unaveraged_cross_entropies(F.cross_entropy(logits, labels, reduction=reduction))]


def test_what_a_checkpoint_computes_again_is_left_alone():
    logits, labels, calls = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, -100, 2]), []

    def loss(logits):
        calls.append(1)
        return F.cross_entropy(logits, labels, reduction="none")

    assert not [*unaveraged_cross_entropies(checkpoint(loss, logits, use_reentrant=False))] and len(calls) == 1


def test_the_last_collectives_are_kept_as_json(tmp_path):
    code, said = Forked(one_process_sums, tmp_path, output=tmp_path / "said.txt").wait()
    assert code == 0 and said.strip() == "0 kept", said


def test_a_release_without_the_recorder_has_nothing_to_say(monkeypatch):
    import torch._C._distributed_c10d as internals

    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        monkeypatch.delattr(internals, name, raising=False)
    assert torch_internals.recorded_collectives() == {}


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Rprop", "ASGD", "NAdam", "Adafactor"])
def test_torchs_optimizers_have_no_attributes_but_those_known(kind):
    optimizer = getattr(torch.optim, kind)([torch.nn.Parameter(torch.ones(1))])
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    optimizer.step()
    assert vars(optimizer).keys() - {"step"} <= OF_OPTIMIZERS | {"param_groups", "state", "defaults"}

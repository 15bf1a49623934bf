"""torch has what nndist uses of it unpublished: on a release that lacks some of it, this says what to look at."""

import pytest
import torch
from torch import nn

from nndist.torch_internals import SEEN_ON, hooks_of, non_persistent_buffers

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

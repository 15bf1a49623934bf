"""Values of an optimizer's state and groups come back from a checkpoint's JSON and tensors as they were."""

import collections
import enum
import json
import math

import numpy
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from nndist.errors import UserError
from nndist.runs import optimizer_state

Pair = collections.namedtuple("Pair", "a b")


class Number(enum.IntEnum):
    ONE = 1


class Word(enum.StrEnum):
    ONE = "one"


VALUES = {
    "none": None,
    "named tuple": Pair(1, [2.0]),
    "defaultdict": collections.defaultdict(int, a=1),
    "nested defaultdict": {"counts": collections.defaultdict(list)},
    "size": torch.Size([2, 3]),
    "int enum": Number.ONE,
    "str enum": Word.ONE,
    "enum in a list": [Word.ONE],
    "one number": torch.ones(1),
    "one number of 2 dimensions": torch.ones(1, 1),
    "bf16": torch.full((1,), 0.1, dtype=torch.bfloat16),
    "infinite tensor": torch.tensor(math.inf),
    "complex tensor": torch.zeros(1, dtype=torch.complex64),
    "a leaf": torch.ones(2, requires_grad=True),
    "infinite tuple": (0.1, math.inf),
    "tuple": (0.9, 0.99),
    "NumPy's numbers": (numpy.float64(0.1), 1),
    "NumPy's number": numpy.float64(0.1),
    "infinity": -math.inf,
    "large": 2**70,
}
REFUSED = {
    "Tensor (complex128)": torch.zeros(2, dtype=torch.complex128),
    "Tensor (sparse_coo)": torch.eye(3).to_sparse(),
    "defaultdict of a function of your own": {"a": [collections.defaultdict(lambda: 1)]},
    "Linear": {"a": nn.Linear(2, 2)},
    "Local": collections.namedtuple("Local", "a")(1),  # no name of a module's
}


def made():
    network = nn.Linear(2, 2)
    return network, torch.optim.SGD(network.parameters(), lr=0.1)


def saved(network, optimizer):
    tensors, rest = optimizer_state.optimizer_state({"model": optimizer}, {"model": network})
    return load(save({key: tensor.detach().clone() for key, tensor in tensors.items()})), json.loads(
        json.dumps(rest, allow_nan=False)
    )


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, other.requires_grad)
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("where", ["state", "group"])
@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_as_it_was(where, name):
    def holder(network, optimizer):
        return optimizer.state[network.weight] if where == "state" else optimizer.param_groups[0]

    first, again = made(), made()
    holder(*first)["value"] = VALUES[name]
    optimizer_state.load_optimizers({"model": again[1]}, {"model": again[0]}, *saved(*first))
    assert_same(VALUES[name], holder(*again)["value"])


@pytest.mark.parametrize("is_first", [True, False])
def test_state_of_the_whole_network_comes_back_beside_that_of_parameters(is_first):
    first, again = made(), made()
    for parameter in first[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {"mean": torch.arange(3.0)}
    if is_first:
        first[1].state["all"] = state
    first[1].param_groups[0]["momentum"] = 0.9
    first[1].step()
    first[1].state["all"] = state
    optimizer_state.load_optimizers({"model": again[1]}, {"model": again[0]}, *saved(*first))
    assert torch.equal(again[1].state["all"]["mean"], state["mean"])
    assert torch.equal(again[1].state[again[0].bias]["momentum_buffer"], torch.ones(2))


@pytest.mark.parametrize("where", ["state", "group", "string"])
@pytest.mark.parametrize("named", REFUSED)
def test_what_cannot_be_saved_is_named(where, named):
    network, optimizer = made()
    holders = {"state": optimizer.state[network.weight], "group": optimizer.param_groups[0], "string": {}}
    holders[where]["value"] = REFUSED[named]
    optimizer.state["all"] = holders["string"]
    with pytest.raises(UserError, match="its state holds a") as caught:
        saved(network, optimizer)
    assert f"its state holds a {named}, which" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [torch.zeros(1), object(), nn.Linear(1, 1)])
def test_a_key_that_cannot_be_saved_is_named(key):
    network, optimizer = made()
    optimizer.state[key] = {"a": 1}
    with pytest.raises(UserError, match=f"a {type(key).__name__} as a key, which can't be saved"):
        saved(network, optimizer)


def test_a_state_that_is_no_dict_is_named():
    network, optimizer = made()
    optimizer.state[network.weight] = torch.zeros(2)
    with pytest.raises(UserError, match="a parameter whose state is no dict"):
        saved(network, optimizer)


def test_keys_come_back_as_they_were():
    first, again = made(), made()
    keys = {0: 1.0, "0": 2.0, "a/b": torch.ones(2), ("a", 0): [torch.zeros(1)], "a|b": 3.0, None: 4, Number.ONE: 5}
    first[1].state[first[0].weight].update(keys)
    optimizer_state.load_optimizers({"model": again[1]}, {"model": again[0]}, *saved(*first))
    state = again[1].state[again[0].weight]
    assert {(type(key), key) for key in state} == {(type(key), key) for key in keys}
    for key, value in keys.items():
        assert_same(value, state[key])


def test_a_tensor_of_the_start_is_written_to_and_a_later_one_is_not():
    """The recipe may hold the one that was there at the start."""
    states = []
    for _ in range(2):
        network, optimizer = made()
        rate, scale = torch.tensor(0.5), torch.tensor([0.5])
        optimizer.param_groups[0].update(lr=rate, scale=scale)
        optimizer_state.begin({"model": optimizer}, {"model": network})
        states.append((network, optimizer, rate, scale))
    network, optimizer, rate, _ = states[0]
    rate.fill_(0.25)
    optimizer.param_groups[0]["scale"] = torch.tensor([0.75])
    tensors = saved(network, optimizer)
    network, optimizer, rate, scale = states[1]
    optimizer_state.load_optimizers({"model": optimizer}, {"model": network}, *tensors)
    assert optimizer.param_groups[0]["lr"] is rate and rate == 0.25
    assert optimizer.param_groups[0]["scale"] == 0.75 and scale == 0.5


def test_a_checkpoint_of_an_earlier_version_is_read():
    network, optimizer = made()
    rest = {
        "class": "SGD",
        "groups": [
            {
                "params": ["weight", "bias"],
                "lr": {"tensor": 0.5, "dtype": "float32"},
                "betas": [0.9, 0.99],
                "scale": {"nested": {"tensor": "0", "device": "cpu", "requires_grad": False}, "at": "group 0/scale"},
            }
        ],
        "values": {"model/weight/0": 3, "model/weight/list": {"nested": {"list": [1]}, "at": "0/list"}},
        "others": [["all", {"dict": [["t", 1]]}]],
    }
    tensors = {"model/weight/m": torch.ones(2, 2), "nested/model/group 0/scale/0": torch.ones(2)}
    optimizer_state.load_optimizers({"model": optimizer}, {"model": network}, tensors, {"model": rest})
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.5 and group["betas"] == (0.9, 0.99) and torch.equal(group["scale"], torch.ones(2))
    state = optimizer.state[network.weight]
    assert torch.equal(state.pop("m"), torch.ones(2, 2)) and state == {"0": 3, "list": [1]}
    assert optimizer.state["all"] == {"t": 1}

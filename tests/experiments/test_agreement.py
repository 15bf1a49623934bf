"""Whether two runs agree up to rounding."""

import math
from types import SimpleNamespace

import torch

from nndist.experiments.agreement import relative_difference


def saved(**tensors):
    return SimpleNamespace(
        tensors={"model.safetensors": {name: torch.tensor(value) for name, value in tensors.items()}}
    )


def test_the_largest_relative_difference_of_any_tensor():
    assert relative_difference(saved(a=[2.0], b=[4.0, 1.0]), saved(a=[2.0], b=[4.0, 3.0])) == 0.5


def test_a_nan_in_any_tensor_is_a_difference():
    for tensors in ({"a": [1.0], "b": [math.nan]}, {"a": [math.nan], "b": [1.0]}):
        assert math.isnan(relative_difference(saved(a=[1.0], b=[1.0]), saved(**tensors)))

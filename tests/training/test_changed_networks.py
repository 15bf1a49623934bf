"""Networks that gain, replace or enlarge tensors while they train: saved and resumed, or refused by name."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from launching import Processes
from safetensors.torch import load_file
from torch import nn
from toys import Line

import nndist
from nndist.errors import UserError

QUIET = {"progress": False, "figures": False, "report": False, "threads": 1, "wandb": "off", "run": "it"}


class Dropped(nn.Module):
    """A layer whose weight is a dropped copy of another parameter, as AWD-LSTM has it."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(4, 1), how
        weight = self.layer.weight
        if how == "set":
            del self.layer._parameters["weight"]
            self.layer.weight = weight.data.clone()
        self.raw = nn.Parameter(weight.data)

    def forward(self, x):
        if self.how == "set":
            self.layer.weight = F.dropout(self.raw, 0.0, self.training)  # without dropout the parameter itself
        elif self.how == "replaced":
            self.layer._parameters["weight"] = F.dropout(self.raw, 0.5, self.training)
        elif not hasattr(self, "gained"):
            self.gained = nn.Parameter(torch.ones(1))
        return self.layer(x)


@dataclass(kw_only=True)
class Averaged(Line):
    how: str = "set"
    epochs: int = 2

    def networks(self):
        return {"model": Dropped(self.how)}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)


def test_a_second_name_of_a_parameter_is_left_out_of_checkpoints(tmp_path, capsys):
    whole = nndist.train(Averaged(), runs_dir=tmp_path / "whole", **QUIET)
    nndist.train(Averaged(), runs_dir=tmp_path / "halves", max_steps=5, **QUIET)
    resumed = nndist.train(Averaged(), runs_dir=tmp_path / "halves", **QUIET)
    assert "layer.weight" not in capsys.readouterr().out
    raw = whole.networks["model"].raw
    assert torch.equal(raw, resumed.networks["model"].raw)
    (saved,) = resumed.folder.glob(f"checkpoints/step-{resumed.steps:08d}/model.safetensors")
    assert load_file(saved).keys() == {"layer.bias", "raw"}


@pytest.mark.parametrize(
    "how, said",
    [
        ("replaced", r"model\.layer\.weight: the network replaces this parameter while it trains"),
        ("gained", r"model\.gained: the network has gained this parameter while it trains"),
    ],
)
def test_what_a_network_gains_or_replaces_is_named_in_the_first_step(tmp_path, how, said):
    with pytest.raises(UserError, match=said):
        nndist.train(Averaged(how=how), runs_dir=tmp_path, max_steps=1, **QUIET)


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("places", torch.zeros(1), persistent=False)

    def forward(self, x):
        if self.training:
            length = 2 + torch.distributed.get_rank()
            self.register_buffer("places", torch.arange(length) / 1.0, persistent=False)
        return self.layer(x)


@dataclass(kw_only=True)
class Grown(Line):
    def networks(self):
        return {"model": Growing()}


class Seen(nn.Module):
    """Keeps one number of every batch, as an analysis of activations does, outside the weights of checkpoints."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("means", torch.zeros(0), persistent=False)

    def forward(self, x):
        if self.training:
            self.means = torch.cat([self.means, x.mean().detach()[None]])
        return self.layer(x) + self.means.mean()


@dataclass(kw_only=True)
class Watched(Line):
    def networks(self):
        return {"model": Seen()}


def test_a_buffer_that_grows_outside_the_weights_is_resumed(tmp_path, capsys):
    whole = nndist.train(Watched(), runs_dir=tmp_path / "whole", max_steps=9, **QUIET)
    nndist.train(Watched(), runs_dir=tmp_path / "halves", max_steps=5, **QUIET)
    resumed = nndist.train(Watched(), runs_dir=tmp_path / "halves", max_steps=9, **QUIET)
    assert "pickle" not in capsys.readouterr().out
    one, other = whole.networks["model"], resumed.networks["model"]
    assert torch.equal(one.layer.weight, other.layer.weight)
    assert torch.equal(one.means, other.means) and len(one.means) == 9


def test_a_buffer_of_another_length_on_each_process_is_named(tmp_path):
    flags = ["--runs-dir", tmp_path, "--no-figures", "--no-report", "--no-progress", "--threads", 1, "--max-steps", 1]
    launched = Processes(2, [f"{__file__}:Grown", *flags], folder=tmp_path)
    assert 2 in launched.wait()
    (line,) = [line for line in launched.said().splitlines() if line.startswith("error:")]
    assert "model.places: this buffer has another shape on each process" in line

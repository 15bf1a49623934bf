"""The repeated blocks of a network, and what recomputing them changes: memory and time, no bit."""

import pytest
import torch
from launching import ROOT
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from workers.fsdp import CharGPT, TiedNetwork

import nndist
from nndist.distributed import blocks
from nndist.distributed.blocks import recompute_activations, repeated_blocks
from nndist.errors import UserError


def names(network):
    found = {id(block) for block in repeated_blocks(network)}
    return [name for name, module in network.named_modules() if id(module) in found]


class Nested(nn.Module):
    """An encoder within a module, whose blocks have stacks of their own."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.LayerNorm(3))


def test_which_blocks_are_repeated():
    assert names(Nested()) == ["encoder.layers.0", "encoder.layers.1"], "the outermost only, and nothing that is alone"
    assert names(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())) == ["0", "2"]
    once = nn.Linear(2, 2)
    assert names(nn.ModuleList([once, once])) == [], "one block that is used twice"
    assert names(nn.Linear(2, 2)) == []


def test_blocks_that_share_parameters_belong_to_the_rest():
    assert names(TiedNetwork()) == ["blocks.2", "blocks.4"]


@pytest.fixture
def quietly(tmp_path, capsys):
    def train(recipe, **settings):
        common = {"runs_dir": tmp_path, "progress": False, "figures": False, "report": False, "threads": 1}
        return nndist.train(recipe, max_steps=6, log_every=1, **common, **settings)

    return train


SMALL = {"num_layers": 2, "num_heads": 2, "width": 16, "context": 16, "dropout": 0.2, "clip_norm": 1.0}


def test_recomputing_changes_no_bit_and_keeps_less(quietly, monkeypatch):
    calls = []

    def counted(forward, *arguments, **named):
        calls.append(forward)
        return torch_checkpoint(forward, *arguments, **named)

    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", counted)
    plain = quietly(CharGPT(**SMALL))
    assert not calls
    recomputed = quietly(CharGPT(**SMALL), checkpoint_activations=True)
    assert len(calls) == 6 * 2, "each block at each step, not in evaluations"
    theirs = plain.networks["model"].state_dict()
    ours = recomputed.networks["model"].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert plain.scores == recomputed.scores


def kept_bytes(network, symbols):
    """The memory of what the forward pass keeps for the backward pass, each storage once; without the parameters."""
    kept = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(symbols).sum()
    del loss
    return sum(kept.values())


def test_less_is_kept_for_the_backward_pass():
    recipe = CharGPT(num_layers=8, num_heads=4, width=64, context=64)
    symbols = torch.randint(20, (4, 64), generator=torch.Generator().manual_seed(0))
    whole, recomputed = recipe.networks()["model"], recipe.networks()["model"]
    assert recompute_activations(recomputed) == 8
    # within a block about 20 tensors as large as its input are kept, of a recomputed one the input
    assert kept_bytes(recomputed, symbols) < kept_bytes(whole, symbols) / 5


@pytest.mark.parametrize(
    "recipe, reason", [("mnist_mlp", "no stack of repeated blocks"), ("imagenet_resnet", "BatchNorm")]
)
def test_what_cannot_be_recomputed_is_refused(quietly, recipe, reason):
    kind = nndist.recipe.loading.load_recipe(ROOT / f"recipes/{recipe}.py")
    with pytest.raises(UserError, match=f"--checkpoint-activations: .*{reason}.*leave the flag out"):
        quietly(kind(), checkpoint_activations=True, data_source="sample")


def test_the_local_part_of_an_unsharded_tensor_is_all_of_it():
    tensor = torch.ones(3)
    assert blocks.local(tensor) is tensor and blocks.whole_tensor(tensor) is tensor
    assert not blocks.is_sharded(nn.Linear(1, 1))

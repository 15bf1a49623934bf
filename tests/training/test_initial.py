"""`--init-from`: every kind of file, names matched, what was not said; nothing executed; not read again afterwards."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from launching import Processes
from safetensors.torch import load_file, save_file
from workers import tuned
from workers.tuned import Tuned, train

import nndist
from nndist.errors import UserError
from nndist.runs.weights import Source, read_weights
from nndist.training.initial import put


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("start"), "start", {"epochs": 1}).folder


@pytest.fixture(scope="module")
def state(run):
    return load_file(run / "checkpoints/step-00000006/model.safetensors")


WRITE = """
import os, sys, torch
from safetensors.torch import load_file

class Evil:
    def __reduce__(self):
        return os.mkdir, (f"{sys.argv[1]}/ran",)

state = load_file(sys.argv[2])
os.chdir(sys.argv[1])
torch.save(state, "state.pt")
torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, "whole.ckpt")
torch.save({"weights": torch.zeros(2), "other": Evil()}, "evil.pt")
torch.save({"w": torch.zeros(1).expand(1 << 35)}, "large.pt")
torch.save({"epoch": 3}, "empty.pt")
torch.save({"a": torch.ones(3)}, "squeezenet1_1-b8a52dc0.pth")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory, run):
    """Files of torch.save, written in another process: this one refuses pickles."""
    folder = tmp_path_factory.mktemp("saved")
    weights = run / "checkpoints/step-00000006/model.safetensors"
    subprocess.run([sys.executable, "-c", WRITE, folder, weights], check=True)
    return folder


def same(tensors, state):
    return tensors.keys() == state.keys() and all(torch.equal(tensors[name], state[name]) for name in state)


def refused(place) -> str:
    with pytest.raises(UserError) as caught:
        read_weights(str(place), download=False)
    assert "\n" not in str(caught.value) and str(place) in str(caught.value)
    return str(caught.value)


def test_every_kind_of_file_and_folder(tmp_path, run, state, saved):
    plain = tmp_path / "plain.safetensors"
    save_file(state, plain)
    folder = tmp_path / "hub"
    folder.mkdir()
    names = sorted(state)
    for number, part in enumerate((names[:5], names[5:]), 1):
        save_file({name: state[name] for name in part}, folder / f"model-0000{number}-of-00002.safetensors")
    places = {name: f"model-0000{1 + (name in names[5:])}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for place in (plain, folder, run, run / "checkpoints/step-00000006", saved / "whole.ckpt"):
        assert same(read_weights(str(place), download=False).tensors, state), place


def test_a_run_gives_its_best_weights_and_their_average(tmp_path):
    folder = train(tmp_path, "best", {"best": "test/accuracy", "ema_decay": 0.9, "lr": 0.3}).folder
    best = nndist.load_run(folder).weights()
    found = read_weights(str(folder), download=False)
    assert same(found.tensors, best.networks["model"].state_dict()) and f"step {best.step}" in found.text


def test_a_file_that_would_run_code_is_refused(saved):
    assert "could run code as it is read" in refused(saved / "evil.pt") and not (saved / "ran").exists()


@pytest.mark.long
def test_what_is_none_of_torchs_or_would_take_all_memory_is_refused(saved, state):
    assert same(read_weights(str(saved / "state.pt"), download=False).tensors, state)
    line = refused(saved / "large.pt")  # 128 GiB from a small file
    assert "can't be written as safetensors" in line or "more memory than its size explains" in line
    (saved / "garbage.pth").write_bytes(b"garbage" * 100)
    assert "holds more than tensors and plain containers" in refused(saved / "garbage.pth")
    assert "holds no state_dict" in refused(saved / "empty.pt")


def test_what_is_not_there_or_damaged_is_one_line(tmp_path, run):
    assert "there is nothing there; give a safetensors file" in refused(tmp_path / "nowhere")
    assert "the folder holds no weights" in refused(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "checkpoints/step-00000006/model.safetensors").write_bytes(b"x")
    assert "damaged" in refused(copy / "checkpoints/step-00000006")
    (tmp_path / "half.safetensors").write_bytes(b"x" * 20)
    assert "can't be read" in refused(tmp_path / "half.safetensors")
    (tmp_path / "x.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    assert "names a file outside the folder" in refused(tmp_path)


@pytest.mark.long
def test_weights_of_torchvision_by_name(tmp_path, monkeypatch, saved):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    name = "SqueezeNet1_1_Weights.IMAGENET1K_V1"
    assert "can't be downloaded" in refused(name) and "squeezenet1_1-b8a52dc0.pth" in refused(name)
    shutil.copy(saved / "squeezenet1_1-b8a52dc0.pth", tmp_path / "hub/checkpoints")
    assert read_weights(name, download=False).tensors["a"].sum() == 3
    assert "torchvision has no weights of that name" in refused("ResNet18_Weights.NONE")


def test_names_are_matched_and_the_rest_is_said(state):
    theirs = {f"module.{name}": tensor for name, tensor in state.items() if name != "1.bias"}
    theirs |= {"module.3.weight": torch.zeros(9, 16), "module.aux.weight": torch.zeros(2), "step": torch.zeros(1)}
    networks = Tuned().networks()
    kept = networks["model"][3].weight.clone()
    initial = put(networks, Source(theirs, "a file"), "x.pt")
    assert torch.equal(networks["model"][1].weight, state["1.weight"]) and torch.equal(
        networks["model"][3].weight, kept
    )
    assert initial.missing == ["1.bias"] and initial.unexpected == ["aux.weight", "step"]
    lines = initial.note().splitlines()
    assert lines[0].startswith("--init-from x.pt: 8 of 10 tensors, ") and "without 'module.'" in lines[1]
    assert "3.weight [4, 16], there [9, 16]" in lines[2] and max(map(len, lines)) <= 100
    with pytest.raises(UserError, match=r"none of its 1 tensors fits .*; it has a \[7\], the recipe 0\.0\.weight"):
        put(Tuned().networks(), Source({"a": torch.zeros(7)}, "a file"), "x.pt")


def test_half_precision_and_a_prefix_of_ours(state):
    from torch import nn

    networks = {"model": nn.ModuleDict({"network": Tuned().networks()["model"]})}
    initial = put(networks, Source({name: t.half() for name, t in state.items()}, "a file"), "x")
    assert not initial.missing and initial.renamed == "with 'network.'"
    torch.testing.assert_close(networks["model"]["network"][1].weight, state["1.weight"].half().double())


def test_a_part_that_as_many_tensors_fit_as_another_is_named():
    encoder, decoder = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    tensors = {
        f"{part}.{name}": t
        for part, net in (("encoder", encoder), ("decoder", decoder))
        for name, t in net.state_dict().items()
    }
    initial = put({"model": torch.nn.Linear(2, 3)}, Source(tensors, "all"), "x.pt")
    assert initial.renamed.startswith("without ") and "(as many fit without 'encoder.'" in initial.renamed.replace(
        "decoder", "encoder"
    )
    one = put({"model": torch.nn.Linear(2, 3)}, Source({n: t for n, t in tensors.items() if "enc" in n}, "all"), "x.pt")
    assert one.renamed == "without 'encoder.'"


def test_units_are_those_of_the_recipes_own_data():
    from torch import nn

    from nndist import Scaled, Scaling

    def network(mean):
        return Scaled(nn.Linear(2, 1), inputs=Scaling(torch.full((2,), mean), torch.ones(2)))

    ours, theirs = network(5.0), network(9.0)
    initial = put({"model": ours}, Source(theirs.state_dict(), "a run"), "x")
    assert torch.equal(ours.network.weight, theirs.network.weight) and ours.inputs_mean[0] == 5.0
    assert initial.kept == ["inputs_mean", "inputs_std"] and not initial.missing


def test_it_is_not_read_again_by_a_resumed_run_or_a_prediction(tmp_path, run, state):
    place = tmp_path / "start.safetensors"
    save_file(state, place)
    fields = {"init_from": str(place), "classes_of_it": 3}
    train(tmp_path, "it", fields, max_steps=2)
    place.unlink()
    train(tmp_path, "it", fields, max_steps=4)
    about = json.loads((tmp_path / "tuned/it/run.json").read_text())
    assert about["initial_weights"]["other_shapes"][0].startswith("3.weight [3, 16], there [4, 16]")
    loaded = nndist.load_run(tmp_path / "tuned/it", recipe=Tuned)
    assert len(loaded.predict([1.0, 2.0, 3.0, 4.0])) == 1 or loaded.networks
    with pytest.raises(UserError, match="there is nothing there"):
        train(tmp_path, "another", fields, max_steps=2)


def test_an_error_is_one_on_three_processes(tmp_path):
    launched = Processes(3, [tmp_path, tmp_path / "nowhere"], folder=tmp_path, call=tuned.main)
    assert all(launched.wait(60)), "none of them goes on alone"
    assert "there is nothing there" in launched.said()

"""LoRA by peft, which needs nothing of the loop: exact on 1 and 2 processes, resumed, used. .ci/run has peft."""

import importlib.util
from functools import cache

import pytest
import torch
from launching import ROOT, Processes
from safetensors.torch import load_file
from workers.tuned import Tuned, train

import nndist
from nndist.runs.weights import Source
from nndist.training.initial import put

ADAPTED = ROOT / "tests/workers/adapted.py"
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="pip install peft; .ci/run does"),
]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return train(tmp_path_factory.mktemp("start"), "start", {"epochs": 1}).folder


@pytest.fixture(scope="module")
def adapt(start, tmp_path_factory):
    """A function that adapts the trained network in a new folder, killed where `fault` says, and returns the run."""

    @cache
    def adapted(world_size, fault=None):
        folder = tmp_path_factory.mktemp("adapted")
        flags = ["--init-from", start, "--runs-dir", folder, "--run", "it", "--save-every", "5 steps", "--threads", 1]
        flags += ["--no-progress", "--no-figures", "--no-report", "--wandb", "off", "--timeout-seconds", 60]
        for befalls in [fault, None] if fault else [None]:
            env = {"FAULT": befalls} if befalls else {}
            launched = Processes(world_size, [ADAPTED, *flags], folder=folder, env=env)
            assert any(launched.wait(300)) == bool(befalls), launched.said()
        return folder / "adapted/it"

    return adapted


def weights(run, file="model"):
    return load_file(run / f"checkpoints/step-00000024/{file}.safetensors")


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_it_ends_with_the_same_bits(adapt, start, world_size):
    whole, killed = adapt(world_size), adapt(world_size, f"{world_size - 1} 9 kill")
    for name in ("model", "ema", "optimizer", "random"):
        first, second = (run / f"checkpoints/step-00000024/{name}.safetensors" for run in (whole, killed))
        assert first.read_bytes() == second.read_bytes(), name
    before, after = load_file(start / "checkpoints/step-00000006/model.safetensors"), weights(whole)
    for name in ("0.0", "1"):
        adapted = after[f"base_model.model.{name}.base_layer.weight"]
        assert torch.equal(adapted, before[f"{name}.weight"]), "what is adapted is the trained network, and stays so"
        assert after[f"base_model.model.{name}.lora_B.default.weight"].any()
    assert not torch.equal(after["base_model.model.3.modules_to_save.default.weight"], before["3.weight"])


def test_one_process_and_two_take_the_same_steps(adapt):
    first, second = (weights(adapt(world_size)) for world_size in (1, 2))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_run_answers_and_can_be_merged_into_the_plain_network(adapt):
    run = nndist.load_run(adapt(1))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).double()
    network = run.networks["model"].eval()
    expected = network(x)
    answered = run.predict(*x.tolist())
    plain = Tuned().networks()["model"]
    plain.load_state_dict(network.merge_and_unload().state_dict())
    torch.testing.assert_close(plain.eval()(x), expected)
    assert len(answered) == 5


def test_an_adapter_that_peft_saved_is_read_by_its_names(tmp_path):
    from peft import LoraConfig, get_peft_model

    def adapted(seed):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=r"0\.0|1", init_lora_weights=False)
        return get_peft_model(Tuned().networks()["model"], config)

    ours, theirs = adapted(0), adapted(1)
    theirs.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    initial = put({"model": ours}, Source(saved, "a file"), "x")
    assert len(initial.loaded) == len(saved) == 4 and not initial.unexpected
    pairs = zip(ours.named_parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(mine, other) for (name, mine), other in pairs if "lora" in name)

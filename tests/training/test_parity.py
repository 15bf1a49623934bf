"""The world size is no hyper-parameter: 1, 2 and 3 real processes take the same examples and the same steps."""

import json

import pytest
import torch
from conftest import RECIPES
from differences import relative_difference
from launching import Processes
from safetensors.torch import load_file
from workers import families, parity
from workers.parity import NUM_STEPS, plain_sequences

from nndist.runs.records import without_times

WORLD_SIZES = (1, 2, 3)
RUNS = [f"batch{batch_size}-accumulate{accumulate}" for batch_size in (64, 50) for accumulate in (1, 3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder of runs per world size."""
    made = {}
    for world_size in WORLD_SIZES:
        made[world_size] = tmp_path_factory.mktemp(f"world{world_size}")
        launched = Processes(world_size, [made[world_size]], folder=made[world_size], call=parity.main)
        assert not any(launched.wait(300)), launched.said()
    return made


def outcomes(folder, world_size, run):
    """What each process reported of a run, by rank."""
    return [json.loads((folder / f"outcomes-{rank}.json").read_text())[run] for rank in range(world_size)]


def weights(folder, recipe, run):
    """The trained tensors of a run, from its checkpoint."""
    (path,) = (folder / recipe / run / "checkpoints").glob("step-*/model.safetensors")
    return load_file(path)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_same_examples_in_the_same_order(folders, world_size, run):
    accumulate = int(run[-1])
    (alone,) = outcomes(folders[1], 1, run[:-1] + "1")
    reports = outcomes(folders[world_size], world_size, run)
    assert len(alone["seen"]) == NUM_STEPS
    for step, expected in enumerate(alone["seen"]):
        micro_batches = slice(step * accumulate, (step + 1) * accumulate)
        taken = [number for report in reports for numbers in report["seen"][micro_batches] for number in numbers]
        assert taken == expected


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_same_weights_after_14_steps(folders, world_size, run):
    """In float64, so that rounding can't hide or make a difference; the accumulated step is the plain one too."""
    expected = weights(folders[1], "parity", run[:-1] + "1")
    assert relative_difference(weights(folders[world_size], "parity", run), expected) < 1e-12


@pytest.mark.parametrize("gradient_sync", ["step", "ddp"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_same_weights_with_clipping_and_a_schedule(folders, world_size, accumulate, gradient_sync):
    """Whether gradients are summed once per step or averaged by DDP during the backward pass."""
    expected = weights(folders[1], "parity", "step-accumulate1")
    found = weights(folders[world_size], "parity", f"{gradient_sync}-accumulate{accumulate}")
    assert relative_difference(found, expected) < 1e-12


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_same_weights_in_fp32(folders, world_size):
    """Over a few steps: within 50, plain fp32 already differs from float64 by 1e-6 to 4e-3, depending on the seed."""
    assert (
        relative_difference(weights(folders[world_size], "parity", "fp32"), weights(folders[1], "parity", "fp32"))
        < 1e-5
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_same_losses_and_scores(folders, world_size):
    for run in RUNS:
        (alone,) = outcomes(folders[1], 1, run)
        report = outcomes(folders[world_size], world_size, run)[0]
        for ours, theirs in zip(report["history"], alone["history"], strict=True):
            ours, theirs = without_times(ours), without_times(theirs)
            assert ours.keys() == theirs.keys()
            for name in ours.keys() - {"data"}:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-9)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_process_has_the_outputs_of_the_whole_test_set(folders, world_size):
    (alone,) = (torch.tensor(logits) for logits in outcomes(folders[1], 1, "outputs"))
    assert alone.shape == (200, 10)
    for logits in outcomes(folders[world_size], world_size, "outputs"):
        torch.testing.assert_close(torch.tensor(logits), alone)


@pytest.mark.parametrize("world_size", [2, 3])
def test_two_networks_with_batch_norm(folders, world_size):
    expected = weights(folders[1], "parity", "gan1")
    found = weights(folders[world_size], "parity", "gan1")
    assert {name.split(".")[0] for name in expected} == {"discriminator", "generator"}
    moving = {name: tensor for name, tensor in found.items() if tensor.is_floating_point()}
    assert relative_difference(moving, {name: expected[name] for name in moving}) < 1e-10
    tracked = [name for name in found if name.endswith("num_batches_tracked")]
    assert len(tracked) == 2
    for name in tracked:
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_agree_in_every_bit(folders, world_size):
    for run in ("gan1", "gan2", "remainder"):
        first, *others = outcomes(folders[world_size], world_size, run)
        for other in others:
            assert other == first


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_last_batch_of_fewer_examples_than_processes(folders, world_size):
    expected = weights(folders[1], "parity", "remainder")
    found = weights(folders[world_size], "parity", "remainder")
    assert relative_difference(found, expected) < 1e-10


@pytest.mark.parametrize("run", ["sequences1", "sequences2"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_padded_sequences_weigh_by_their_tokens(folders, world_size, run):
    """The mean over all tokens of the global batch, wherever they are, as a plain loop takes it; and clipped so."""
    expected = plain_sequences()[0]
    assert relative_difference(weights(folders[world_size], "parity", run), expected) < 1e-12
    report, alone = (outcomes(folders[size], size, run)[0] for size in (world_size, 1))
    (plain_loss,) = outcomes(folders[1], 1, "sequences_plain")
    assert report["scores"]["test/loss"] == pytest.approx(plain_loss, rel=1e-12)
    for ours, theirs in zip(report["history"], alone["history"], strict=True):
        for name in without_times(ours).keys() - {"data"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9)
    norms = [record["gradient_norm"] for record in report["history"] if "gradient_norm" in record]
    assert len(norms) >= 5 and max(norms) > 0.3


@pytest.mark.long
def test_every_recipe_takes_the_same_first_steps_on_three_processes(tmp_path):
    """Random augmentation, masks and noise included; in two micro-batches where there is no BatchNorm."""
    histories = {}
    for world_size in (1, 3):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        launched = Processes(world_size, [folder], folder=folder, call=families.main)
        assert not any(launched.wait(300)), launched.said()
        histories[world_size] = json.loads((folder / "histories.json").read_text())
    assert histories[1].keys() == histories[3].keys() and len(histories[1]) == len(RECIPES) - 1
    for recipe, alone in histories[1].items():
        for ours, theirs in zip(histories[3][recipe], alone, strict=True):
            ours, theirs = without_times(ours), without_times(theirs)
            assert ours.keys() == theirs.keys()
            for name in ours.keys() - {"data"}:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), (recipe, name)

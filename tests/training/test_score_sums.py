"""Scores that depend on the batch or on random numbers: the same on one process and on three, or said in one line."""

import json

import pytest
import torch
from launching import Processes
from workers import scored

import nndist
from nndist.trained.loaded_run import load_run

NAMES = (
    "ByClass",
    "TotalByClass",
    "Few",
    "PlainByClass",
    "OutputByClass",
    "TotalByShape",
    "Noisy",
    "OfBatch",
    "Adapting",
    "AdaptingToOne",
    "KeptByHand",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By number of processes, of each recipe the scores or the error, the notes and the outputs, on the main one."""
    results = {}
    for world_size in (1, 3):
        folder = tmp_path_factory.mktemp(f"scored-{world_size}")
        launched = Processes(world_size, [folder, *NAMES], folder=folder, call=scored.main)
        assert launched.wait() == [0] * world_size, launched.said()
        of_processes = [json.loads((folder / f"scores-{rank}.json").read_text()) for rank in range(world_size)]
        for name in NAMES:
            (outcome, *_), *others = (of_process[name] for of_process in of_processes)
            assert all(other == outcome or isinstance(outcome, dict) for other, *_ in others), of_processes
        results[world_size], results["rank 2"] = of_processes[0], of_processes[-1]
    return results


def test_a_weighted_score_that_a_batch_lacks_has_no_weight_there(found):
    x, y = (tensor[:, 0] for tensor in scored.Scored().data(None).test.tensors)
    means = {f"test/mean_{number}": x[y == number].mean().item() for number in range(3)}
    for world_size in (1, 3):
        assert found[world_size]["ByClass"][0] == pytest.approx(means)
        assert list(found[world_size]["ByClass"][0]) == list(means)


def test_a_total_that_a_batch_lacks_adds_nothing(found):
    x, y = (tensor[:, 0] for tensor in scored.Scored().data(None).test.tensors)
    for number in range(3):
        assert found[1]["TotalByClass"][0][f"test/sum_{number}_0"] == pytest.approx(x[y == number].sum().item())
        assert found[1]["TotalByClass"][0][f"test/sum_{number}_1"] == (y == number).sum()
    assert found[3]["TotalByClass"][0] == pytest.approx(found[1]["TotalByClass"][0])
    assert found[3]["Few"][0] == pytest.approx(found[1]["Few"][0])


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    "name, said",
    [
        ("PlainByClass", "score 'some': only some batches have it; return it for every batch, as nndist.Weighted "),
        ("OutputByClass", "score 'some': only some batches have it; return an Output for every batch"),
        ("TotalByShape", "score 'counts': a Total of shape ("),
    ],
)
def test_what_only_some_batches_have_is_refused(found, world_size, name, said):
    assert found[world_size][name][0].startswith(said)


def numbers_of_seed(seed, num_examples):
    """What score draws for a set on one process."""
    torch.manual_seed(seed)
    return torch.cat([torch.rand(len(batch)) for batch in torch.arange(num_examples).split(7)])


def test_each_set_and_each_process_has_random_numbers_of_its_own(found):
    scores, notes, (drawn,) = found[1]["Noisy"]
    assert drawn == numbers_of_seed(0, 20).tolist() and not notes
    assert scores["test/noise"] == pytest.approx(numbers_of_seed(0, 20).mean().item())
    assert scores["train_set/noise"] == pytest.approx(numbers_of_seed(0, 100).mean().item())
    _, notes, (drawn,) = found[3]["Noisy"]
    assert len(set(drawn)) == 20
    assert len(notes) == 1 and "scores depend on the number of processes and --eval-batch-size" in notes[0]
    assert not found[3]["ByClass"][1]


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_metric_that_the_recipe_keeps_counts_each_example_once(found, world_size):
    """Also if a process has none: it scores one all the same, to learn the outputs' types."""
    scores = found[world_size]["KeptByHand"][0]
    assert scores["test/mean"] == pytest.approx(scores["test/x"])


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_figure_of_the_batch_given_to_each_example_is_noted(found, world_size):
    notes = found[world_size]["OfBatch"][1]
    assert len(notes) == 1 and "score 'f1' has one value for all examples of a batch, and another" in notes[0]


def test_batch_norm_in_training_mode_within_an_evaluation_waits_for_no_other_process(found):
    scores, notes, statistics = found[3]["Adapting"]
    assert scores["test/norm"] == pytest.approx(1, rel=0.01)  # normalised by the batch
    assert len(notes) == 1 and "it takes each process's own batch" in notes[0] and not found[1]["Adapting"][1]
    assert found["rank 2"]["Adapting"][2] == statistics, "all processes keep the same"
    assert "a process has a batch of 1 value per channel" in found[3]["AdaptingToOne"][0]


def test_an_evaluation_later_draws_what_that_of_the_training_drew(tmp_path):
    result = nndist.train(scored.Noisy(), runs_dir=tmp_path, eval_batch_size=7, **scored.QUIET)
    later = load_run(result.folder).evaluate(weights="last", cpu=True)
    assert later.scores == pytest.approx(result.scores) and not later.notes

"""K-fold cross-validation: each example validates once, classes are spread evenly, one run's fold is its data."""

from itertools import chain

import pytest
import torch
from conftest import ROOT

import nndist
from nndist.data.folds import one_fold
from nndist.data.parts import hold_out, some_of
from nndist.data.sets import Data, ExampleSet, Resident
from nndist.errors import UserError

LABELS = torch.tensor([0] * 7 + [1] * 50 + [2] * 44)[torch.randperm(101, generator=torch.Generator().manual_seed(0))]


def numbered(classes=("a", "b", "c"), labels=LABELS, **more) -> Data:
    """101 examples that are their own numbers."""
    return Data(Resident(torch.arange(101), labels), Resident(torch.arange(3), labels[:3]), classes=classes, **more)


def numbers(examples: ExampleSet) -> list[int]:
    (batch,) = examples.batches([torch.arange(len(examples))])
    return batch[0].tolist()


@pytest.mark.parametrize("data", [numbered(), numbered(classes=()), numbered(sequential=True)])
@pytest.mark.parametrize("folds", [2, 5, 7, 101])
def test_every_example_validates_once_and_trains_otherwise(data, folds):
    parts = [one_fold(data, f"{fold}/{folds}") for fold in range(1, folds + 1)]
    validated = [numbers(part.val) for part in parts]
    assert sorted(chain(*validated)) == list(range(101))
    assert {len(part) for part in validated} <= {101 // folds, -(-101 // folds)}
    for part, kept in zip(parts, validated, strict=True):
        assert sorted(numbers(part.train) + kept) == list(range(101)) and len(part.test) == 3
    if data.sequential:
        assert [*chain(*validated)] == list(range(101)), "they follow each other"
    if data.classes and not data.sequential:
        for label in range(3):
            shares = [int((LABELS[part] == label).sum()) for part in validated]
            assert max(shares) - min(shares) <= 1
        assert "each class in equal shares" in parts[0].plan["fold"]


def test_labels_that_are_no_classes_are_drawn_at_random():
    for labels in (LABELS.float(), LABELS + 1, torch.stack([LABELS, LABELS], 1)):
        assert "drawn at random" in one_fold(numbered(labels=labels), "1/5").plan["fold"]
    assert "in order" in one_fold(numbered(sequential=True), "1/5").plan["fold"]


def test_a_part_of_a_part_names_examples_as_the_whole_set_does():
    part = some_of(some_of(numbered().train, torch.arange(50, 60)), torch.tensor([3, 4]))
    assert numbers(part) == part.named(torch.arange(2)).tolist() == [53, 54]


@pytest.mark.parametrize("text", ["0/5", "6/5", "1/1", "5", "2/5/1", "-1/5", "a/b"])
def test_a_fold_that_there_is_not_is_one_line(text):
    with pytest.raises(UserError, match=f"--fold {text}: give which of how many, such as 2/5"):
        one_fold(numbered(), text)


def test_data_with_a_validation_set_or_too_few_examples_have_no_folds():
    with pytest.raises(UserError, match="has its own validation set"):
        one_fold(hold_out(numbered(), 0.1), "1/5")
    with pytest.raises(UserError, match="there are 101 training examples"):
        one_fold(numbered(), "1/102")


def test_a_run_trains_on_the_other_folds_and_tests_once(tmp_path, capsys):
    settings = {"epochs": 3, "runs_dir": tmp_path, "progress": False, "figures": False, "wandb": "off"}
    result = nndist.train(str(ROOT / "recipes/two_clusters.py"), fold="2/5", **settings)
    assert "fold     2 of 5, each class in equal shares: 160 to train on, 40 to validate" in capsys.readouterr().out
    assert len(result.history.series("val/accuracy")[0]) > len(result.history.series("test/accuracy")[0]) - 1
    assert len(result.history.series("test/accuracy")[0]) == 1
    with pytest.raises(UserError, match="--fold 2/5 and --hold-out"):
        nndist.train(str(ROOT / "recipes/two_clusters.py"), fold="2/5", hold_out=0.1, **settings)

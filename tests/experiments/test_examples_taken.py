"""What verify compares of the examples: those that each process took, from real processes, kills included."""

import json
from functools import partial

import pytest
from resuming import SAVES, Run

from nndist.data import permutation
from nndist.experiments.examples_taken import compared, read, write_down


def noting(folder, rank):
    """A patch for `Run.launch`, by functools.partial."""
    write_down(folder)


def straying(folder, rank):
    """The same, where one process has an order of its own."""
    from nndist.data.feed import Feed

    write_down(folder)
    order = Feed.order
    Feed.order = lambda feed, epoch: order(feed, epoch).roll(rank)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    Run(folder, *SAVES).finish(patch=partial(noting, folder / "examples"))
    return read(folder / "examples")


def test_each_step_has_the_examples_of_the_epochs_order(alone):
    assert list(alone) == list(range(1, 34))
    for epoch in range(3):
        taken = [number for step in range(11) for number in alone[11 * epoch + step + 1]]
        assert taken == permutation(107, 0, epoch).tolist()


def test_killed_on_three_processes_and_resumed_on_two_nothing_is_missed_or_moved(tmp_path, alone):
    run = Run(tmp_path, *SAVES, "--accumulate", 2)
    run.die("2 40 kill", world_size=3, patch=partial(noting, tmp_path / "0"))
    run.finish(world_size=2, patch=partial(noting, tmp_path / "1"))
    launches = [read(tmp_path / name) for name in "01"]
    assert 0 < len(launches[0]) < 33 and len(launches[1]) < 33
    assert compared(alone, launches) == ("the examples of all 33 steps are the same, in the same order", True)


def test_an_order_that_differs_between_processes_is_found(tmp_path, alone):
    Run(tmp_path, world_size=2).finish(patch=partial(straying, tmp_path / "examples"))
    assert compared(alone, [read(tmp_path / "examples")]) == ("the examples of step 1 are different", False)


def test_what_is_compared(tmp_path):
    lines = [{"step": step, "of": 2, "examples": [step, 7]} for step in (1, 2)]
    for rank, some in enumerate((lines, lines[:1])):
        (tmp_path / f"rank-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some) + '{"ste')
    assert read(tmp_path) == {1: [1, 7, 1, 7]}, "one process was killed before it had taken step 2"
    assert compared({1: [1, 2]}, [{1: [2, 1]}]) == ("the examples of step 1 are in a different order", False)
    assert compared({1: [1], 2: [2]}, [{1: [1]}]) == ("the examples of step 2 are not known", False)
    assert compared({}, [{}])[1] is False

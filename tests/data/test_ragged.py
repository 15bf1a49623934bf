"""Sequences of different lengths: padded to the longest of a batch, in an order that is the same everywhere."""

import torch

from nndist.data.parts import hold_out
from nndist.data.ragged import Ragged
from nndist.data.sets import Data


def made(count=1003):
    lengths = torch.randint(0, 60, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return Ragged([[1 + n % 7] * length for n, length in enumerate(lengths)], range(count)), lengths


def test_a_batch_has_each_sequence_and_padding():
    examples, lengths = made()
    tokens, numbers, found = next(examples.batches([torch.tensor([5, 0, 1002])]))
    assert numbers.tolist() == [5, 0, 1002] and found.tolist() == [lengths[n] for n in (5, 0, 1002)]
    for row, number in zip(tokens.tolist(), (5, 0, 1002), strict=True):
        assert row == [1 + number % 7] * lengths[number] + [0] * (len(row) - lengths[number])
    assert tokens.shape[1] == max(1, *found.tolist())


def test_an_epoch_has_every_example_once_and_little_padding():
    examples, lengths = made()
    for epoch in range(3):
        order = examples.order(1, epoch, True, 20)
        assert sorted(order.tolist()) == list(range(1003)) and torch.equal(order, examples.order(1, epoch, True, 20))
        padded = sum(len(batch) * max(lengths[n] for n in batch) for batch in order.split(20))
        assert padded < 1.15 * sum(lengths), "without sorting it is about twice as much"
        means = torch.tensor([sum(lengths[n] for n in batch) / len(batch) for batch in order.split(20)[:50]])
        assert abs(torch.corrcoef(torch.stack([means, torch.arange(50.0)]))[0, 1]) < 0.4, "not from short to long"
    assert not torch.equal(examples.order(1, 0, True, 20), examples.order(1, 1, True, 20))
    assert not torch.equal(examples.order(1, 0, True, 20), examples.order(2, 0, True, 20))
    assert examples.order(1, 0, False, 20).tolist() == list(range(1003))


def test_a_part_is_held_out_and_the_rest_stays_sorted():
    data = hold_out(Data(made()[0], made()[0]), 0.2)
    order = data.train.order(0, 0, True, 20)
    assert len(order) == 802 and len(data.val) == 201
    assert made()[0].fingerprint() != Ragged([[1]], [0]).fingerprint() == Ragged([[1]], [0]).fingerprint()

"""Examples that an epoch's order has more than once: each time they are drawn for anew, and alike everywhere."""

import random

import pytest
import torch
from torch.utils.data import Dataset

from nndist import ExampleRandom, Resident, Streamed
from nndist.data import per_example
from nndist.data.feed import Feed
from nndist.data.mixed import Mixed
from nndist.data.parts import Part

ORDER = torch.tensor([3, 0, 3, 3, 1, 0, 5, 3, 2, 2, 4, 3])
FIRST = [place for place, number in enumerate(ORDER.tolist()) if number not in ORDER[:place]]


class Drawing(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, number):
        assert type(number) is int
        return number, random.random(), torch.rand(())


class Weighted(Streamed):
    """As a WeightedRandomSampler draws with replacement."""

    order_of_all = ORDER

    def order(self, seed, epoch, shuffle, batch_size):
        return self.order_of_all


def decode(example, random):
    return (*example, random.uniform()[0, 0] if random else 0.0)


def collate(examples):
    return torch.tensor([[float(part) for part in (*example, random.random())] for example in examples])


def drawn(examples, start=0, **options):
    """What each example of an epoch became, from a batch on, in the order of the epoch."""
    feed = Feed(examples, batch_size=4, seed=0, **options)
    return [micro.raw for batch in feed.epoch(1, start) for micro in batch.micro_batches if micro.size]


def rows(examples, **options):
    return torch.cat([torch.stack([part.double() for part in raw], 1) for raw in drawn(examples, **options)])


def test_each_time_is_another_and_the_first_is_as_ever():
    once = Weighted(Drawing(), 0, decode)
    once.order_of_all = torch.arange(12)
    found, ever = rows(Weighted(Drawing(), 0, decode)), rows(once)
    assert found[:, 0].tolist() == ORDER.tolist()
    assert all(len(set(column.tolist())) == len(ORDER) for column in found[:, 1:].T)
    assert torch.equal(found[FIRST], ever[ORDER[FIRST]])


def test_it_is_alike_on_workers_processes_and_after_a_resume():
    examples, whole = Weighted(Drawing(), 0, decode), rows(Weighted(Drawing(), 0, decode))
    assert torch.equal(rows(Weighted(Drawing(), 2, decode)), whole)
    assert torch.equal(rows(examples, accumulate=2), whole)
    assert torch.equal(rows(examples, start=1), whole[4:])
    shares = [rows(examples, rank=rank, world_size=2).view(3, 2, -1) for rank in range(2)]
    assert torch.equal(torch.cat(shares, 1).flatten(0, 1), whole)


def test_what_collate_draws_is_another_each_time():
    examples = Weighted(Drawing(), 0, collate=collate)
    examples.order_of_all = torch.tensor([3, 0, 1, 2] * 3)
    assert len(set(torch.cat(drawn(examples))[:, 3].tolist())) == 12


def test_a_part_and_a_mixture_pass_it_on():
    part = rows(Part(Weighted(Drawing(), 0), torch.tensor([0, 3])))
    assert len(set(part[:, 1].tolist())) == len(part)

    class Pictures(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, number):
            return torch.full((4, 4), random.random()), number

    shares = torch.cat([raw[3] for raw in drawn(Mixed(Weighted(Pictures(), 0), mixup=1.0))])
    assert len(set(shares.tolist())) == 12


@pytest.mark.parametrize("through", ["uniform", "per_example"])
def test_augment_gets_another_each_time(through):
    class Repeated(Resident):
        def order(self, seed, epoch, shuffle, batch_size):
            return ORDER

    def uniform(batch, random):
        return batch[0] + random.uniform(), batch[1]

    augment = per_example(lambda image: image + torch.rand(())) if through == "per_example" else uniform
    examples = Repeated(torch.zeros(12, 1), torch.arange(12))
    found, first = [], []
    for batch in Feed(examples, batch_size=4, seed=0).epoch(1):
        (micro,) = batch.micro_batches
        found += augment(micro.raw, ExampleRandom(0, 1, micro.numbers, times=micro.times))[0].flatten().tolist()
        first += augment(micro.raw, ExampleRandom(0, 1, micro.numbers))[0].flatten().tolist()
    assert len(set(found)) == len(ORDER)
    assert [found[place] for place in FIRST] == [first[place] for place in FIRST]


def test_an_order_without_repeats_costs_nothing():
    (batch, *_) = Feed(Weighted(Drawing(), 0), batch_size=4, seed=0).epoch(1)
    assert batch.micro_batches[0].times is not None
    for examples in (
        Streamed(Drawing(), 0),
        type("Own", (Weighted,), {"order_of_all": torch.arange(12)})(Drawing(), 0),
    ):
        assert next(Feed(examples, batch_size=4, seed=0).epoch(1)).micro_batches[0].times is None

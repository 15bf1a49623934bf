"""Batches reach the device in their order, one ahead at most; on a GPU in an order of copies and waits that is safe."""

import contextlib
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from nndist.data import transfer
from nndist.data.feed import Feed
from nndist.data.sets import Streamed
from nndist.data.transfer import NoStream, SideStream, copier, delivered
from nndist.errors import UserError

CPU = torch.device("cpu")


class Ahead(NoStream):
    """What copies for a GPU, without one."""

    ahead = 1

    def __init__(self, device=CPU):
        super().__init__(device)


class Numbers(Dataset):
    """Example i is i and a random number."""

    def __len__(self):
        return 27

    def __getitem__(self, number):
        if number == 26 and self.damaged:
            raise UserError("26.jpg: is damaged")
        return torch.tensor([float(number), torch.rand(()).item()])

    damaged = False


def everything(monkeypatch, ahead, *, num_workers, start=0):
    with monkeypatch.context() as patch:
        if ahead:
            patch.setattr("nndist.data.sets.copier", lambda device, num_workers: Ahead())
        feed = Feed(Streamed(Numbers(), num_workers), batch_size=8, seed=3, accumulate=2)
        return [micro.raw[0] for batch in feed.epoch(1, start) for micro in batch.micro_batches]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start", [0, 2])
def test_a_batch_ahead_changes_nothing(monkeypatch, num_workers, start):
    expected = everything(monkeypatch, False, num_workers=0, start=start)
    found = everything(monkeypatch, True, num_workers=num_workers, start=start)
    assert len(found) == len(expected) == (8, 4)[start > 0]
    assert all(map(torch.equal, found, expected))


def test_the_training_gets_what_was_read_before_an_error(monkeypatch):
    """The error is raised when its batch is asked for, as without a batch ahead: the steps before it are taken."""
    monkeypatch.setattr(Numbers, "damaged", True)
    indices = torch.arange(27).split(9)
    got = []
    for ahead in (NoStream(CPU), Ahead()):
        monkeypatch.setattr("nndist.data.sets.copier", lambda device, num_workers, ahead=ahead: ahead)
        got.append(0)
        with pytest.raises(UserError, match=r"26\.jpg"):
            for _ in Streamed(Numbers(), 0).batches(indices):
                got[-1] += 1
    assert got == [2, 2]


def test_only_one_batch_is_ahead_and_none_is_kept():
    read, alive = [], []

    def source():
        for number in range(6):
            read.append(number)
            batch = torch.zeros(3)
            alive.append(weakref.ref(batch))
            yield batch

    copied = Ahead()
    copied.begin = lambda batch: batch
    batches = delivered(source(), copied)
    for number in range(6):
        batch = next(batches)
        assert len(read) == min(number + 2, 6)
        del batch
        assert sum(found() is not None for found in alive) <= 2, "the one ahead, and the source's own"
    with pytest.raises(StopIteration):
        next(batches)


def test_no_more_is_read_when_the_loop_has_ended():
    closed = []

    def source():
        try:
            yield from (torch.zeros(1) for _ in range(9))
        finally:
            closed.append(True)

    batches = delivered(source(), Ahead())
    next(batches)
    batches.close()
    assert closed


class Events:
    """torch.cuda, writing down what is queued where; its work is done when `drain` says so."""

    def __init__(self):
        self.said = []
        self.current = "compute"

    def stream(self, name):
        def record():
            self.said.append(f"{name}: record")
            return f"copy {self.said.count(f'{name}: record')}"

        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.said.append(f"{name}: wait for {other.name}"),
            wait_event=lambda event: self.said.append(f"{name}: wait for {event}"),
            record_event=record,
        )

    @contextlib.contextmanager
    def within(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before


def test_the_order_of_copies_and_waits_on_a_gpu(monkeypatch):
    """Batch 2 is copied while batch 1 is computed: after what is queued before that, and before anything uses it."""
    events = Events()
    cuda = SimpleNamespace(
        current_stream=lambda device: events.stream("compute"),
        stream=events.within,
        Stream=lambda _: events.stream("side"),
    )
    monkeypatch.setattr(transfer.torch, "cuda", cuda)
    monkeypatch.setattr(transfer, "stream_of", lambda device, purpose: events.stream("side"))

    def moved(batch, device, *, non_blocking):
        assert non_blocking
        events.said.append(f"{events.current}: copy {batch}")
        return batch

    monkeypatch.setattr(transfer, "moved", moved)
    copied = copier(torch.device("cuda"), num_workers=2)
    assert type(copied) is SideStream and copied.ahead == 1
    for batch in delivered(iter([1, 2, 3]), copied):
        events.said.append(f"compute: step {batch}")
    begun = [f"side: wait for compute|side: copy {n}|side: record" for n in (1, 2, 3)]
    assert "|".join(events.said) == "|".join(
        [
            *begun[:2],
            "compute: wait for copy 1|compute: step 1",
            begun[2],
            "compute: wait for copy 2|compute: step 2",
            "compute: wait for copy 3|compute: step 3",
        ]
    )


def test_what_this_process_reads_itself_is_not_read_ahead():
    assert copier(torch.device("cuda"), num_workers=0).ahead == 0
    assert type(copier(CPU, num_workers=2)) is NoStream

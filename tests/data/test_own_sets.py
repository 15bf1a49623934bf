"""Sets of examples of people's own: their order, length, labels and state, at a resume and on several processes."""

import json
import subprocess
import sys

import pytest
import torch
from launching import Processes

from nndist import Data, Resident, Streamed
from nndist.data.feed import Feed
from nndist.data.identity import same_examples
from nndist.data.parts import hold_out
from nndist.errors import UserError
from nndist.runs import python_marks
from nndist.runs.python_state import PythonState
from nndist.runs.python_values import encode

BASE = """
import functools
import random
import torch
from dataclasses import dataclass
from torch import nn
from torch.utils.data import Dataset, Subset
from nndist import Data, Recipe, Resident, Streamed

X = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
Y = X[:, :4].sum(1, keepdim=True)

@dataclass(kw_only=True)
class Base(Recipe):
    epochs: int = 3
    batch_size: int = 8
    lr: float = 0.05

    def data(self, config):
        return Data(train=self.examples(), test=Resident(X[:8], Y[:8]))

    def networks(self):
        return {"model": nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)

    def loss(self, networks, batch):
        return (networks["model"](batch[0]) - batch[1]).square().mean(1)
"""
RESUMED = {
    "counting": """
class D(Dataset):
    def __init__(self):
        self.calls = 0
    def __len__(self):
        return 50
    def __getitem__(self, number):
        self.calls += 1
        return X[number] + 0.01 * self.calls, Y[number]
def examples(self):
    return Streamed(self.D(), 0)
""",
    "cached": """
class D(Dataset):
    def __init__(self):
        self.cache = {}
    def __len__(self):
        return 50
    def __getitem__(self, number):
        if number not in self.cache:
            self.cache[number] = X[number] + 0.3 * torch.randn(8), Y[number]
        return self.cache[number]
def examples(self):
    return Streamed(self.D(), 0)
""",
    "growing_subset": """
def examples(self):
    self.training = Subset([(X[i], Y[i]) for i in range(50)], list(range(20)))
    return Streamed(self.training, 0)
def after_epoch(self, networks, epoch):
    self.training.indices = list(range(10 * epoch, 10 * epoch + 20))
""",
    "mined": """
class Hard(Resident):
    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.weights = torch.ones(50)
    def order(self, seed, epoch, shuffle, batch_size):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        return torch.multinomial(self.weights, 50, True, generator=generator)
def examples(self):
    self.training = self.Hard(X, Y)
    return self.training
def after_epoch(self, networks, epoch):
    with torch.no_grad():
        self.training.weights = 0.01 + (networks["model"](X) - Y).square().squeeze(1)
""",
}
FLAGS = ["--threads", 1, "--no-progress", "--no-figures", "--no-report", "--wandb", "off", "--log-every", 1]


def written(folder, name, body):
    (folder / "base_of_sets.py").write_text(BASE)
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    path = folder / f"{name}.py"
    path.write_text(f"from base_of_sets import *\n\n@dataclass(kw_only=True)\nclass R(Base):\n{lines}")
    return path


def launched(path, run, *flags, world_size=1, env=None):
    arguments = [path, "--runs-dir", path.parent, *FLAGS, "--run", run, *flags]
    return Processes(world_size, arguments, folder=path.parent, env=env)


def losses(path, run):
    lines = (path.parent / path.stem / run / "metrics.jsonl").read_text().splitlines()
    records = {record["step"]: record["train/loss"] for record in map(json.loads, lines) if "train/loss" in record}
    return [records[step] for step in sorted(records)]


@pytest.mark.parametrize("name", RESUMED)
def test_what_a_set_keeps_is_there_after_a_resume(name, tmp_path):
    path = written(tmp_path, name, RESUMED[name])
    cut = 5 if name == "growing_subset" else 10  # in the midst of the second epoch
    for run, flags in (("whole", []), ("parts", ["--max-steps", cut]), ("parts", [])):
        one = launched(path, run, *flags)
        assert one.wait() == [0], one.said()
    assert losses(path, "parts") == losses(path, "whole")


def test_a_set_that_a_hook_changes_is_the_one_that_is_trained_on(tmp_path):
    """On the CPU, where nothing has to be copied to a device."""
    path = written(tmp_path, "mined", RESUMED["mined"])
    other = written(tmp_path, "even", RESUMED["mined"].replace("0.01 + ", "1.0 + 0 * "))
    for one in (launched(path, "a"), launched(other, "a")):
        assert one.wait() == [0], one.said()
    assert losses(path, "a")[:7] == losses(other, "a")[:7] and losses(path, "a")[8:] != losses(other, "a")[8:]


CLASSES = """
def examples(self):
    names = list({name for name in ("cat", "dog", "bird", "fish", "ant", "bee")})
    numbers = [names.index(("cat", "dog", "bird", "fish", "ant", "bee")[i % 6]) for i in range(50)]
    rows = [(X[i], torch.tensor([float(numbers[i])])) for i in range(50)]
    return Streamed(rows, 0)
"""


def test_labels_in_another_order_are_noticed_at_a_resume(tmp_path):
    path = written(tmp_path, "classes", CLASSES)
    text = path.read_text()
    one = launched(path, "a", "--max-steps", 5)
    assert one.wait() == [0], one.said()
    path.write_text(text.replace("list({", "sorted({"))  # as another seed of Python's hashes orders them
    one = launched(path, "a", "--allow-change", "source")
    assert any(one.wait())
    assert "the training examples of 'generated' have changed since the run began" in one.said()


def test_labels_in_another_order_are_noticed_on_two_processes(tmp_path):
    body = CLASSES.replace("list({", "(sorted if __import__('os').environ.get('RANK') == '1' else list)({")
    one = launched(written(tmp_path, "classes", body), "a", world_size=2)
    assert any(one.wait())
    assert "as many training examples as process 0, but different ones" in one.said()


def test_other_examples_to_test_on_are_noticed_at_a_resume(tmp_path):
    body = "def data(self, config):\n    return Data(train=Resident(X, Y), test=Resident(X[:8], Y[:8]))"
    path = written(tmp_path, "tested", body)
    assert launched(path, "a", "--max-steps", 5).wait() == [0]
    path.write_text(path.read_text().replace("Resident(X[:8], Y[:8])", "Resident(X[8:16], Y[8:16])"))
    one = launched(path, "a", "--allow-change", "source")
    assert any(one.wait()) and "the test examples of 'generated' have changed" in one.said()
    assert launched(path, "a", "--allow-change", "source", "data").wait() == [0]


def test_a_set_that_changes_within_an_epoch_is_named_where_worker_processes_read(tmp_path):
    body = """
workers: int = 2
class D(Dataset):
    level = 0.0
    def __len__(self):
        return 50
    def __getitem__(self, number):
        return X[number] + self.level, Y[number]
def examples(self):
    self.training = self.D()
    return Streamed(self.training, self.workers)
def after_step(self, networks, step):
    self.training.level = 0.05 * step
"""
    path = written(tmp_path, "stepwise", body)
    said = "note     data.train.dataset.level: changed within an epoch; worker processes read with the value"
    for workers in (0, 2):
        one = launched(path, f"of{workers}", "--workers", workers, "--max-steps", 10)
        assert one.wait() == [0] and (said in one.said()) == (workers > 0), one.said()


def test_what_identifies_the_examples_leaves_their_sets_as_they_were(tmp_path):
    """It reads some of them; a set that counts its readings does not notice."""
    body = RESUMED["counting"].replace("0.01 * self.calls", "0.0")
    body = body.replace("self.calls += 1", "self.calls += 1\n        print('CALL', self.calls, number, flush=True)")
    one = launched(written(tmp_path, "counting", body), "a", "--max-steps", 2)
    assert one.wait() == [0], one.said()
    calls = [line.split()[1:] for line in one.said().splitlines() if line.startswith("CALL")]
    starts = [place for place, (count, _) in enumerate(calls) if count == "1"]
    assert len(starts) >= 2 and len(calls) - starts[-1] >= 16, "the last time from the beginning, in training"


class Ordered(Resident):
    def __init__(self, order):
        super().__init__(torch.arange(50))
        self.its = order

    def order(self, seed, epoch, shuffle, batch_size):
        return self.its()


@pytest.mark.parametrize(
    "order, said",
    [
        (lambda: torch.arange(100) % 50, r"returns torch.int64 \[100\]; it must return int64 \[50\]"),
        (lambda: torch.arange(30), r"returns torch.int64 \[30\]"),
        (lambda: torch.arange(50) + 1, "each from 0 to 49"),
        (lambda: torch.arange(50.0), r"returns torch.float32 \[50\]"),
        (lambda: list(range(50)), "returns list"),
    ],
)
def test_an_order_that_is_none_is_refused(order, said):
    with pytest.raises(UserError, match=said):
        Feed(Ordered(order), batch_size=8, seed=0).order(0)


def test_an_order_from_the_global_generator_is_refused():
    feed = Feed(Ordered(lambda: torch.randperm(50)), batch_size=8, seed=0)
    with pytest.raises(UserError, match="another order each time it is called"):
        feed.order_checksum(0)
    assert Feed(Resident(torch.arange(50)), batch_size=8, seed=0).order_checksum(0) is None


def test_an_order_that_changes_within_an_epoch_is_refused_at_a_resume(tmp_path):
    body = RESUMED["mined"].replace("after_epoch(self, networks, epoch)", "after_step(self, networks, step)")
    path = written(tmp_path, "stepwise", body)
    assert launched(path, "a", "--max-steps", 10).wait() == [0]
    one = launched(path, "a")
    assert any(one.wait()) and "order() of the training set has changed within epoch 2" in one.said()


def test_an_order_that_takes_some_examples_twice_is_as_long_without_the_held_out_ones():
    seldom = torch.tensor([0, 1, 2, 3, 4] * 10)
    data = hold_out(Data(train=Ordered(lambda: seldom), test=Resident(torch.arange(5))), 0.2)
    order = data.train.order(0, 0, True, 8)
    assert len(order) == 40 == len(data.train)
    (batch,) = data.train.batches([order])
    held_out = {int(number) for (rows,) in data.val.batches([torch.arange(10)]) for number in rows}
    assert not held_out & {int(number) for number in batch[0]}


def test_a_set_that_grows_is_refused():
    rows = [(torch.zeros(1),)] * 16
    feed = Feed(Streamed(rows, 0), batch_size=8, seed=0)
    rows += rows
    with pytest.raises(UserError, match="had 16 examples at the start and has 32 now"):
        feed.order(0)


def test_examples_that_differ_each_time_identify_nothing():
    count = iter(range(1000))

    class Fresh(list):
        def __getitem__(self, number):
            return torch.tensor(float(next(count)))

    assert Streamed(Fresh([0] * 10), 0).fingerprint() == ""
    known = Streamed([torch.tensor(float(n)) for n in range(10)], 0).fingerprint()
    assert known and known != Streamed([torch.tensor(float(-n)) for n in range(10)], 0).fingerprint()
    assert Streamed([{"a": "text", "b": [1, None]}] * 9, 0).fingerprint()


def test_examples_that_another_machine_rounds_otherwise_are_the_same():
    """An image that another release decodes or resizes; labels and texts are exact."""

    def known(change=0.0, label=1, text="a", shift=0):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(20, 3, 8, 8, generator=generator)
        rows = [{"x": images[(n + shift) % 20] * (1 + change), "y": label * n, "of": text} for n in range(20)]
        return Streamed(rows, 0).fingerprint()

    assert known() and same_examples(known(), known(1e-5)) and known() != known(1e-3)
    for other in (known(0.1), known(label=2), known(text="b"), known(shift=1), ""):
        assert not same_examples(known(), other) and not same_examples(other, known())
    assert same_examples("a/b/c", "a/b/c") and not same_examples("a/b/c", "a/b/d"), "a dataset's own"


def test_annotations_of_a_large_set_are_compared_as_a_whole(monkeypatch):
    """100,000 of them, value by value, cost a save ten seconds."""
    encoded = []
    monkeypatch.setattr(python_marks, "encode", lambda value, *more: encoded.append(value) or encode(value, *more))

    class Holder:
        annotations = None

    holder = Holder()
    holder.annotations = [{"file": f"{n}.jpg", "boxes": [[1, 2, 3, n]], "label": n % 10} for n in range(1000)]
    state = PythonState(holder, {})
    assert state.changes() == ([], [])
    assert not [value for value in encoded if value is holder.annotations or value in holder.annotations]
    holder.annotations[7]["boxes"][0][0] = 5
    assert [change.name for change in state.changes()[0]] == ["recipe.annotations"]


@pytest.mark.parametrize(
    "part, remedy",
    [
        (torch.zeros(4).numpy(), "torch.from_numpy"),
        (torch.eye(4).to_sparse(), "to_dense"),
        (torch.tensor(3.0), "keep the number on the recipe"),
        (torch.zeros(4, requires_grad=True), "detach"),
    ],
)
def test_what_can_not_be_gathered_is_one_line(part, remedy):
    with pytest.raises(UserError, match=f"Resident: .*{remedy}"):
        Resident(torch.zeros(4, 2), part)


def test_data_without_a_test_set_are_one_line():
    with pytest.raises(
        UserError, match=r"Data\(test=None\): is not a set of examples; give some that are not trained on"
    ):
        Data(train=Resident(torch.zeros(4, 2)))


LIMITED = """
import resource, torch
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from nndist import Streamed
rows = [{"boxes": torch.ones(1 + n % 3, 4)} for n in range(400)]
(batch,) = Streamed(rows, 1, collate=list).batches([torch.arange(400)])
assert len(batch) == 400
"""


def test_a_batch_of_more_tensors_than_files_may_be_open_is_read():
    """It hung: torch's queue loses what it can't send."""
    subprocess.run([sys.executable, "-c", LIMITED], check=True, timeout=60)

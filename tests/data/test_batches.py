"""Batches of any nesting, through loader processes, a device, an evaluation and a training; and what is refused."""

import os
import signal
from collections import OrderedDict, UserDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launching import Processes
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import nndist
from nndist.data import batches
from nndist.data.feed import Feed
from nndist.data.sets import Data, Resident, Streamed
from nndist.errors import TrainingError, UserError
from nndist.recipe.contract import Recipe

META = torch.device("meta")  # stands for any device


class Pair(NamedTuple):
    x: Any
    name: Any


@dataclass(frozen=True)
class Sentence:
    tokens: Any
    text: Any
    made: int = field(init=False, default=0)

    def __post_init__(self):
        object.__setattr__(self, "made", 1)


class Encoding(UserDict):
    """As a tokenizer's: a mapping that moves itself."""

    def to(self, device):
        moved = Encoding({name: value.to(device) for name, value in self.items()})
        moved.by_itself = True
        return moved


def nested():
    x = torch.ones(2)
    return {
        "list": [x, "text", None, 3],
        "pair": Pair(x, ["a", "b"]),
        "sentence": Sentence({"ids": x}, ("a", None)),
        "ordered": OrderedDict(b=x, a=1.5),
        "packed": pack_sequence([torch.ones(3), torch.ones(1)]),
        "encoding": Encoding(ids=x),
        "own": object,
    }


def test_every_tensor_is_moved_and_the_rest_is_carried_along():
    batch = nested()
    there = batches.moved(batch, META)
    assert isinstance(there["packed"], PackedSequence) and there.pop("packed").data.is_meta
    assert [tensor.is_meta for tensor in batches.tensors_of(there)] == [True] * 5
    assert there["encoding"].by_itself and there["encoding"]["ids"].is_meta
    assert there["list"][1:] == ["text", None, 3] and there["own"] is object
    assert type(there["pair"]) is Pair and there["pair"].name == ["a", "b"] and there["pair"].x.is_meta
    assert type(there["sentence"]) is Sentence and there["sentence"].text == ("a", None) and there["sentence"].made == 1
    assert type(there["ordered"]) is OrderedDict and list(there["ordered"]) == ["b", "a"]
    assert not any(tensor.is_meta for tensor in batches.tensors_of(batch)), "what was given is left as it was"


def test_every_tensor_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # without a GPU there is no such memory
    batch = batches.pinned(nested())
    tensors = [*batches.tensors_of(batch), batch["encoding"]["ids"]]
    assert len(tensors) == 8 and all((tensor == 2).all() for tensor in tensors if tensor.is_floating_point())


class Sentences(Dataset):
    """Sentences of several lengths, each with a text, a number, a mark that may be missing, and a label."""

    def __init__(self, size=27):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, number):
        tokens = torch.arange(1 + number % 5) + number
        label = torch.tensor(float(number % 2))
        return {"tokens": tokens, "text": f"sentence {number}", "label": label, "mark": None}


def padded(examples):
    """As users' collate functions do it."""
    lengths = torch.tensor([len(example["tokens"]) for example in examples])
    tokens = nn.utils.rnn.pad_sequence([example["tokens"] for example in examples], batch_first=True)
    labels = torch.stack([example["label"] for example in examples])
    return {"tokens": tokens, "lengths": lengths, "text": [e["text"] for e in examples], "label": labels}


def packed(examples):
    return pack_sequence([e["tokens"].float() for e in examples], enforce_sorted=False), [e["text"] for e in examples]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_collate_of_ones_own_and_variable_lengths(num_workers, world_size):
    whole = {}
    for rank in range(world_size):
        examples = Streamed(Sentences(), num_workers, collate=padded)
        for batch in Feed(examples, batch_size=8, seed=0, rank=rank, world_size=world_size).epoch(0):
            for micro in batch.micro_batches:
                for place, number in enumerate(micro.numbers[: micro.size].tolist()):
                    length = int(micro.raw["lengths"][place])
                    whole[number] = (micro.raw["tokens"][place, :length].tolist(), micro.raw["text"][place])
    assert whole == {n: (Sentences()[n]["tokens"].tolist(), f"sentence {n}") for n in range(27)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_packed_sequences(num_workers):
    (sequence, text), *_ = Streamed(Sentences(), num_workers, collate=packed).batches([torch.arange(4)])
    values, lengths = pad_packed_sequence(sequence, batch_first=True)
    assert lengths.tolist() == [1, 2, 3, 4] and values[3].tolist() == [3, 4, 5, 6] and text[2] == "sentence 2"


class OfAnyKind(Dataset):
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 4

    def __getitem__(self, number):
        return self.kind(torch.tensor(number), f"number {number}")


def as_sentence(x, text):
    return Sentence([x, None, 2.5], text)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_examples_are_stacked_part_by_part(num_workers):
    def of(kind):
        return next(Streamed(OfAnyKind(kind), num_workers).batches([torch.tensor([2, 1])]))

    pair = of(Pair)
    assert type(pair) is Pair and pair.x.tolist() == [2, 1] and pair.name == ["number 2", "number 1"]
    sentence = of(as_sentence)
    assert type(sentence) is Sentence and sentence.text == ["number 2", "number 1"]
    tokens, nothing, number = sentence.tokens
    assert tokens.tolist() == [2, 1] and nothing is None and number.dtype == torch.double
    assert [part.tolist() for part in of(lambda x, text: x)] == [[2, 1]], "a tensor alone is a tuple of one"
    assert type(of(lambda x, text: [x, x])) is tuple and of(lambda x, text: {"a": (x, True)})["a"][1].all()
    with pytest.raises(UserError, match=r"tensors of shapes \[1\] and \[2\]; make them match .* Streamed\(.*collate="):
        of(lambda x, text: {"x": torch.zeros(int(x))})
    with pytest.raises(UserError, match=r"arrays of shapes \[1\] and \[2\]; make them match .* Streamed\(.*collate="):
        of(lambda x, text: {"x": np.zeros(int(x))})
    for part in (x_of := torch.ones(2), x_of.numpy(), 3, {"x": x_of}, (x_of,), Sentence(x_of, "")):
        for missing in (1, 2):
            with pytest.raises(UserError, match=rf"None in some .* a {type(part).__name__} in others; make them match"):
                of(lambda x, text, part=part, missing=missing: (x, None if x == missing else part))
    assert of(lambda x, text: (x, text if x == 1 else None))[1] == [None, "number 1"]
    with pytest.raises(UserError, match=r"different keys, such as 2"):
        of(lambda x, text: {int(x): x, 1: x})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_that_can_not_be_sent_is_one_line_and_no_wait(num_workers):
    @dataclass
    class Local:
        x: torch.Tensor

    examples = Streamed(OfAnyKind(lambda x, text: Local(x)), num_workers)
    if num_workers == 0:
        assert next(examples.batches([torch.arange(2)])).x.tolist() == [0, 1]
    else:
        with pytest.raises(UserError, match=r"can't be sent from a worker process .*; define its class at the top"):
            next(examples.batches([torch.arange(2)]))


def test_resident_tensors_in_a_nesting():
    x, y = torch.arange(10.0).unsqueeze(1), torch.arange(10)
    for whole in ({"x": x, "more": [y]}, Sentence({"ids": x}, (y,)), Pair(x, y)):
        examples = Resident(whole)
        assert len(examples) == 10 and examples.fingerprint() == Resident(x, y).fingerprint()
        (batch,) = examples.batches([torch.tensor([7, 2])])
        assert type(batch) is type(whole) and [t.flatten().tolist() for t in batches.tensors_of(batch)] == [[7, 2]] * 2
        (batch,) = examples.to(META).batches([torch.tensor([7, 2])])
        assert all(tensor.is_meta for tensor in batches.tensors_of(batch))
    with pytest.raises(ValueError, match="the same number of examples"):
        Resident({"x": x, "y": y[:5]})
    with pytest.raises(ValueError, match="not str; leave that out, or stream it"):
        Resident({"x": x, "name": "x"})


@dataclass(kw_only=True)
class Reader(Recipe):
    """Learns the labels of padded sentences, from batches that are dicts."""

    epochs: int = 2
    batch_size: int = 8
    lr: float = 0.1
    streamed: bool = True

    def data(self, config):
        if self.streamed:
            train, test = Streamed(Sentences(), 0, collate=padded), Streamed(Sentences(9), 0, collate=padded)
        else:
            train, test = (
                Resident({"tokens": t % 7, "lengths": torch.full((len(t),), 3), "label": t[:, 0].float() % 2})
                for t in (torch.arange(81).reshape(27, 3), torch.arange(27).reshape(9, 3))
            )

        def prepare(batch):
            known = batch["tokens"] % 7
            inside = torch.arange(known.shape[1]) < batch["lengths"].unsqueeze(1)
            return {**batch, "tokens": known, "inside": inside}

        def augment(batch, drawn):
            return {**batch, "noise": drawn.normal()}

        return Data(train, test, prepare=prepare, augment=augment)

    def networks(self):
        return {"model": nn.EmbeddingBag(7, 1, mode="sum")}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=self.lr)

    def loss(self, networks, batch):
        said = networks["model"](batch["tokens"], per_sample_weights=batch["inside"].float())
        noise = batch["noise"].squeeze(1) if "noise" in batch else 0.0
        return F.mse_loss(said.squeeze(1) + 0.01 * noise, batch["label"], reduction="none")

    def figures(self, networks, data, history):
        return {"first": str(data.inputs(data.test, 0, 1)["label"].tolist())}


@pytest.mark.parametrize("streamed", [True, False])
def test_a_training_on_dicts(tmp_path, streamed, capsys):
    result = nndist.train(Reader(streamed=streamed), runs_dir=tmp_path, engine="eager", progress=False, report=False)
    assert result.steps == 8 and "[0.0]" in capsys.readouterr().out
    scores = result.history.series("test/loss")[1]
    assert scores[-1] < scores[0]


# What is not a set of examples.


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1)


class WithoutLength(Dataset):
    def __getitem__(self, number):
        return torch.zeros(1)


@pytest.mark.parametrize(
    "dataset, said",
    [
        (Endless(), r"Streamed\(Endless\): an IterableDataset .* give a map-style dataset .*, or write .* to shards"),
        (WithoutLength(), r"Streamed\(WithoutLength\): has no __len__; define it to return the number"),
        (
            {"train": Sentences(), "test": Sentences()},
            r"Streamed\(dict\): its keys are 'train', 'test' and not the .* such as Streamed\(sets\['train'\]\)",
        ),
        ({1: "one", 2: "two"}, r"its keys are 1, 2 and not the numbers of examples from 0"),
        ({1, 2}, r"Streamed\(set\): has no __getitem__; define it"),
        (DataLoader(Sentences(), num_workers=1, collate_fn=padded), r"Streamed\(loader.dataset, .*=1, collate=loader"),
    ],
)
def test_a_dataset_that_can_not_be_read_by_number_is_one_line(dataset, said):
    with pytest.raises(UserError, match=said) as raised:
        Streamed(dataset)
    assert "\n" not in str(raised.value)


def test_a_dict_of_examples_by_number_is_read():
    (x,) = next(Streamed({0: torch.zeros(1), 1: torch.ones(1)}, 0).batches([torch.tensor([1, 0])]))
    assert x.tolist() == [[1], [0]]


@pytest.mark.parametrize(
    "given, said",
    [
        (DataLoader(Sentences(), 8), r"give Streamed\(loader.dataset, num_workers=0\), and the recipe's batch_size"),
        (
            DataLoader(Sentences(), 8, sampler=WeightedRandomSampler([1.0] * 4, 4)),
            "draws as its WeightedRandomSampler does",
        ),
        (Sentences(), r"Data\(train=Sentences\): is not a set of examples; give .* or Streamed\(dataset\)"),
        (TensorDataset(torch.zeros(3)), r"give Resident\(\*dataset.tensors\)"),
        (torch.zeros(3), r"Data\(train=Tensor\): .* give Resident\(tensor\)"),
        ((torch.zeros(3), torch.zeros(3)), r"give Resident\(\*tensors\)"),
        ({"x": torch.zeros(3)}, r"give Resident\(tensors\)"),
        (None, r"Data\(train=NoneType\): is not a set"),
    ],
)
def test_what_is_no_set_of_examples_is_one_line(given, said):
    good = Resident(torch.zeros(2))
    with pytest.raises(UserError, match=said):
        Data(given, good)
    for named in ({"test": given}, {"test": good, "more": {"other": given}}):
        with pytest.raises(UserError, match="is not a set of examples"):
            Data(good, **named)


# Errors of the user's own code.


class Faulty(Sentences):
    def __getitem__(self, number):
        if number == 17:
            return {}["missing"] + number
        if number == 18:
            raise Peculiar(1, 2)
        return super().__getitem__(number)


class Peculiar(Exception):
    """Can be neither recreated from its text nor sent."""

    def __init__(self, one, two):
        super().__init__("it is\nso")
        self.why = lambda: (one, two)


def faulty(example, drawn):
    raise ValueError(f"no {example['text']}")


def faulty_collate(examples):
    raise RuntimeError("they do not fit")


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    "number, options, said, function",
    [
        (17, {}, r"KeyError in dataset\[17\]: 'missing'", "__getitem__"),
        (18, {}, r"Peculiar in dataset\[18\]: it is", "__getitem__"),
        (4, {"decode": faulty}, r"ValueError in decode of dataset\[4\]: no sentence 4", "faulty"),
        (4, {"collate": faulty_collate}, r"RuntimeError in the batch of examples 4: they do not fit", "faulty_collate"),
    ],
)
def test_an_error_of_a_dataset_names_class_example_and_line(num_workers, number, options, said, function):
    examples = Streamed(Faulty(), num_workers, **options)
    with pytest.raises(UserError, match=rf"^{said} \({__file__}, line \d+, in {function}\); --traceback") as raised:
        list(examples.batches([torch.tensor([number])]))
    assert f"in {function}\n" in str(raised.value.__cause__), "what --traceback shows"


def test_the_command_shows_the_line_of_ones_own_file(tmp_path):
    """And with --traceback what the loader process was doing."""
    recipe = tmp_path / "my_recipe.py"
    recipe.write_text(
        "from toys import Line\n"
        "from nndist import Data, Streamed\n"
        "class Mine:\n"
        "    def __len__(self):\n"
        "        return 20\n"
        "    def __getitem__(self, number):\n"
        "        return number + 'a'\n"
        "from dataclasses import dataclass\n"
        "@dataclass(kw_only=True)\n"
        "class Broken(Line):\n"
        "    def data(self, config):\n"
        "        return Data(Streamed(Mine(), config.num_workers), Streamed(Mine()))\n"
    )
    for flags in (["--num-workers", 1, "--traceback"], ["--num-workers", 0]):
        launched = Processes(1, [recipe, "--runs-dir", tmp_path, "--no-progress", *flags], folder=tmp_path)
        assert launched.wait() == [2]
        (line,) = [line for line in launched.said().splitlines() if line.startswith("error:")]
        assert "error: TypeError in dataset[" in line and f"({recipe}, line 7, in __getitem__)" in line
        if "--traceback" in flags:
            assert "return number + 'a'" in launched.said()
            assert launched.said().count("unsupported operand") >= 2


class Ending(Sentences):
    """Ends the process that reads it, as the system does with one that takes too much memory."""

    def __getitem__(self, number):
        if number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


def test_a_worker_that_is_ended_is_one_line():
    examples = Streamed(Ending(), 1, collate=padded)
    with pytest.raises(
        TrainingError, match=r"^a worker process .* lack of memory; give a smaller --num-workers"
    ) as raised:
        list(examples.batches(torch.arange(12).split(3)))
    assert "\n" not in str(raised.value)


@dataclass(kw_only=True)
class Dropping(Reader):
    """Its collate leaves out one example, or takes all twice."""

    times: float = 2.0

    def data(self, config):
        def collate(examples):
            return padded(examples * 2 if self.times == 2 else examples[1:])

        return Data(Streamed(Sentences(), 0, collate=collate), Streamed(Sentences(9), 0, collate=padded))

    def loss(self, networks, batch):
        lengths = batch["lengths"].unsqueeze(1)
        inside = (torch.arange(batch["tokens"].shape[1]) < lengths).float()
        said = networks["model"](batch["tokens"] % 7, per_sample_weights=inside)
        return F.mse_loss(said.squeeze(1), batch["label"], reduction="none")


@pytest.mark.parametrize("times, shape", [(2.0, 16), (0.5, 7)])
def test_a_collate_that_changes_the_number_of_examples_is_one_line(tmp_path, times, shape):
    said = rf"loss of shape \({shape},\) for 8 examples, as long as the batch's first tensor: `collate`, .*Weighted"
    with pytest.raises(UserError, match=said):
        nndist.train(Dropping(times=times), runs_dir=tmp_path, engine="eager", progress=False, report=False)


def test_every_tensor_has_a_name():
    names = [name for name, _ in batches.named_tensors(nested())]
    assert len(names) == len(set(names)) == 7 and all(names)
    assert [n for n, _ in batches.named_tensors({"a": (torch.ones(1), None, {"b": torch.ones(1)})})] == ["a.0", "a.2.b"]
    assert [n for n, _ in batches.named_tensors(torch.ones(1))] == [""]

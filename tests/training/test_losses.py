"""What losses and scores are made of: the same for every batch, whatever is padded, sorted or depends on the batch."""

import csv
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from launching import Processes
from torch import nn

import nndist
from nndist import figures
from nndist.data.sets import Data, Streamed
from nndist.errors import UserError
from nndist.metrics import Forms, Means, Weighted
from nndist.runs.tracking import History

QUIET = {"progress": False, "figures": False, "report": False, "threads": 1, "wandb": "off", "run": "it"}
FLAGS = ["--no-figures", "--no-report", "--no-progress", "--threads", 1, "--run", "it"]
MIXED = "returns Weighted for some batches and a plain tensor for others: return Weighted always"


class Texts:
    """Texts of 2 to 14 numbers."""

    def __init__(self, count=40):
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(2, 15, (count,), generator=generator).tolist()
        self.texts = [torch.randint(1, 20, (length,), generator=generator) for length in lengths]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, number):
        return self.texts[number], self.texts[number] % 3 + 1


def padded(examples):
    return tuple(nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*examples, strict=True))


@dataclass(kw_only=True)
class Tagger(nndist.Recipe):
    epochs: int = 1
    batch_size: int = 12

    def data(self, config):
        texts = Streamed(Texts(), 0, collate=padded)
        return Data(train=texts, test=texts)

    def networks(self):
        return {"model": nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=0.1)

    def loss(self, networks, batch):
        x, y = batch
        return F.cross_entropy(networks["model"](x).transpose(1, 2), y, ignore_index=0, reduction="none")

    def score(self, networks, batch):
        return {"loss": nndist.Weighted(Tagger.loss(self, networks, batch), batch[1] != 0)}


@dataclass(kw_only=True)
class Mixed(Tagger):
    """Weighted, but where there is no padding."""

    def loss(self, networks, batch):
        losses = super().loss(networks, batch)
        is_full = bool((batch[1] != 0).all()) or batch[1][0, 0] == 1
        return losses.mean(1) if is_full else nndist.Weighted(losses, batch[1] != 0)


@dataclass(kw_only=True)
class ByRank(Mixed):
    """Each process keeps to a form of its own."""

    def loss(self, networks, batch):
        losses = Tagger.loss(self, networks, batch)
        rank = torch.distributed.get_rank()
        return losses.mean(1) if rank else nndist.Weighted(losses, batch[1] != 0)


@dataclass(kw_only=True)
class ScoredByRank(Tagger):
    def loss(self, networks, batch):
        return super().loss(networks, batch).mean(1)

    def score(self, networks, batch):
        losses = Tagger.loss(self, networks, batch)
        return {"loss": losses[:, : 1 + torch.distributed.get_rank()]}


def test_a_mean_of_weighted_and_plain_values_counts_the_plain_ones_once_each():
    for order in (1, -1):
        means = Means()
        for values in [Weighted(torch.full((4,), 12.0), torch.full((4,), 6.0)), torch.full((4,), 2.0)][::order]:
            means.add("loss", values)
        means.add("loss", torch.full((4,), 9.0), counted=False)
        assert means.reduce(lambda t: t, torch.device("cpu")) == {"loss": (2.0, 8)}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "recipe, said",
    [
        (Tagger, r"'model': returns \d+ values per example for one batch and \d+ for another: if .*padded"),
        (Mixed, MIXED),
    ],
)
def test_losses_of_another_form_are_refused(tmp_path, recipe, said, accumulate):
    with pytest.raises(UserError, match=said):
        nndist.train(recipe(epochs=4), runs_dir=tmp_path, accumulate=accumulate, **QUIET)


def test_scores_of_another_form_are_refused(tmp_path):
    @dataclass(kw_only=True)
    class Scored(Tagger):
        def loss(self, networks, batch):
            return super().loss(networks, batch).mean(1)

        def score(self, networks, batch):
            return {"tagging": Tagger.loss(self, networks, batch)}

    with pytest.raises(UserError, match=r"score 'tagging': returns \d+ values per example for one batch"):
        nndist.train(Scored(), runs_dir=tmp_path, eval_batch_size=5, **QUIET)


@pytest.mark.parametrize(
    "name, said", [("Mixed", MIXED), ("ByRank", MIXED), ("ScoredByRank", "score 'loss': returns 1 values per example")]
)
def test_losses_and_scores_of_another_form_on_another_process_are_refused(tmp_path, name, said):
    launched = Processes(2, [f"{__file__}:{name}", *FLAGS, "--runs-dir", tmp_path], folder=tmp_path)
    assert 2 in launched.wait()
    assert said in launched.said() and "bytes to a sum" not in launched.said()
    assert launched.said().count("error:") == 1


def test_the_same_form_is_no_clash():
    forms = Forms()
    for values in (torch.zeros(3, 4), torch.zeros(2, 2, 2)):
        forms.check("loss", "objective 'loss'", values)
    forms.check_others([forms.by_name, {"loss": 4}, {}], "objective")


def by_length(examples):
    examples = sorted(examples, key=lambda example: -len(example[0]))
    texts, labels = zip(*examples, strict=True)
    return nn.utils.rnn.pad_sequence(list(texts), batch_first=True), torch.stack(labels)


class Labelled(Texts):
    def __getitem__(self, number):
        return self.texts[number], self.texts[number][0] % 3


class Sorted(nndist.Classifier):
    """Its collate sorts a batch by length."""

    epochs = 2
    batch_size = 12

    def data(self, config):
        texts = Streamed(Labelled(), 0, collate=by_length)
        return Data(train=texts, test=texts)

    def networks(self):
        return {"model": nn.Sequential(nn.EmbeddingBag(20, 3, mode="mean"))}

    def optimizer(self, name, network):
        return torch.optim.Adam(network.parameters(), lr=0.1)


def test_figures_of_a_batch_that_collate_sorts_pair_answers_with_their_labels(tmp_path):
    result = nndist.train(Sorted(), runs_dir=tmp_path, eval_batch_size=15, **{**QUIET, "figures": True})
    (listed,) = result.folder.glob("figures/prediction_list.csv")
    columns = next(csv.reader(listed.read_text().splitlines()))
    assert columns == ["label", "prediction", "confidence", "loss"], "no numbers, as the order is another"
    by_class = list(csv.DictReader((result.folder / "figures/by_class.csv").read_text().splitlines()))
    right = sum(float(row["recall"]) * int(row["examples"]) for row in by_class)
    assert right == pytest.approx(40 * result.scores["test/accuracy"], abs=0.01)


@pytest.mark.parametrize("beside", [True, False])
def test_logits_are_taken_with_their_own_labels_only(beside):
    """Of an evaluation, in its batches' order; of a run before labels were kept, the network is asked anew."""
    data = Sorted().data(None)
    labels = torch.cat([labels for _, labels in data.test.batches(torch.arange(40).split(15))])
    history = History(outputs={"logits": F.one_hot(labels, 3) * 9, **({"labels": labels} if beside else {})})
    asked = []

    def network(texts):
        asked.append(len(texts))
        return F.one_hot(texts[:, 0].long() % 3, 3) * 9

    by_class = figures.classification(network, data, "it", history)["by_class"]
    assert {recall for _, _, _, recall, _ in by_class.rows} == {1.0}
    assert asked == ([] if beside else [40])


def test_no_example_is_named_if_collate_sorts_its_batch(tmp_path):
    class Wrong(Sorted):
        def loss(self, networks, batch):
            return super().loss(networks, batch) / (batch[0][:, 8:].sum(1) > 0)

    with pytest.raises(nndist.TrainingError, match=r"at step 1 of .*can't be told, as collate changes their order"):
        nndist.train(Wrong(), runs_dir=tmp_path, log_every=1, **QUIET)


def test_figures_are_drawn_if_examples_can_not_be_read_one_by_one(tmp_path):
    class InPairs(Sorted):
        def data(self, config):
            data = super().data(config)
            collate = data.test.collate

            def of_several(examples):
                assert len(examples) > 1, "it was only ever meant for whole batches"
                return collate(examples)

            data.test.collate = of_several
            return data

    result = nndist.train(InPairs(), runs_dir=tmp_path, eval_batch_size=20, **{**QUIET, "figures": True})
    assert list(result.folder.glob("figures/prediction_list.csv"))


class Centre(nn.Module):
    """A moving average of what it sees, as in DINO's loss."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, answers):
        self.mean = self.mean * 0.9 + answers.mean(0) * 0.1


@dataclass(kw_only=True)
class Points(nndist.Recipe):
    """A line through points; `kind` of loss."""

    epochs: int = 1
    batch_size: int = 12
    kind: str = "own"

    def data(self, config):
        x = torch.rand(36, 4, generator=torch.Generator().manual_seed(1))
        return Data(train=nndist.Resident(x, x.sum(1)), test=nndist.Resident(x, x.sum(1)))

    def networks(self):
        network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))
        network.last = None
        self.centre = nn.BatchNorm1d(1) if self.kind == "own" else Centre()
        if self.kind == "momentum":  # as MoCo's key encoder
            network.append(nn.Linear(1, 1).requires_grad_(False))
            network.append(nn.Linear(1, 1, bias=False))
        return {"model": network}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), lr=0.01)

    def loss(self, networks, batch):
        network = networks["model"]
        x, y = batch
        answers = network(x).squeeze(1)
        if self.kind == "table" and network.last is None:
            network.last = torch.ones(3)
        if self.kind == "hidden" and network.training:
            answers = answers + (0 if network.last is None or len(network.last) != len(y) else network.last)
            network.last = answers.detach()
        if self.kind == "momentum" and network.training:
            network[4].weight.data = network[4].weight.data * 0.9 + network[5].weight.data * 0.1
        if self.kind in ("own", "centre") and network.training:
            self.centre(answers.detach().unsqueeze(1))
        return (answers - y).square()

    def score(self, networks, batch):
        return {"loss": (networks["model"](batch[0]).squeeze(1) - batch[1]).square()}


CARRIED = "networks['model'].last: changed by the forward pass of each micro-batch"
MOMENTUM = "model.4.weight: changed by the forward pass of each micro-batch"
CENTRE = "recipe.centre.mean: changed by the forward pass of each micro-batch"


@pytest.mark.parametrize(
    "kind, accumulate, said",
    [
        ("own", 2, []),
        ("table", 2, []),
        ("hidden", 1, []),
        ("hidden", 2, [CARRIED]),
        ("momentum", 1, []),
        ("momentum", 2, [MOMENTUM]),
        ("centre", 2, [CENTRE]),
    ],
)
def test_what_depends_on_how_a_batch_is_split_is_noted(tmp_path, capsys, kind, accumulate, said):
    nndist.train(Points(kind=kind), runs_dir=tmp_path, accumulate=accumulate, **QUIET)
    printed = capsys.readouterr().out
    assert [line for line in (CARRIED, MOMENTUM, CENTRE) if line in printed] == said
    assert ("results may depend on --accumulate" in printed) == bool(said)
    assert all(printed.count(line) == 1 for line in said)


WEIGHTS = torch.tensor([0.0, 1.0, 5.0, 2.0])


@dataclass(kw_only=True)
class Plain(Tagger):
    """Losses of padded texts in some form; labels are 1 to 3, and 0 for padding."""

    kind: str = "ignored"
    calls = 0

    def data(self, config):
        texts = nndist.Resident(*padded([Texts()[number] for number in range(40)]))
        return Data(train=texts, test=texts)

    def loss(self, networks, batch):
        type(self).calls += 1
        logits, y = networks["model"](batch[0]).transpose(1, 2), batch[1]
        losses = F.cross_entropy(logits, y, reduction="none", ignore_index=0)
        if self.kind == "weights":
            return F.cross_entropy(logits, y, WEIGHTS, reduction="none")
        if self.kind == "module, scaled":
            return 2.0 * nn.CrossEntropyLoss(WEIGHTS, reduction="none", ignore_index=0)(logits, y)
        if self.kind == "mean of each":
            return F.nll_loss(logits.log_softmax(1), y, reduction="none", ignore_index=0).mean(1)
        if self.kind == "own mean of each":
            return losses.sum(1) / (y != 0).sum(1)
        if self.kind == "Weighted":
            return Weighted(losses, WEIGHTS[y])
        if self.kind == "nothing ignored":
            return F.cross_entropy(logits, y, reduction="none")
        return losses


IGNORES = "note     objective 'model': its cross-entropy ignores labels 0, but the mean of the losses counts them as 0"


@pytest.mark.parametrize(
    "kind, said",
    [
        ("ignored", f"{IGNORES}; for torch's mean return Weighted(losses, labels != 0)"),
        ("mean of each", f"{IGNORES}; for torch's mean return Weighted(losses, labels != 0)"),
        ("module, scaled", f"{IGNORES}; for torch's mean leave weight= out and return Weighted(losses, weights), the"),
        ("weights", "note     objective 'model': its cross-entropy weighs classes, but the mean of the losses divides"),
        *((kind, "") for kind in ("own mean of each", "Weighted", "nothing ignored")),
    ],
)
def test_plain_losses_whose_mean_is_not_that_of_torch_are_noted(tmp_path, capsys, monkeypatch, kind, said):
    monkeypatch.setattr(Plain, "calls", 0)
    nndist.train(Plain(kind=kind), runs_dir=tmp_path, accumulate=2, **QUIET)
    notes = [line for line in capsys.readouterr().out.splitlines() if "its cross-entropy" in line]
    assert len(notes) == bool(said) and all(note.startswith(said) for note in notes)
    assert Plain.calls == 8  # of four steps of two micro-batches


def test_gradients_by_frequency_are_refused_if_a_batch_is_split(tmp_path):
    class ByFrequency(Tagger):
        def networks(self):
            return {"model": nn.Sequential(nn.Embedding(20, 8, scale_grad_by_freq=True), nn.Linear(8, 4))}

        def loss(self, networks, batch):
            return self.score(networks, batch)["loss"]

    nndist.train(ByFrequency(), runs_dir=tmp_path, **QUIET)
    with pytest.raises(UserError, match=r"model\.0 has scale_grad_by_freq"):
        nndist.train(ByFrequency(), runs_dir=tmp_path / "split", accumulate=2, **QUIET)

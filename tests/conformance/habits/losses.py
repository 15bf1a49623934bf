"""What a loss may be, what it may not, and what batches may be like."""

import torch
import torch.nn.functional as F
from conformance.habit import ALONE, MODES, RESUMED, THREE, Habit
from torch import nn

from nndist import Total, Weighted
from nndist.data.sets import Data, Resident

ALONE_AND_THREE = (ALONE, THREE)


class Mean(Habit):
    """A loss that returns its mean, as everyone's first does."""

    modes = ALONE_AND_THREE
    refused = "returns a loss of shape () for"

    def loss(self, networks, batch):
        return super().loss(networks, batch).mean()


class MeanOfOne(Mean):
    """The same with batches of one example."""

    modes = (ALONE,)

    def __post_init__(self):
        self.batch_size = 1


class MeanKeptShape(Mean):
    """A mean of shape [1] over batches of twelve."""

    modes = (ALONE,)
    refused = "returns a loss of shape (1,) for 12 examples; it must return one loss per example"

    def loss(self, networks, batch):
        return Habit.loss(self, networks, batch).mean().unsqueeze(0)


class Integer(Habit):
    """A loss of whole numbers: the count of errors."""

    modes = ALONE_AND_THREE
    refused = "returns losses of type int64, through which no gradient flows"

    def loss(self, networks, batch):
        return (networks["model"](batch[0]) > batch[1]).long().squeeze(1)


class Detached(Habit):
    """A loss that is detached."""

    modes = ALONE_AND_THREE
    refused = "its loss depends on no trainable parameter: it is detached"

    def loss(self, networks, batch):
        return super().loss(networks, batch).detach()


class AllFrozen(Habit):
    """Every parameter is frozen."""

    modes = ALONE_AND_THREE
    refused = "or every parameter is frozen"

    def network(self):
        return super().network().requires_grad_(False)


class PythonNumber(Habit):
    """A loss that is a Python number."""

    modes = (ALONE,)
    refused = "returns a float; it must return a tensor of one loss per example"

    def loss(self, networks, batch):
        return super().loss(networks, batch).mean().item()


class NotFinite(Habit):
    """A loss that becomes nan: the run ends and names step and examples."""

    modes = ALONE_AND_THREE
    stops = "the loss is not finite at step 4 of 12, training example"
    calls = 0

    def loss(self, networks, batch):
        self.calls += networks["model"].training
        return super().loss(networks, batch) * (float("nan") if self.calls > 3 else 1.0)


class PerElement(Habit):
    """A loss of shape [k, 4], one for each output."""

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

    def loss(self, networks, batch):
        return (networks["model"](batch[0]) - batch[1]).square()


class WeightedExamples(Habit):
    """Weighted losses, divided by the sum of the weights of the whole batch: as F.cross_entropy(weight=...) does."""

    def data(self, config):
        data = super().data(config)
        x, y = data.train.tensors
        classes = (y[:, 0] > 0.5).long() + (y[:, 0] > 1.5).long()
        data.train = Resident(x, classes)
        data.test = Resident(x[:9], classes[:9])
        return data

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    weights = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)

    def loss(self, networks, batch):
        losses = F.cross_entropy(networks["model"](batch[0]), batch[1], reduction="none")
        return Weighted(losses, self.weights[batch[1]])

    def train(self, networks, loop):
        model = networks["model"]
        optimizer = self.optimizer("model", model)
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                x, y = (torch.cat(tensors) for tensors in zip(*batch, strict=True))
                loss = F.cross_entropy(model(x), y, weight=self.weights)
                loss.backward()
                loop.losses.setdefault("model", []).append(loss.item())
                optimizer.step()
            model.eval()
            x, y = loop.data.test.tensors
            loop.scores.append(self.score_by_hand(model(x), y))
            model.train()

    def score_by_hand(self, logits, labels):
        return F.cross_entropy(logits, labels, weight=self.weights).item()

    rounding = 1e-12


class IgnoredLabels(WeightedExamples):
    """cross_entropy's ignore_index: the mean is over the labels that count, however they fall on processes."""

    def data(self, config):
        data = super().data(config)
        x, classes = data.train.tensors
        classes[::3] = -100
        data.train, data.test = Resident(x, classes), Resident(x[:9], classes[:9])
        return data

    def loss(self, networks, batch):
        losses = F.cross_entropy(networks["model"](batch[0]), batch[1], reduction="none", ignore_index=-100)
        return Weighted(losses, batch[1] != -100)

    weights = None


class PenaltyInLoss(Habit):
    """L1 of the weights added to each example's loss."""

    def loss(self, networks, batch):
        return super().loss(networks, batch) + 0.01 * sum(p.abs().sum() for p in networks["model"].parameters())


class DoubleBackward(Habit):
    """A penalty on the gradient of the output by the input, with create_graph."""

    def loss(self, networks, batch):
        x, y = batch
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            answer = networks["model"](x)
            (slope,) = torch.autograd.grad(answer.sum(), x, create_graph=True)
        return (answer - y).square().squeeze(1) + 0.1 * slope.square().sum(1)


class DoubleBackwardUnderBatchNorm(DoubleBackward):
    """The same through BatchNorm, whose sums over the processes are differentiated twice."""

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


class AnomalyMode(Habit):
    """torch.autograd.set_detect_anomaly around the loss, and torch.set_grad_enabled within."""

    def loss(self, networks, batch):
        with torch.autograd.detect_anomaly(check_nan=False), torch.set_grad_enabled(networks["model"].training):
            return super().loss(networks, batch)


class BackwardInLoss(Habit):
    """A loss that calls backward itself for a term that is not of examples; on N processes it would count N times."""

    modes = (ALONE, RESUMED)

    def loss(self, networks, batch):
        if networks["model"].training:
            (0.001 * sum(p.square().sum() for p in networks["model"].parameters())).backward()
        return super().loss(networks, batch)


class TinyBatches(Habit):
    """A last batch of one example: two of three processes have none."""

    def __post_init__(self):
        self.batch_size = 13

    def optimizer(self, name, network):
        return torch.optim.Adam(network.parameters(), lr=self.lr)


class OneExample(Habit):
    """Batches of one example."""

    modes = (ALONE, RESUMED)

    def __post_init__(self):
        self.batch_size, self.epochs = 1, 1


class OneExampleUnderBatchNorm(Habit):
    """A last batch of one example under BatchNorm."""

    modes = ALONE_AND_THREE
    stops = "leaves BatchNorm a single one to take statistics of; --drop-last leaves a small last batch out"
    says = dict.fromkeys(ALONE_AND_THREE, "which BatchNorm may refuse: --drop-last leaves it out")

    def __post_init__(self):
        self.batch_size = 13

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


class EmptyTraining(Habit):
    """A training set without examples."""

    modes = ALONE_AND_THREE
    refused = "the training set has 0 examples; data() must return at least one"

    def data(self, config):
        x = torch.zeros(0, 4).double()
        return Data(train=Resident(x, x[:, :1]), test=Resident(torch.zeros(3, 4).double(), torch.zeros(3, 1).double()))


class EmptyTest(EmptyTraining):
    """A test set without examples."""

    refused = "the test set has 0 examples; data() must return at least one"

    def data(self, config):
        data = Habit.data(self, config)
        data.test = Resident(*(tensor[:0] for tensor in data.test.tensors))
        return data


class Unshuffled(Habit):
    """shuffle=False, the order of the file."""

    def __post_init__(self):
        self.shuffle = False


class ImagesAsBytes(Habit):
    """uint8 examples that prepare scales."""

    def data(self, config):
        generator = torch.Generator().manual_seed(9)
        x = torch.randint(0, 256, (40, 4), dtype=torch.uint8, generator=generator)
        y = torch.randint(0, 3, (40,), generator=generator)
        return Data(train=Resident(x, y), test=Resident(x[:9], y[:9]), prepare=lambda b: (b[0].double() / 255, b[1]))

    def network(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def loss(self, networks, batch):
        return F.cross_entropy(networks["model"](batch[0]), batch[1], reduction="none")


class LabelSmoothing(ImagesAsBytes):
    """Cross-entropy with label smoothing and class probabilities as targets."""

    def loss(self, networks, batch):
        target = F.one_hot(batch[1], 3).double() * 0.9 + 0.1 / 3
        return F.cross_entropy(networks["model"](batch[0]), target, reduction="none", label_smoothing=0.1)


class PackedSequences(Habit):
    """An LSTM over packed sequences of other lengths, and its last hidden state."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.read = nn.LSTM(1, 5, batch_first=True), nn.Linear(5, 1)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            _, (hidden, _) = self.lstm(packed)
            return self.read(hidden[0])

    def data(self, config):
        data = super().data(config)
        lengths = torch.randint(1, 5, (40,), generator=torch.Generator().manual_seed(3))
        data.train = Resident(*data.train.tensors, lengths)
        data.test = Resident(*data.test.tensors, lengths[:9])
        return data

    def network(self):
        return self.Network()

    def loss(self, networks, batch):
        x, y, lengths = batch
        return (networks["model"](x.unsqueeze(2), lengths) - y).square().squeeze(1)


class InfoNCE(Habit):
    """A contrastive loss, in which examples of a batch are each other's negatives: one process only.

    With accumulation or more processes an example sees the negatives of its own part only.
    """

    modes = (ALONE, RESUMED)

    def network(self):
        return nn.Linear(4, 3)

    def loss(self, networks, batch):
        x, _ = batch
        first, second = networks["model"](x), networks["model"](x * 0.9)
        return F.cross_entropy(first @ second.T, torch.arange(len(x)), reduction="none")


class InPlaceOnOutput(Habit):
    """Operations in place on what the network gave."""

    def loss(self, networks, batch):
        answer = networks["model"](batch[0])
        answer.sub_(batch[1]).pow_(2)
        return answer.squeeze(1)


class Accumulates(Habit):
    """`evaluate_every` and batches that do not divide the set: losses and scores are of examples, not of batches."""

    modes = MODES

    def __post_init__(self):
        self.batch_size = 17
        self.epochs = 4
        self.evaluate_every = "3 steps"

    def train(self, networks, loop):
        optimizer, step = self.optimizer("model", networks["model"]), 0
        for epoch in range(self.epochs):
            for batch in loop.batches(epoch):
                optimizer.zero_grad()
                loop.backward(self.loss, networks, batch)
                optimizer.step()
                step += 1
                if step % 3 == 0:
                    loop.test(networks)


class ScoreOfTheSet(WeightedExamples):
    """A score that is no mean over examples: macro F1 of the test set, here as what it lacks to 1."""

    def score(self, networks, batch):
        pairs = batch[1] * 3 + networks["model"](batch[0]).argmax(1)
        return {"right": (pairs % 4 == 0).double(), "pairs": Total(torch.bincount(pairs, minlength=9))}

    def set_scores(self, means, totals):
        counts = totals["pairs"].view(3, 3)
        assert means["right"] == counts.trace() / 9
        return {"loss": 1 - (2 * counts.diag() / (counts.sum(0) + counts.sum(1))).nan_to_num(0).mean().item()}

    def score_by_hand(self, logits, labels):
        guesses, f1 = logits.argmax(1), []
        for number in range(3):
            both = ((guesses == number) & (labels == number)).sum().item()
            f1.append(2 * both / max(1, (guesses == number).sum().item() + (labels == number).sum().item()))
        return 1 - sum(f1) / 3

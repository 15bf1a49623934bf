"""Whether a sentence of a film review is friendly, told by a recurrent network
that reads it word by word (document 002, section 4).

    accelerate launch launch/train.py recipes/sentiment_rnn.py

Measured: 78.40 % (77.99 to 79.43) of 977 test sentences are judged as people
have rated them, and 78.10 % by a bag of words (a logistic regression), 3.4 s
(median and range of 3 seeds, 2026-11-30, two threads of a 2-core AMD EPYC).
That is hardly more than the bag of words, and with one of the seeds less: 8,000
sentences are too few to learn what the order of the words adds.

Differences from the document: it only names sentiment analysis, as a use of
recurrent networks. Text and sizes are chosen here.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn, optim

from nndist import CELLS, Answers, Cell, Classifier, History, Inputs, Networks, ScheduleName, figures
from nndist.data import Data, DataConfig
from nndist.datasets import reviews
from nndist.datasets.text_files import with_classes
from nndist.recipe import Count, Fraction

NUM_SHOWN = 14  # sentences whose reading is drawn
LONGEST = 13  # words of them


class Reader(nn.Module):
    """The largest of each feature of the states after all words, beside the mean of the words' embeddings."""

    def __init__(self, cell: str, num_words: int, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_words + 2, width, padding_idx=reviews.PAD)
        nn.init.normal_(self.embed.weight[1:], std=0.1)  # torch's default, 1, learns slower
        self.recurrent = CELLS[cell](width, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(hidden + width, 2)

    def forward(self, words: Tensor) -> Tensor:  # [k, words]
        there = (words != reviews.PAD).unsqueeze(2)  # [k, words, 1]
        x = self.dropout(self.embed(words))  # [k, words, width]
        states, _ = self.recurrent(x)  # [k, words, hidden]
        largest = states.masked_fill(~there, -1.0).amax(1)  # no state is below -1
        mean = (x * there).sum(1) / there.sum(1)
        return self.classify(self.dropout(torch.cat([largest, mean], 1)))  # [k, 2]


@dataclass(kw_only=True)
class SentimentRNN(Classifier):
    """Sentiment of a sentence."""

    document = "002, section 4"
    headline = ("test/accuracy", "baseline")

    epochs: int = 4
    batch_size: int = 64
    lr: float = 4e-3
    schedule: ScheduleName = "cosine"
    clip_norm: float | None = 1.0
    best: str | None = "val/loss"
    cell: Cell = "gru"
    """Recurrent cell: plain (tanh or ReLU), LSTM or GRU."""
    width: Count = 64
    """Size of a word's embedding."""
    hidden: Count = 64
    """Width of the hidden state."""
    dropout: Fraction = 0.5
    """Fraction of dropping a feature of a word, or of the whole sentence."""
    least: Count = 2
    """Occurrences that a word of the vocabulary has in the training part."""

    def data(self, config: DataConfig) -> Data:
        parts = reviews.load_reviews()
        self.words = reviews.vocabulary(parts["train"][0], self.least)
        train, val, test = (reviews.encoded(*lines, self.words) for lines in parts.values())
        data = Data(train, test, "film reviews' sentences", with_classes, classes=reviews.CLASSES, val=val)
        return replace(data, as_text=lambda tokens: reviews.decoded(tokens, self.words))

    def networks(self) -> dict[str, nn.Module]:
        return {"model": Reader(self.cell, len(self.words), self.width, self.hidden, self.dropout)}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.Adam(network.parameters(), lr=self.lr, fused=True)

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        test = reviews.load_reviews()["test"]
        right = reviews.bag_of_words(data.train, data.test, len(self.words)) == torch.tensor(test[1])  # type: ignore[arg-type]
        few = [text for text in test[0] if 6 <= len(reviews.words_of(text)) <= LONGEST]
        few = few[:: len(few) // NUM_SHOWN][:NUM_SHOWN]  # friendly ones come first
        return {
            "reading": reading(networks["model"], few, self.words, f"{self.name} on {data.source}"),
            "baseline": f"bag of words (logistic regression): {right.float().mean():.2%} of the test sentences right",
            **super().figures(networks, data, history),
        }

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        lines = inputs.texts()
        batch = next(reviews.encoded(lines, [0] * len(lines), self.words).batches([torch.arange(len(lines))]))
        return inputs.classified(networks["model"](batch[0].to(inputs.device)))


def reading(network: Any, texts: list[str], words: list[str], title: str) -> Any:
    """How likely each sentence is friendly, after each of its words."""
    figure = figures.new_figure(13.0, 0.6 + 0.36 * len(texts))
    axes = figure.add_subplot()
    shown = torch.full((len(texts), LONGEST), torch.nan)
    device = next(network.parameters()).device
    for row, text in enumerate(texts):
        said = reviews.words_of(text)
        starts = [" ".join(said[: count + 1]) for count in range(len(said))]
        tokens = next(reviews.encoded(starts, [0] * len(said), words).batches([torch.arange(len(said))]))[0]
        shown[row, : len(said)] = network(tokens.to(device)).softmax(1)[:, 1].cpu()
        for column, word in enumerate(said):
            axes.text(column, row, word, ha="center", va="center", fontsize=9).set_in_layout(False)
    image = axes.imshow(shown, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_axis_off()
    figure.colorbar(image, ax=axes, label="probability: friendly", fraction=0.03)
    figure.suptitle(f"{title}: after each word of some test sentences", fontsize=11)
    return figure

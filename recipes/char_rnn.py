"""Text written character by character by a recurrent network (document 002,
section 4).

    accelerate launch launch/train.py recipes/char_rnn.py
    accelerate launch launch/train.py recipes/char_rnn.py --text FILE --cell gru

Measured: 1.362 nats per character (1.349 to 1.373) on the last tenth of the
embedded "Pride and Prejudice" (set "test"), after 5 epochs, 30 s (median and
range of 3 seeds, 2026-11-30, two threads of a 2-core AMD EPYC). On that of
tinyshakespeare.txt 1.566 (1 seed, 2026-11-21).

Differences from the document: it only surveys the family; the sizes are chosen
here. Windows are independent: each starts from a zero state, which raises the
loss of its first characters. Gradients are clipped, as usual for these
networks; the LSTM's norm stayed near 0.2, so there was little to clip.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn, optim

from nndist import CELLS, Answers, Batch, Cell, History, Inputs, Networks, Recipe, ScheduleName, figures
from nndist.data import Data, DataConfig
from nndist.datasets.text import (
    alphabet,
    continuations,
    next_character_data,
    next_character_losses,
    prompt_of,
    read_corpus,
    sample,
    written,
)
from nndist.recipe import Count, Fraction


class Net(nn.Module):
    def __init__(self, cell: str, num_symbols: int, width: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_symbols, width)
        between = dropout if num_layers > 1 else 0.0  # torch applies it between layers, and warns if there is only one
        self.rnn = CELLS[cell](width, width, num_layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_symbols)

    def forward(self, symbols: Tensor) -> Tensor:  # [k, length]
        return self.read(symbols)[0]

    def read(self, symbols: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits after each symbol, [k, length, symbols], and the cells' state after the last."""
        x, state = self.rnn(self.dropout(self.embedding(symbols)), state)  # [k, length, width]
        return self.head(self.dropout(x)), state

    def advance(self, symbols: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Logits after the last symbol, [k, symbols], and the state, for `sample`."""
        logits, state = self.read(symbols, state)
        return logits[:, -1], state


@dataclass(kw_only=True)
class CharRNN(Recipe):
    """Recurrent character model."""

    document = "002, section 4"

    epochs: int = 5
    batch_size: int = 32
    lr: float = 4e-3
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 50
    clip_norm: float | None = 1.0
    text: Path | None = None
    """UTF-8 text file to learn (default: the embedded "Pride and Prejudice")."""
    cell: Cell = "lstm"
    """Plain recurrent, LSTM or GRU layers."""
    num_layers: Count = 1
    """Recurrent layers."""
    width: Count = 256
    """Units per recurrent layer, and size of a character's embedding."""
    length: Count = 128
    """Characters per window; each window starts from a zero state."""
    dropout: Fraction = 0.0
    """Fraction of dropping a unit of a layer's input or output."""

    def data(self, config: DataConfig) -> Data:
        return next_character_data(config, self.text, self.length)

    def networks(self) -> dict[str, nn.Module]:
        num_symbols = 1 + len(alphabet(self))
        return {"model": Net(self.cell, num_symbols, self.width, self.num_layers, self.dropout)}

    def optimizer(self, name: str, network: nn.Module) -> optim.Optimizer:
        return optim.Adam(network.parameters(), lr=self.lr, fused=True)

    def loss(self, networks: Networks, batch: Batch) -> Tensor:
        return next_character_losses(networks, batch)

    def snapshot(self, networks: Networks, data: Data) -> dict[str, Tensor]:
        return {"sample": sample(networks["model"], prompt_of(data), [0.7], 150)[0]}

    def figures(self, networks: Networks, data: Data, history: History) -> dict[str, Any]:
        corpus = read_corpus(self.text)
        steps, losses = history.series("test/loss")
        loss_at = dict(zip(steps, losses, strict=True))
        drawn = {
            "samples": continuations(corpus, networks["model"], data),
            "samples_over_time": "\n\n".join(
                f"step {step:,}, validation loss {loss_at.get(step, math.nan):.3f}:\n{corpus.decode(tensors['sample'])}"
                for step, tensors in history.snapshots
            ),
        }
        if self.clip_norm is not None:
            drawn["gradient_norm"] = gradient_norm(history, self.clip_norm, f"char_rnn ({self.cell}) on {data.source}")
        return drawn

    def predict(self, networks: Networks, inputs: Inputs) -> Answers:
        return written(alphabet(self), networks["model"], inputs)


def gradient_norm(history: History, clip_norm: float, title: str) -> Any:
    """The gradient norm before clipping, and the norm above which it is scaled down."""
    steps, norms = history.series("gradient_norm")
    figure = figures.new_figure()
    axes = figure.add_subplot()
    axes.plot(steps, norms, linewidth=1.2, label="before clipping, mean of the steps between two records")
    axes.axhline(clip_norm, color="tab:red", linestyle="--", label=f"--clip-norm {clip_norm:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("norm of the gradient")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    axes.set_title(title)
    return figure

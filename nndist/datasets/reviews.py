"""Sentences of film reviews with ratings by people, embedded; movie_reviews.md names the source."""

import gzip
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nndist.data.ragged import Ragged

PATH = Path(__file__).with_name("movie_reviews.tsv.gz")
CLASSES = ("negative", "positive")
CLEAR = 0.5  # of 4: a mean rating nearer to 0 is neither
PAD, UNKNOWN = 0, 1
WEIGHT_PENALTY = 1e-4  # of the baseline; chosen on the validation part


@cache
def load_reviews() -> dict[str, tuple[list[str], list[int]]]:
    """Sentences and classes by part: every tenth sentence is in "test", every tenth in "val", the others in "train".

    A sentence that occurs twice is only in the part of its first place.
    """
    parts: dict[str, tuple[list[str], list[int]]] = {part: ([], []) for part in ("train", "val", "test")}
    seen = set()
    with gzip.open(PATH, "rt", encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file):
            rating, text = line.rstrip("\n").split("\t")
            if abs(float(rating)) < CLEAR or text.lower() in seen:
                continue
            seen.add(text.lower())
            texts, classes = parts[{0: "test", 5: "val"}.get(number % 10, "train")]
            texts.append(text)
            classes.append(int(float(rating) > 0))
    return parts


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, each exclamation and question mark, too."""
    spaced = "".join(c if c.isalnum() or c == "'" else f" {c} " if c in "!?" else " " for c in text.lower())
    return [word for word in (part.strip("'") for part in spaced.split()) if word]


def vocabulary(texts: Sequence[str], least: int) -> list[str]:
    """The words that occur at least `least` times, in the order of the alphabet."""
    counts = Counter(word for text in texts for word in words_of(text))
    return sorted(word for word, count in counts.items() if count >= least)


def encoded(texts: Sequence[str], classes: Sequence[int], words: Sequence[str]) -> Ragged:
    """Texts as numbers of words, from 2; PAD between, UNKNOWN for any other word, and for a text without words."""
    numbers = {word: number for number, word in enumerate(words, 2)}
    return Ragged([[numbers.get(word, UNKNOWN) for word in words_of(text)] or [UNKNOWN] for text in texts], classes)


def decoded(tokens: Tensor, words: Sequence[str]) -> str:
    """The words of a row of `encoded`, [length]; "?" for one that is not in the vocabulary."""
    return " ".join(words[n - 2] if n >= 2 else "?" for n in tokens.tolist() if n != PAD)


def bag_of_words(train: Ragged, test: Ragged, num_words: int) -> Tensor:
    """The baseline: the classes of `test`, int64 [len(test)], by logistic regression on the words' counts.

    num_words: the size of the vocabulary, without PAD and UNKNOWN. Fitted by L-BFGS to convergence.
    """
    # each part is one batch, of int64: tokens [examples, longest], padded with PAD; classes [examples]; lengths
    (known, labels, _), (asked, _, _) = (next(part.batches([torch.arange(len(part))])) for part in (train, test))
    weight, bias = torch.zeros(num_words + 2, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def logits(tokens: Tensor) -> Tensor:
        return F.embedding_bag(tokens, weight, mode="sum", padding_idx=PAD).squeeze(1) + bias

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logits(known), labels.float())
        loss = loss + WEIGHT_PENALTY * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():  # the recipe's figures are drawn with gradients disabled
        optimizer.step(closure)
    with torch.no_grad():
        return (logits(asked) > 0).long()

"""Lines of the Universal Declaration of Human Rights in twenty languages, embedded; see declaration.md."""

import gzip
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

NAME = "Declaration of Human Rights"
PATH = Path(__file__).with_name("declaration.tsv.gz")
Germanic = Literal["Danish", "Norwegian", "Swedish", "English", "Dutch", "German"]
Romance = Literal["French", "Italian", "Catalan", "Spanish", "Galician", "Portuguese"]
Slavic = Literal["Polish", "Czech", "Slovak", "Slovene", "Croatian", "Bulgarian", "Russian", "Ukrainian"]
Language = Literal[Germanic, Romance, Slavic]
LANGUAGES: tuple[str, ...] = get_args(Language)  # closely related ones are adjacent
TEST_ARTICLES = tuple(range(3, 31, 3))  # of 30; the preamble, article 0, is for training

WEIGHT_PENALTY = 1e-5  # of the baseline; 1e-6 to 3e-5 change its accuracy by less than 1 %


@dataclass(frozen=True)
class Lines:
    """Texts, and the language of each, int64 [number of texts], an index into LANGUAGES."""

    texts: list[str]
    labels: Tensor


@lru_cache
def paragraphs() -> list[tuple[str, int, str]]:
    """(language, article, text) of every paragraph."""
    rows = gzip.decompress(PATH.read_bytes()).decode().splitlines()
    return [(language, int(article), text) for language, article, text in (row.split("\t") for row in rows)]


def load_lines(max_words: int) -> tuple[Lines, Lines]:
    """Training and test lines: each paragraph is split evenly into lines of at most `max_words` words.

    An article is either for training or for the test, in all languages alike, so that no test sentence, nor a
    translation of it, is in training. Test lines that still match a training line letter by letter ("everyone has the
    right to") are left out.
    """
    parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for language, article, text in paragraphs():
        words = text.split()
        count = -(-len(words) // max_words)
        cuts = [number * len(words) // count for number in range(count + 1)]
        lines = [" ".join(words[start:stop]) for start, stop in pairwise(cuts)]
        parts[article in TEST_ARTICLES].extend((line, LANGUAGES.index(language)) for line in lines if letters(line))
    seen = {letters(line) for line, _ in parts[0]}
    unseen = [(line, label) for line, label in parts[1] if letters(line) not in seen]
    train, test = (
        Lines([line for line, _ in part], torch.tensor([label for _, label in part])) for part in (parts[0], unseen)
    )
    return train, test


def letters(line: str) -> str:
    """A line in lower case without digits and punctuation, its words separated by single spaces."""
    return " ".join("".join(c if c.isalpha() or c in "'’·" else " " for c in line.lower()).split())


def characters(texts: list[str]) -> Tensor:
    """The code points of each line's letters, with a space before and after, int16 [k, longest line], 0-padded."""
    lines = [torch.tensor([*map(ord, f" {letters(text)} ")], dtype=torch.int16) for text in texts]
    return pad_sequence(lines, batch_first=True)


def bag_of_words(train: Lines, test: Lines) -> Tensor:
    """The baseline: predictions of a logistic regression on word counts for the test lines, int64 [k].

    It is fitted to convergence, in a second or two; words that are not in training are ignored.
    """
    train_words, test_words = ([letters(text).split() for text in part.texts] for part in (train, test))
    number = {word: place for place, word in enumerate(sorted({w for words in train_words for w in words}), 1)}
    seen, unseen = (
        pad_sequence([torch.tensor([number.get(w, 0) for w in words]) for words in lines], batch_first=True)
        for lines in (train_words, test_words)
    )
    weight = torch.zeros(len(number) + 1, len(LANGUAGES), requires_grad=True)
    bias = torch.zeros(len(LANGUAGES), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def logits(words: Tensor) -> Tensor:
        return F.embedding_bag(words, weight, mode="sum", padding_idx=0) + bias

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits(seen), train.labels) + WEIGHT_PENALTY * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return logits(unseen).argmax(1)

"""Short pairs of two related languages, cut from the Declaration of Human Rights, and chrF, a score of translations."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from .declaration import TEST_ARTICLES, paragraphs

PAD, START, END, UNKNOWN = range(4)
LONGEST = 32  # characters of a pair's texts
ALIKE = 0.5  # edits by letter, below which two words are taken for translations of each other
ORDER, BETA = 6, 2.0  # of chrF: the longest n-grams, and how much more recall counts


@dataclass(frozen=True)
class Pairs:
    """Texts of the source language and their translations, to train on (they overlap) and to test on (they don't).

    dictionary: the commonest translation of each word of the training part, the baseline.
    """

    train: list[tuple[str, str]]
    test: list[tuple[str, str]]
    dictionary: dict[str, str]

    def numbered(self, numbers: Sequence[int]) -> list[tuple[str, str]]:
        """The pairs of these numbers, of which the test has the first."""
        count = len(self.test)
        return [self.test[number] if number < count else self.train[number - count] for number in numbers]


@cache
def load_pairs(source: str, target: str) -> Pairs:
    """The pairs of two languages. An article is for training or for the test, as `declaration.load_lines` has it."""
    texts = [
        {(article, place): text for article, place, text in _numbered(language) if article}
        for language in (source, target)
    ]
    train, test = [], []
    counts: dict[str, Counter[str]] = {}
    for article, place in sorted(texts[0].keys() & texts[1].keys()):
        pieces = aligned(*(words_of(each[article, place]) for each in texts))
        if article in TEST_ARTICLES:
            test += joined(pieces)
            continue
        train += [pair for first in range(len(pieces)) for pair in joined(pieces[first:], growing=True)]
        for mine, other in pieces:
            if len(mine) == len(other) == 1:
                counts.setdefault(mine[0], Counter())[other[0]] += 1
    known = set(train)
    dictionary = {word: max(sorted(found), key=found.__getitem__) for word, found in counts.items()}
    return Pairs(sorted(known), [pair for pair in dict.fromkeys(test) if pair not in known], dictionary)


def _numbered(language: str) -> list[tuple[int, int, str]]:
    """(article, place in it, text) of each paragraph."""
    seen: Counter[int] = Counter()
    found = []
    for spoken, article, text in paragraphs():
        if spoken == language:
            found.append((article, seen[article], text))
            seen[article] += 1
    return found


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    return re.findall(r"[^\W\d_]+(?:['’·-][^\W\d_]+)*['’]?", text.lower())


@cache
def difference(one: str, other: str) -> float:
    """Edits (Levenshtein 1966) from one word to another, by the letters of the longer one."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1] / max(len(one), len(other))


def aligned(source: Sequence[str], target: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """Both texts cut into the same number of pieces, each of which begins with two words that are alike.

    The words are matched in order with the fewest differences (dynamic programming); what has no match stays with the
    piece before it.
    """
    height, width = len(source) + 1, len(target) + 1
    cost = [[0.6 * (i + j) for j in range(width)] for i in range(height)]
    for i in range(1, height):
        for j in range(1, width):
            pair = cost[i - 1][j - 1] + difference(source[i - 1], target[j - 1])
            cost[i][j] = min(pair, cost[i - 1][j] + 0.6, cost[i][j - 1] + 0.6)
    i, j, starts = len(source), len(target), []
    while i and j:
        if cost[i][j] == cost[i - 1][j - 1] + difference(source[i - 1], target[j - 1]):
            i, j = i - 1, j - 1
            if difference(source[i], target[j]) <= ALIKE:
                starts.append((i, j))
        elif cost[i][j] == cost[i - 1][j] + 0.6:
            i -= 1
        else:
            j -= 1
    starts = [(0, 0), *(start for start in reversed(starts) if min(start)), (len(source), len(target))]
    return [(list(source[a:c]), list(target[b:d])) for (a, b), (c, d) in pairwise(starts) if c > a and d > b]


def joined(pieces: Sequence[tuple[list[str], list[str]]], *, growing: bool = False) -> list[tuple[str, str]]:
    """Neighbouring pieces joined to texts of at most LONGEST characters, as long as can be; pieces that are longer are
    left out. With `growing` all that begin with the first piece."""
    found: list[tuple[str, str]] = []
    texts = ("", "")
    for mine, other in pieces:
        longer = (f"{texts[0]} {' '.join(mine)}".strip(), f"{texts[1]} {' '.join(other)}".strip())
        fits = max(map(len, longer)) <= LONGEST
        if growing and not fits:
            return found
        if growing and fits:
            found.append(longer)
        if not fits and texts[0]:
            found.append(texts)
        texts = longer if fits else (" ".join(mine), " ".join(other))
        if max(map(len, texts)) > LONGEST:
            texts = ("", "")
    return found if growing or not texts[0] else [*found, texts]


def alphabet(pairs: Sequence[tuple[str, str]]) -> str:
    """All characters of the pairs, in order."""
    return "".join(sorted({c for pair in pairs for text in pair for c in text}))


def encoded(texts: Sequence[str], letters: str) -> Tensor:
    """Texts as numbers of characters, int64 [k, LONGEST + 1], with END after the last and PAD after that."""
    numbers = {letter: number for number, letter in enumerate(letters, UNKNOWN + 1)}
    rows = torch.full((len(texts), LONGEST + 1), PAD)
    for row, text in zip(rows, texts, strict=True):
        line = [*(numbers.get(c, UNKNOWN) for c in text[:LONGEST]), END]
        row[: len(line)] = torch.tensor(line)
    return rows


def tensors(pairs: Sequence[tuple[str, str]], letters: str, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides of pairs as `encoded` has them, and their numbers from `first` on, int64 [k]."""
    source, target = (encoded([pair[side] for pair in pairs], letters) for side in (0, 1))
    return source, target, torch.arange(first, first + len(pairs))


def decoded(tokens: Tensor, letters: str) -> str:
    """The text of numbers of characters, [length], up to END."""
    row = tokens.tolist()
    row = row[: row.index(END)] if END in row else row
    return "".join(letters[number - UNKNOWN - 1] if number > UNKNOWN else "" for number in row)


def cut(text: str) -> list[str]:
    """A text's words in lower case, joined to texts of at most LONGEST characters."""
    parts = [""]
    for word in words_of(text):
        longer = f"{parts[-1]} {word}".strip()
        parts = [*parts[:-1], longer] if len(longer) <= LONGEST or not parts[-1] else [*parts, word]
    return parts


def translated(network: nn.Module, text: str, letters: str) -> str:
    """A text of any length, translated part by part, each of at most LONGEST characters."""
    source = encoded(cut(text), letters).to(next(network.parameters()).device)
    return " ".join(decoded(row, letters) for row in network(source).argmax(2))


def by_words(text: str, dictionary: dict[str, str]) -> str:
    """The baseline: word by word, by the dictionary; what it lacks stays as it is."""
    return " ".join(dictionary.get(word, word) for word in text.split())


def chrf_counts(said: str, truth: str) -> Tensor:
    """For n-grams of 1 to ORDER characters, without spaces: those that agree, in `said`, in `truth`; [ORDER, 3]."""
    one, other = said.replace(" ", ""), truth.replace(" ", "")
    rows = []
    for n in range(1, ORDER + 1):
        a, b = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (one, other))
        rows.append([(a & b).total(), a.total(), b.total()])
    return torch.tensor(rows, dtype=torch.float64)


def chrf(counts: Tensor) -> float:
    """chrF2 from 0 to 100 (Popovic 2015) of the sum of `chrf_counts` over all texts, as sacrebleu computes it."""
    scores = []
    for agree, said, truth in counts.tolist():
        if said and truth:
            precision, recall = agree / said, agree / truth
            both = BETA**2 * precision + recall
            scores.append((1 + BETA**2) * precision * recall / both if both else 0.0)
    return 100 * sum(scores) / len(scores) if scores else 0.0


def compared(
    said: Tensor, letters: str, dictionary: dict[str, str], pairs: Sequence[Sequence[str]]
) -> dict[str, Tensor]:
    """`chrf_counts` of a network's outputs, [k, length], and of both baselines, each summed over the k pairs."""
    found = {name: torch.zeros(ORDER, 3, dtype=torch.float64) for name in ("network", "words", "copy")}
    for row, (source, truth) in zip(said, pairs, strict=True):
        answers = {"network": decoded(row, letters), "words": by_words(source, dictionary), "copy": source}
        for name, answer in answers.items():
            found[name] += chrf_counts(answer, truth)
    return found

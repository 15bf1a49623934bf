"""A person's own texts: lines of a CSV file with their classes, or a folder of documents, as tokens.

Token 0 is the end of a text and padding; the others are bytes, or byte pairs that the training texts have most often
(Sennrich et al. 2016, https://arxiv.org/abs/1508.07909), by the package tokenizers. So any text can be encoded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nndist.data.ragged import Ragged
from nndist.data.sets import Tensors
from nndist.errors import UserError
from nndist.files import printable, read_bytes

from . import declaration
from .table_sets import classes_of, split
from .tables import is_gap, read_table

END = 0
BYTES = 256
MAX_BYTES = 1 << 30
SUFFIXES = {".txt", ".md", ".rst", ".tex", ".py", ".c", ".h", ".rs", ".js", ".html", ".csv", ".tsv", ".json"}


class Codec:
    """Text to tokens and back. learned: the JSON of a tokenizer, kept in the run; "" for plain bytes."""

    def __init__(self, learned: str = ""):
        self.learned = learned

    @classmethod
    def fit(cls, texts: Sequence[str], vocabulary: int) -> Codec:
        """The byte pairs of texts; raises UserError if the package tokenizers is missing."""
        if vocabulary < BYTES:
            raise UserError(f"--vocabulary {vocabulary}: must be at least {BYTES}, the bytes")
        if vocabulary == BYTES:
            return cls()
        tokenizers = _package()
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocabulary + 1, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(texts, trainer)
        return cls(made.to_str())

    @cached_property
    def _tokenizer(self) -> Any:
        return _package().Tokenizer.from_str(self.learned) if self.learned else None

    def __len__(self) -> int:
        """The number of different tokens, END included."""
        return self._tokenizer.get_vocab_size() if self.learned else 1 + BYTES

    def encode(self, text: str) -> list[int]:
        if self.learned:  # a text that contains the special token's name is no end
            return [token for token in self._tokenizer.encode(text).ids if token != END]
        return [1 + byte for byte in text.encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        tokens = [token for token in tokens if token != END]
        if self.learned:
            return self._tokenizer.decode(tokens)
        return bytes(token - 1 for token in tokens).decode(errors="replace")


def _package() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork of workers
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise UserError(
            f"byte pairs need the package tokenizers: pip install tokenizers; or read bytes by --vocabulary {BYTES}"
        ) from None
    return tokenizers


@dataclass
class Found:
    """Texts to learn from; classes: none for documents, whose next tokens are learned."""

    codec: Codec
    train: Ragged
    test: Ragged
    classes: list[str]
    source: str
    plan: dict[str, str]


def load_lines(
    path: Path | None, text: str | None, target: str | None, vocabulary: int, context: int, test_share: float
) -> Found:
    """The lines of a CSV or TSV file: a column of texts and one of classes; without a file those of 20 languages."""
    if path is None:
        parts = declaration.load_lines(4)
        texts, labels = zip(*((list(part.texts), part.labels.tolist()) for part in parts), strict=True)
        return _lines(texts, labels, list(declaration.LANGUAGES), declaration.NAME, "by article", vocabulary, context)
    table = read_table(path)
    for flag, name in (("--text", text), ("--target", target)):
        if name not in table.names:
            there = ", ".join(map(printable, table.names))
            raise UserError(f"{flag}{f' {printable(name)}' if name else ''}: name a column of {path}: {there}")
    assert text is not None and target is not None
    pairs = [pair for pair in zip(table.column(text), table.column(target), strict=True) if not is_gap(pair[1])]
    if len(pairs) < 10:
        raise UserError(f"--csv {path}: has {len(pairs)} lines with a target; there must be at least 10")
    goals = [goal for _, goal in pairs]
    classes = classes_of(goals, "classes", f"--target {printable(target)}")
    places = {name: number for number, name in enumerate(classes)}
    sets = split(goals, len(pairs), test_share, False)
    texts = tuple([pairs[n][0] for n in numbers] for numbers in sets)
    labels = tuple([places[goals[n]] for n in numbers] for numbers in sets)
    said = f"{test_share:.0%} of each class of {len(pairs):,} lines to test on, drawn by number"
    return _lines(texts, labels, classes, path.name, said, vocabulary, context)


def _lines(
    texts: Sequence[Sequence[str]],
    labels: Sequence[Sequence[int]],
    classes: list[str],
    source: str,
    said: str,
    vocabulary: int,
    context: int,
) -> Found:
    """Classified lines as tokens, at most `context` each; texts and labels: of the training and the test set.

    said: how the lines were split, for the plan.
    """
    codec = Codec.fit(texts[0], vocabulary)
    tokens = [[codec.encode(line) or [END] for line in lines] for lines in texts]  # an empty line needs one token
    num_cut = sum(len(line) > context for lines in tokens for line in lines)
    train, test = (Ragged([t[:context] for t in lines], ls) for lines, ls in zip(tokens, labels, strict=True))
    plan = {"classes": f"{len(classes)}", "split": said, "tokens": _tokens_text(codec, train, texts[0])}
    if num_cut:
        plan["cut"] = f"{num_cut:,} lines have more than --context {context} tokens; the rest is not read"
    return Found(codec, train, test, classes, source, plan)


def load_folder(folder: Path, vocabulary: int, context: int, test_share: float) -> Found:
    """The documents of a folder, in parts of `context` tokens; the last in order of name are the test set."""
    folder = folder.expanduser()
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    paths = sorted(found, key=lambda path: path.relative_to(folder).parts)  # Windows compares paths without case
    if not paths:
        raise UserError(f"--folder {folder}: holds no texts ({', '.join(sorted(SUFFIXES))})")
    texts = []
    for path in paths:
        try:
            texts.append(read_bytes(path, MAX_BYTES).decode("utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UserError(f"--folder {folder}: {printable(path.name)} can't be read ({reason})") from error
    texts = [text for text in texts if text.strip()]
    said = f"the last {test_share:.0%} of the documents' characters to test on"
    total = sum(map(len, texts))
    train, test = [], []
    seen = 0
    for text in texts:  # a document on the border is cut in two
        border = min(len(text), max(0, round((1 - test_share) * total) - seen))
        train += [text[:border]] if border else []
        test += [text[border:]] if border < len(text) else []
        seen += len(text)
    if not train or not test:
        raise UserError(f"--folder {folder}: holds too little text to learn from and to test on")
    codec = Codec.fit(train, vocabulary)
    sets = [Ragged(parts := _parts(codec, some, context), [0] * len(parts)) for some in (train, test)]
    plan = {"split": said, "tokens": _tokens_text(codec, sets[0], train)}
    return Found(codec, sets[0], sets[1], [], f"{len(texts):,} texts of {folder.absolute().name}", plan)


def _parts(codec: Codec, texts: Sequence[str], context: int) -> list[list[int]]:
    """Each text between two ENDs, in parts of context + 1 tokens, of which the next begins with the last one's end."""
    parts = []
    for text in texts:
        tokens = [END, *codec.encode(text), END]
        parts += [tokens[start : start + context + 1] for start in range(0, len(tokens) - 1, context)]
    return parts


def _tokens_text(codec: Codec, examples: Ragged, texts: Sequence[str]) -> str:
    size = sum(len(text.encode()) for text in texts) / max(1, int(examples.lengths.sum()))
    lengths = f"{int(examples.lengths.median())} tokens (median), at most {int(examples.lengths.max())}"
    return f"{len(codec):,} different, {size:.2f} bytes each on average; an example has {lengths}"


def continued(network: nn.Module, codec: Codec, text: str, count: int, context: int, generator: torch.Generator) -> str:
    """What a network of next tokens writes after a text: `count` tokens, drawn at a temperature of 0.8."""
    tokens = [END, *codec.encode(text)]
    start = len(tokens)
    device = next(network.parameters()).device
    while len(tokens) < start + count:
        window: Tensor = torch.tensor([tokens[-context:]], device=device)
        chances = (network(window)[0, -1].float().cpu() / 0.8).softmax(0)
        tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
        if tokens[-1] == END:
            break
    return codec.decode(tokens[start:])


def with_classes(batch: Tensors) -> Tensors:
    """(tokens, classes) of a batch of lines."""
    return batch[:2]


def with_lengths(batch: Tensors) -> Tensors:
    """(tokens, lengths) of a batch of documents' parts."""
    return batch[0], batch[2]


def samples(network: nn.Module, codec: Codec, context: int) -> str:
    """Two texts that a network of next tokens writes from nothing."""
    generator = torch.Generator().manual_seed(0)
    return "\n---\n".join(continued(network, codec, "", 100, context, generator) for _ in range(2))


def padded(codec: Codec, lines: Sequence[str], context: int) -> Tensor:
    """Texts as one tensor of tokens, int64 [k, longest]."""
    encoded = Ragged([codec.encode(line)[:context] or [END] for line in lines], [0] * len(lines))
    return next(encoded.batches([torch.arange(len(lines))]))[0]

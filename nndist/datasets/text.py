"""Texts for character models: a file or the embedded novel, its vocabulary and windows; and sampling from a model.

The last tenth of a text is its validation part; as an evaluated set it is named "test", as in all recipes. The embedded
novel is described in pride_and_prejudice.md.
"""

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nndist.data.config import DataConfig
from nndist.data.sets import Data, Resident, Tensors
from nndist.errors import UserError
from nndist.files import read_bytes
from nndist.prediction.inputs import Answers, Inputs
from nndist.recipe.contract import Networks

EMBEDDED_PATH = Path(__file__).with_name("pride_and_prejudice.txt.gz")
EMBEDDED_TITLE = "Pride and Prejudice"
MAX_BYTES = 1 << 30  # of a text
TEMPERATURES = (0.3, 0.7, 1.0)
UNKNOWN = 0
"""The symbol of every character that is not in the training part; shown as U+FFFD and never sampled."""

Advance = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""The method `advance` of a network that writes text: symbols int64 [k, t] and the state before them (None at the
start) -> logits of the next symbol, [k, symbols], and the state after them."""


@dataclass(frozen=True)
class Corpus:
    """A text as symbols: 0 for unknown characters, then the characters of the training part in Unicode order.

    train, test: its first nine tenths and the rest, uint8 [n], or int32 if there are more than 256 symbols.
    """

    title: str
    characters: str
    train: Tensor
    test: Tensor

    @property
    def num_symbols(self) -> int:
        """The number of symbols, including the unknown one."""
        return len(self.characters) + 1

    def decode(self, symbols: Tensor) -> str:
        """The text of symbols [n]; the one after the last character, a mask, as an underscore."""
        table = "\N{REPLACEMENT CHARACTER}" + self.characters + "_"
        return "".join(table[symbol] for symbol in symbols.tolist())


def read_corpus(path: Path | str | None) -> Corpus:
    """The UTF-8 text of a file, or the embedded novel if `path` is None; cached while the file is unchanged.

    Raises UserError if it can't be read, is not UTF-8, or has fewer than ten characters.
    """
    if path is None:
        return _corpus(EMBEDDED_PATH, EMBEDDED_TITLE, 0)
    file = Path(path).expanduser()
    try:
        return _corpus(file, file.name, file.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"--text {path}: cannot be read ({error.strerror}); name a UTF-8 text file") from error


def chosen_corpus(config: DataConfig, path: Path | str | None) -> Corpus:
    """`read_corpus(path)`; raises UserError if the run's --data-source contradicts it."""
    if config.source not in ("auto", "sample"):
        raise UserError(f"--data-source {config.source}: this recipe learns a text; name one with --text FILE instead")
    if config.source == "sample" and path is not None:
        raise UserError(f"--text {path}: --data-source sample is the embedded text; give only one of the two")
    return read_corpus(path)


def check_heads(recipe: Any) -> None:
    """Raises UserError for a width that is no multiple of the number of attention heads."""
    if recipe.width % recipe.num_heads:
        raise UserError(f"--width {recipe.width}: must be a multiple of --num-heads {recipe.num_heads}")


def check_sizes(recipe: Any, *names: str) -> None:
    """Does nothing; recipes in run folders of earlier versions call it."""


def windows(symbols: Tensor, length: int, *, shared: int = 0) -> Tensor:
    """Successive windows of `length` symbols, [n, length]; each begins with the last `shared` of the one before.

    A remainder that does not fill a window is dropped.
    """
    return symbols.unfold(0, length, length - shared).contiguous()


def window_sets(corpus: Corpus, length: int, *, shared: int = 0) -> tuple[Tensor, Tensor]:
    """The windows of the training part and of the validation part; none spans both.

    Raises UserError if a part does not fill one window.
    """
    if len(corpus.test) < length:
        raise UserError(
            f"{corpus.title}: too short, the last tenth of its {len(corpus.train) + len(corpus.test):,} characters "
            f"does not fill one window of {length}; take a longer --text or shorter windows"
        )
    return windows(corpus.train, length, shared=shared), windows(corpus.test, length, shared=shared)


def split_note(corpus: Corpus) -> str:
    """One line for the plan: what "test" is, and how many of its characters can't be predicted."""
    unknown = int((corpus.test == UNKNOWN).sum())
    strange = f"; {unknown:,} of them are unknown to the training part" if unknown else ""
    return f"set 'test' is the last tenth of the text, {len(corpus.test):,} characters{strange}"


def next_character_data(config: DataConfig, path: Path | str | None, length: int) -> Data:
    """Windows for next-character prediction: batches of (symbols, following symbols), [k, length].

    Each character but the first of a part is predicted once, from those before it in its window only. Raises UserError
    as `chosen_corpus` and `window_sets` do.
    """
    corpus = chosen_corpus(config, path)
    train, test = window_sets(corpus, length + 1, shared=1)

    def prepare(batch: Tensors) -> Tensors:
        symbols = batch[0].long()
        return symbols[:, :-1], symbols[:, 1:]

    sets, note = (Resident(train), Resident(test)), split_note(corpus)
    return Data(*sets, corpus.title, prepare, note=note, sequential=True, as_text=corpus.decode)


def next_character_losses(networks: Networks, batch: Tensors) -> Tensor:
    """Nats per character of the network "model" on a batch of `next_character_data`, [k, length]."""
    symbols, following = batch
    logits = networks["model"](symbols)
    return F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view_as(following)


def sample(network: nn.Module, prompt: Tensor, temperatures: Sequence[float], length: int, seed: int = 0) -> Tensor:
    """`length` symbols sampled after the prompt, int64 [t], at each temperature: [temperatures, length].

    `network.advance` is an `Advance`. torch's global random state is not used.
    """
    advance = cast(Advance, network.advance)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor(temperatures).unsqueeze(1)
    symbols, state = prompt.expand(len(temperatures), -1), None
    drawn = []
    for _ in range(length):
        logits, state = advance(symbols, state)
        logits = logits.float().cpu()  # the CPU's generator samples identically for every device
        logits[:, UNKNOWN] = -torch.inf
        symbols = torch.multinomial((logits / scale).softmax(1), 1, generator=generator).to(prompt.device)
        drawn.append(symbols)
    return torch.cat(drawn, 1)


def alphabet(recipe: Any) -> str:
    """The characters that a recipe with a field `text` learns, symbols 1, 2, ...: those of the training part.

    They are stored on the recipe and in its run, so that its networks can be built without the text.
    """
    if not getattr(recipe, "characters", ""):
        recipe.characters = read_corpus(recipe.text).characters
    return recipe.characters


def symbols_of(text: str, characters: str) -> Tensor:
    """A text as symbols, int64 [n]; characters that are not in the alphabet become UNKNOWN."""
    number = {character: place for place, character in enumerate(characters, 1)}
    return torch.tensor([number.get(character, UNKNOWN) for character in text], dtype=torch.int64)


def written(characters: str, network: nn.Module, inputs: Inputs) -> Answers:
    """A network's continuation of each text: `inputs.num` characters (200 by default) at temperature 0.7."""
    answers = []
    for text in inputs.texts():
        prompt = symbols_of(text, characters).to(inputs.device)
        drawn = sample(network, prompt, [0.7], inputs.num or 200, inputs.seed)[0]
        answers.append("".join(characters[symbol - 1] for symbol in drawn.tolist()))
    return Answers({"continuation": answers})


def filled_in(characters: str, network: nn.Module, length: int, inputs: Inputs) -> Answers:
    """Each text with every "_" filled in, all predicted at once, as in training.

    The mask is the symbol after the last character; the network reads at most `length` symbols.
    """

    def check(text: str) -> None:
        if "_" not in text:
            raise ValueError(f"{text!r}: has nothing to fill in; write _ for each character to predict")
        if len(text) > length:
            raise ValueError(f"{text!r}: longer than the {length} characters that the network reads")

    answers, chances = [], []
    for text in inputs.texts(check):
        symbols = symbols_of(text, characters)
        asked = torch.tensor([character == "_" for character in text])
        symbols[asked] = 1 + len(characters)
        logits = network(symbols.unsqueeze(0).to(inputs.device))[0].float().cpu()
        logits[:, UNKNOWN] = -torch.inf
        best = logits.softmax(1).max(1)
        said = torch.where(asked, best.indices, symbols).tolist()
        answers.append("".join(c if c != "_" else characters[s - 1] for c, s in zip(text, said, strict=True)))
        chances.append(float(best.values[asked].prod()))
    return Answers({"filled in": answers, "probability": chances})


def prompt_of(data: Data) -> Tensor:
    """The first 40 symbols of the validation part, int64 [40], or all of its first window if that has fewer."""
    return data.inputs(data.test, 0, 1)[0][0, :40]


def continuations(corpus: Corpus, network: nn.Module, data: Data, length: int = 400) -> str:
    """As text: the prompt and a network's continuation of it at each of TEMPERATURES."""
    prompt = prompt_of(data)
    drawn = sample(network, prompt, TEMPERATURES, length)
    parts = [f"prompt (from the validation part of {corpus.title}):\n{corpus.decode(prompt)}"]
    parts += [
        f"temperature {temperature:g}:\n{corpus.decode(row)}"
        for temperature, row in zip(TEMPERATURES, drawn, strict=True)
    ]
    return "\n\n".join(parts)


@lru_cache(maxsize=2)
def _corpus(file: Path, title: str, changed: int) -> Corpus:
    data = read_bytes(file, MAX_BYTES)
    if file == EMBEDDED_PATH:
        data = gzip.decompress(data)
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--text {file}: is not UTF-8 (byte 0x{data[error.start]:02x} at {error.start:,}); convert it"
        ) from error
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    cut = round(0.9 * len(codes))
    if len(codes) < 10:
        raise UserError(f"--text {file}: holds {len(codes)} characters; name a longer text")
    known = np.unique(codes[:cut])
    places = np.searchsorted(known, codes).clip(max=len(known) - 1)
    symbols = torch.from_numpy(np.where(known[places] == codes, places + 1, UNKNOWN))
    symbols = symbols.to(torch.uint8 if len(known) < 256 else torch.int32)
    return Corpus(title, "".join(map(chr, known.tolist())), symbols[:cut], symbols[cut:])

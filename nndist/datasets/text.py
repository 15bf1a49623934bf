"""Texts for character models: a file or the embedded novel, its vocabulary and its windows; and sampling from a model.

The last tenth of a text is its validation part. Every evaluated set has a name, and this one's is "test", as in all
recipes. The embedded novel is described in pride_and_prejudice.md.
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
from nndist.prediction.inputs import Answers, Inputs
from nndist.recipe.contract import Networks

EMBEDDED_PATH = Path(__file__).with_name("pride_and_prejudice.txt.gz")
EMBEDDED_TITLE = "Pride and Prejudice"
TEMPERATURES = (0.3, 0.7, 1.0)
UNKNOWN = 0
"""The symbol of every character that the training part does not hold; shown as U+FFFD and never sampled."""

Advance = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""What a network that writes text calls `advance`: symbols int64 [k, t] after a state (None: nothing was read yet)
-> logits of the next symbol, [k, symbols], and the state after them."""


@dataclass(frozen=True)
class Corpus:
    """A text as symbols: 0 for unknown characters, then the characters of the training part in the order of Unicode.

    train, test: its first nine tenths and the rest, uint8 [n], or int32 where there are more than 256 symbols.
    """

    title: str
    characters: str
    train: Tensor
    test: Tensor

    @property
    def num_symbols(self) -> int:
        """The characters and the unknown one."""
        return len(self.characters) + 1

    def decode(self, symbols: Tensor) -> str:
        """The text of symbols [n]."""
        table = "\N{REPLACEMENT CHARACTER}" + self.characters
        return "".join(table[symbol] for symbol in symbols.tolist())


def read_corpus(path: Path | str | None) -> Corpus:
    """The UTF-8 text of a file, or the embedded novel where `path` is None; a file is read once while it is unchanged.

    Raises UserError where it can't be read, is not UTF-8, or holds fewer than ten characters.
    """
    if path is None:
        return _corpus(EMBEDDED_PATH, EMBEDDED_TITLE, 0)
    file = Path(path).expanduser()
    try:
        return _corpus(file, file.name, file.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"--text {path}: cannot be read ({error.strerror}); name a UTF-8 text file") from error


def chosen_corpus(config: DataConfig, path: Path | str | None) -> Corpus:
    """`read_corpus(path)`, where the run's --data-source goes with it; raises UserError where it does not."""
    if config.source not in ("auto", "sample"):
        raise UserError(f"--data-source {config.source}: this recipe learns a text; name one with --text FILE instead")
    if config.source == "sample" and path is not None:
        raise UserError(f"--text {path}: --data-source sample is the embedded text; give only one of the two")
    return read_corpus(path)


def check_sizes(recipe: Any, *names: str) -> None:
    """Raises UserError for a size below 1, heads that don't share out the width, or a dropout that is no chance."""
    for name in names:
        if getattr(recipe, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(recipe, name)}: must be at least 1")
    if "num_heads" in names and recipe.width % recipe.num_heads:
        raise UserError(f"--width {recipe.width}: must be a multiple of --num-heads {recipe.num_heads}")
    if not 0 <= recipe.dropout < 1:
        raise UserError(f"--dropout {recipe.dropout}: must be at least 0 and less than 1")


def windows(symbols: Tensor, length: int, *, shared: int = 0) -> Tensor:
    """Successive windows of `length` symbols, [n, length]; each begins with the last `shared` ones of that before.

    What does not fill a window is left out.
    """
    return symbols.unfold(0, length, length - shared).contiguous()


def window_sets(corpus: Corpus, length: int, *, shared: int = 0) -> tuple[Tensor, Tensor]:
    """The windows of the training and of the validation part; none reaches from one into the other.

    Raises UserError where a part does not fill one window.
    """
    if len(corpus.test) < length:
        raise UserError(
            f"{corpus.title}: too short, the last tenth of its {len(corpus.train) + len(corpus.test):,} characters "
            f"does not fill one window of {length}; take a longer --text or shorter windows"
        )
    return windows(corpus.train, length, shared=shared), windows(corpus.test, length, shared=shared)


def split_note(corpus: Corpus) -> str:
    """One line for the plan: what "test" is, and which of its characters can't be foretold."""
    unknown = int((corpus.test == UNKNOWN).sum())
    strange = f"; {unknown:,} of them are unknown to the training part" if unknown else ""
    return f"set 'test' is the last tenth of the text, {len(corpus.test):,} characters{strange}"


def next_character_data(config: DataConfig, path: Path | str | None, length: int) -> Data:
    """Windows for models that foretell the next character: batches of (symbols, the symbols after them), [k, length].

    Each character but the first of a part is foretold once, from those before it in its window alone. Raises UserError
    as `chosen_corpus` and `window_sets` do.
    """
    corpus = chosen_corpus(config, path)
    train, test = window_sets(corpus, length + 1, shared=1)

    def prepare(batch: Tensors) -> Tensors:
        symbols = batch[0].long()
        return symbols[:, :-1], symbols[:, 1:]

    return Data(Resident(train), Resident(test), corpus.title, prepare, note=split_note(corpus), sequential=True)


def next_character_losses(networks: Networks, batch: Tensors) -> Tensor:
    """Nats per character of the network "model" on a batch of `next_character_data`, [k, length]."""
    symbols, following = batch
    logits = networks["model"](symbols)
    return F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view_as(following)


def sample(network: nn.Module, prompt: Tensor, temperatures: Sequence[float], length: int, seed: int = 0) -> Tensor:
    """`length` symbols after those of the prompt, int64 [t], drawn at each temperature: [temperatures, length].

    `network.advance` is an `Advance`. torch's global generators are left alone.
    """
    advance = cast(Advance, network.advance)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor(temperatures).unsqueeze(1)
    symbols, state = prompt.expand(len(temperatures), -1), None
    drawn = []
    for _ in range(length):
        logits, state = advance(symbols, state)
        logits = logits.float().cpu()  # drawn there with the CPU's generator: alike on every device
        logits[:, UNKNOWN] = -torch.inf
        symbols = torch.multinomial((logits / scale).softmax(1), 1, generator=generator).to(prompt.device)
        drawn.append(symbols)
    return torch.cat(drawn, 1)


def alphabet(recipe: Any) -> str:
    """The characters that a recipe with a field `text` learns, as symbols 1, 2, ...: those of its text's training part.

    The recipe keeps them, and so does its run: its networks can be made where the text is not at hand.
    """
    if not getattr(recipe, "characters", ""):
        recipe.characters = read_corpus(recipe.text).characters
    return recipe.characters


def symbols_of(text: str, characters: str) -> Tensor:
    """A text as symbols, int64 [n]; characters that the alphabet has not are UNKNOWN."""
    number = {character: place for place, character in enumerate(characters, 1)}
    return torch.tensor([number.get(character, UNKNOWN) for character in text], dtype=torch.int64)


def written(characters: str, network: nn.Module, inputs: Inputs) -> Answers:
    """What a network writes after each text, `inputs.num` characters (200) at temperature 0.7."""
    answers = []
    for text in inputs.texts():
        prompt = symbols_of(text, characters).to(inputs.device)
        drawn = sample(network, prompt, [0.7], inputs.num or 200, inputs.seed)[0]
        answers.append("".join(characters[symbol - 1] for symbol in drawn.tolist()))
    return Answers({"goes on": answers})


def filled_in(characters: str, network: nn.Module, length: int, inputs: Inputs) -> Answers:
    """Each text with a character in the place of every "_", all of them chosen at once, as training asks for them.

    The network reads the mask as the symbol after the last character, and at most `length` of them.
    """

    def check(text: str) -> None:
        if "_" not in text:
            raise ValueError(f"{text!r}: has nothing to fill in; write _ for each character that is asked for")
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
    """The first 40 symbols of the validation part, int64 [40], or all of its first window where that has fewer."""
    return data.inputs(data.test, 0, 1)[0][0, :40]


def continuations(corpus: Corpus, network: nn.Module, data: Data, length: int = 400) -> str:
    """The prompt and what a network writes after it at each of TEMPERATURES, for a person."""
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
    data = file.read_bytes()
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

"""A person's inputs to trained networks: images, numbers and texts, read as the networks need them."""

from __future__ import annotations

import contextlib
import csv
import inspect
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, first_tensor, tensors_of
from ..data.sets import Data, Resident, as_is
from ..errors import UserError
from ..files import open_regular, printable, read_bytes
from .answers import Answers
from .framing import Framing, framing_of
from .images import open_image, upright, why

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
IMAGES_AT_ONCE = 256
MAX_TEXT_BYTES = 1 << 30
FAR = 2.0  # times the width of a column's range
LOOKED_AT = 1000  # examples from which the framing of a set's images is inferred


class NothingToAnswer(Exception):
    """None of the inputs can be read; `failures` says why for each."""


class Inputs:
    """A person's inputs: a recipe's `predict` reads them in the form that it needs, and builds its answers.

    items: paths, "-" for standard input, or texts, as on a command line; from Python also PIL images, and tensors,
    arrays or lists of numbers. data: returns the recipe's Data. num: how many samples to generate if there are no
    inputs. columns: how many numbers make an input, for reading rows without the data; 0 for scalars without a
    dimension of their own. ranges: the lowest and highest number of each column that the networks were evaluated on; a
    number far beyond is noted in `notes`. Unreadable items are reported in `failures` and skipped.

    A recipe reads them with one of `batch`, `images`, `rows`, `records`, `texts` and `noise`, whose tensors are on the
    device, and answers with `classified`, `measured`, or custom Answers: one for each of `names`.
    """

    def __init__(
        self,
        items: Sequence[Any],
        *,
        data: Callable[[], Data],
        classes: Sequence[str] = (),
        device: torch.device | None = None,
        num: int | None = None,
        seed: int = 0,
        columns: int | None = None,
        ranges: Sequence[tuple[float, float]] = (),
    ):
        self.items = items
        self.columns = columns
        self.classes = classes
        self.device = device or torch.device("cpu")
        self.num = num
        self.generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.names: list[str] = []
        self.prepared: list[str] = []  # how an image was transformed
        self.shown: list[Tensor] = []  # images as the networks see them
        self.numbers: Tensor | None = None
        self.failures: list[str] = []
        self.notes: list[str] = []
        self._ranges = ranges
        self._places: list[str] = []  # of records
        self._data = data

    def __len__(self) -> int:
        return len(self.items)

    # Readers for `Recipe.predict`.

    def batch(self) -> Batch:
        """The inputs as a prepared batch like one of the recipe's test set; its labels and the like are meaningless.

        Images if the test set's inputs are, else numbers: one-dimensional from CSV, any shape from Python. [k, ...]
        each; raises UserError if there are more or fewer numbers than the network takes, or the test set's inputs are
        neither.
        """
        try:
            data = self._data()
        except UserError:
            if self.columns is None:
                raise
            given = self.rows(self.columns or 1)
            self._note_strange(given)
            return (given if self.columns else given.squeeze(1),)
        raw = next(iter(data.test.batches([torch.arange(1)])))
        first = first_tensor(raw, "the recipe's inputs: define predict() in the recipe to say how to read them")
        others = raw[1:]
        if self.items and _is_array(self.items[0]) and list(torch.as_tensor(self.items[0]).shape) == [*first.shape[1:]]:
            given = torch.stack([torch.as_tensor(item) for item in self.items]).to(first.dtype).to(self.device)
            self._name([f"input {number}" for number in range(1, len(given) + 1)])
        elif (framing := self._framing) is not None:
            given = framing.values(framing.stored(self.images(framing.see)), first.dtype)
        elif first.dim() <= 2:
            if not first.is_floating_point() and not isinstance(data.test, Resident):  # perhaps of any length
                raise UserError(
                    f"its inputs are {str(first.dtype).removeprefix('torch.')} and no images, such as codes of words: "
                    "define predict(self, networks, inputs) in the recipe to say how to read them"
                )
            given = self.rows(first.shape[1] if first.dim() == 2 else 1)
            if data.prepare is as_is:
                self._note_strange(given)
            given = given if first.dim() == 2 else given.squeeze(1)
            if not first.is_floating_point() and torch.equal(given, given.round()):
                given = given.to(first.dtype)
        else:
            raise UserError(
                f"its inputs are tensors of shape {list(first.shape[1:])}: define predict() in the recipe to say how "
                "to read them, or pass such tensors from Python"
            )
        return data.prepare((given, *(other.expand(len(given), *other.shape[1:]).clone() for other in others)))

    def _note_strange(self, rows: Tensor) -> None:
        """Notes the first number that lies far outside its column's range: perhaps `data` scales what it reads."""
        if len(self._ranges) != rows.shape[1]:
            return
        low, high = torch.tensor(self._ranges, dtype=torch.float64, device=rows.device).unbind(1)
        beyond = (rows < low - FAR * (high - low).clamp_min(1e-6)) | (rows > high + FAR * (high - low).clamp_min(1e-6))
        if not bool(beyond.any()):
            return
        row, column = beyond.nonzero()[0].tolist()
        self.notes.append(
            f"{self.names[len(self.names) - len(rows) + row]}: {rows[row, column]:g} in column {column + 1}, where the "
            f"networks were evaluated on {low[column]:.4g} to {high[column]:.4g}; if data() scales what it reads, let "
            "nndist.Scaled do it, which takes and gives measured units"
        )

    def only(self, *networks: nn.Module) -> Any:
        """The first part of `batch`, for networks of one input.

        Raises UserError as `batch` does, and if a network needs more inputs: it then says to define `predict`.
        """
        for network in networks:
            required = [
                one.name
                for one in inspect.signature(network.forward).parameters.values()
                if one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
            ]
            if len(required) > 1:
                raise UserError(
                    f"the network takes {len(required)} inputs ({', '.join(required)}): define predict(self, networks, "
                    "inputs) in the recipe to say how to read them"
                )
        return self.batch()[0]

    def images(self, see: Callable[[Image], tuple[Tensor, str]]) -> Tensor:
        """The images, uint8 [k, h, w] or [k, h, w, 3], each converted by `see`; unreadable files go to `failures`.

        see: PIL image, upright and without transparency -> its tensor, and what was done to it.
        """
        for item in self.items:
            name = str(item) if isinstance(item, str | Path) else f"image {len(self.names) + 1}"
            try:
                with _opened(item) as opened:
                    image = upright(opened)
            except MemoryError:
                raise
            except Exception as error:  # Pillow's decoders raise what they like
                self.failures.append(f"{printable(name)}: {why(error)}")
                continue
            try:
                tensor, done = see(image)
            except (OSError, ValueError) as error:
                self.failures.append(f"{printable(name)}: {why(error)}")
                continue
            self._name([name])
            self.prepared.append(done)
            self.shown.append(tensor)
        self._need_some("images: PNG or JPEG files, or folders of them")
        return torch.stack(self.shown[-len(self.names) :]).to(self.device)

    def rows(self, width: int) -> Tensor:
        """Rows of `width` numbers, float32 [k, width]; raises UserError for any other row.

        From CSV files (a header is skipped), standard input, numbers on the command line, or Python's.
        """
        rows = []
        for place, cells in self._cells():
            values = [_number(cell) for cell in cells]
            if None in values or len(values) != width:
                bad = f"{cells[values.index(None)]!r} is not a number" if None in values else f"{len(cells)} columns"
                raise UserError(f"{place}: {bad}; expected {width} number{'s' * (width > 1)} in each row")
            rows.append(values)
            self._name([place])
        self._need_some(f"rows of {width} number{'s' * (width > 1)}: a CSV file, - for standard input, or such as 0.5")
        self.numbers = torch.tensor(rows, dtype=torch.float32)
        return self.numbers.to(self.device)

    def records(self, columns: Sequence[str]) -> list[tuple[str, list[str]]]:
        """(place, cells) of each line of CSV; raises UserError if it lacks the given columns.

        With a header, columns may be in any order and there may be others; without one, they are in the given order.
        """
        found: list[tuple[str, list[str]]] = []
        order = list(range(len(columns)))
        width = len(columns)
        for place, cells in self._cells(names_too=True):
            if all(_number(cell) is None for cell in cells):
                if missing := [name for name in columns if name not in cells]:
                    raise UserError(f"{place}: has no column {missing[0]}; expected {', '.join(columns)}")
                order, width = [list(cells).index(name) for name in columns], len(cells)
                continue
            if len(cells) != width:
                raise UserError(f"{place}: {len(cells)} columns; expected {width}: {', '.join(columns)}")
            found.append((place, [cells[column] for column in order]))
        if not found:
            raise UserError(f"no inputs; give a CSV file, or - for standard input, of {', '.join(columns)}")
        self._places = [place for place, _ in found]
        return found

    def texts(self, check: Callable[[str], object] = str) -> list[str]:
        """Texts from the command line, the lines of files, or of standard input; raises UserError if there are none.

        A text for which `check` raises ValueError is reported in `failures` and skipped.
        """
        texts = []
        for item in self.items:
            lines = [str(item)]
            if str(item) == "-":
                lines = sys.stdin.read().splitlines()
            elif len(str(item)) < 4096 and "\n" not in str(item) and Path(str(item)).is_file():
                try:
                    lines = read_bytes(item, MAX_TEXT_BYTES).decode("utf-8-sig").splitlines()
                except (OSError, UnicodeDecodeError) as error:
                    self.failures.append(f"{item}: can't be read as UTF-8 ({error})")
                    continue
            for line in filter(str.strip, lines):
                try:
                    check(line)
                except ValueError as error:
                    self.failures.append(str(error))
                else:
                    texts.append(line)
        self._name(texts)
        self._need_some("texts, a file of lines, or - for standard input")
        return texts

    def noise(self, width: int, default_num: int = 16) -> Tensor:
        """Standard normal noise for `num` samples to generate, float32 [num, width]."""
        drawn = torch.randn(self.num or default_num, width, generator=self.generator)
        self._name([f"sample {number}" for number in range(1, len(drawn) + 1)])
        return drawn.to(self.device)

    # Answers for `Recipe.predict`.

    def classified(self, logits: Tensor) -> Answers:
        """The most likely class of each input and the runner-up, from logits or log-probabilities [k, classes]."""
        self.name_records()
        probabilities = logits.float().softmax(1).cpu()
        names = [str(c) for c in self.classes] or [str(c) for c in range(probabilities.shape[1])]
        likeliest = probabilities.topk(min(5, len(names)), 1)
        columns: dict[str, Sequence[Any]] = {
            "answer": [names[row[0]] for row in likeliest.indices.tolist()],
            "probability": likeliest.values[:, 0].tolist(),
        }
        if len(names) > 1:
            second = likeliest.values[:, 1].tolist()
            columns["or"] = [
                f"{names[row[1]]} {p:.1%}" for row, p in zip(likeliest.indices.tolist(), second, strict=True)
            ]
        every = range(len(names))
        details = [
            {"probabilities": {names[c]: row[c].item() for c in (every if len(names) <= 100 else best.tolist())}}
            for row, best in zip(probabilities, likeliest.indices, strict=True)
        ]
        return Answers(columns, details)

    def measured(self, outputs: Mapping[str, Tensor]) -> Answers:
        """The numbers that each network returns, [k] or [k, at most 16]; raises UserError for other shapes."""
        self.name_records()
        columns: dict[str, Any] = {}
        for name, values in outputs.items():
            if not isinstance(values, Tensor):
                raise UserError(
                    f"network {name!r} returns a {type(values).__name__} and not a tensor: define predict(self, "
                    "networks, inputs) in the recipe to say which part is the answer"
                )
            if values.is_complex():
                raise UserError(
                    f"network {name!r} returns complex numbers: define predict(self, networks, inputs) in the recipe, "
                    "and answer with such as their abs() or real"
                )
            label = "answer" if name == "model" else name
            flat = values.detach().float().cpu()
            flat = flat.flatten(1) if flat.dim() > 1 else flat.reshape(-1, 1)
            if not values.dim() or len(flat) != len(self.names) or flat.shape[1] > 16:
                raise UserError(
                    f"network {name!r} returns tensors of shape {list(values.shape)}: define predict() in the recipe "
                    "to say what they mean"
                )
            numbered = [label] if flat.shape[1] == 1 else [f"{label} {place + 1}" for place in range(flat.shape[1])]
            columns |= dict(zip(numbered, flat.T, strict=True))
        return Answers(columns)

    # Reading.

    def name_records(self) -> None:
        """Names the inputs by the places of the records that were read, unless the recipe has named them itself."""
        if not self.names:
            self.names += self._places

    def _name(self, names: Sequence[str]) -> None:
        self.names += names

    def _need_some(self, what: str) -> None:
        if self.names:
            return
        if not self.failures:
            raise UserError(f"no inputs; give {what}")
        raise NothingToAnswer

    @cached_property
    def _framing(self) -> Framing | None:
        """How the test set's images are framed, judged by its first examples; None if they are no images."""
        data = self._data()
        raw = next(iter(data.test.batches([torch.arange(min(LOOKED_AT, len(data.test)))])))
        images = next(iter(tensors_of(raw)), None)
        return framing_of(images.cpu()) if images is not None else None

    def _cells(self, *, names_too: bool = False) -> Iterator[tuple[str, Sequence[Any]]]:
        """(place, cells) of each line of numbers; a first line without any number is a header."""
        num_rows = 0
        for number, item in enumerate(self.items, 1):
            if _is_array(item):
                values = torch.as_tensor(item)
                for row in values.reshape(-1, values.shape[-1] if values.dim() else 1):
                    num_rows += 1
                    yield f"row {num_rows}", row.tolist()
                continue
            text, name = str(item), str(item)
            if text == "-":
                text, name = sys.stdin.read(), "standard input"
            elif Path(text).is_file():
                try:
                    text = read_bytes(text, MAX_TEXT_BYTES).decode("utf-8-sig")
                except (OSError, UnicodeDecodeError) as error:
                    raise UserError(f"{item}: can't be read as text ({error}); give a CSV file") from error
            elif all(_number(cell) is not None for cell in _split(text)):
                yield text, _split(text)
                continue
            else:
                raise UserError(f"{item}: input {number} is neither a file nor numbers")
            for line, row in enumerate(text.splitlines(), 1):
                cells = _split(row)
                is_names = line == 1 and all(_number(cell) is None for cell in cells)
                if not any(cells) or (is_names and not names_too):
                    continue
                yield f"{name}, line {line}", cells


def _split(line: str) -> list[str]:
    """The cells of a line, separated by commas, semicolons, tabs or spaces."""
    separator = next((s for s in ",;\t" if s in line), None)
    if separator is None:
        return line.split()
    return [cell.strip() for cell in next(csv.reader(io.StringIO(line), delimiter=separator))]


def _number(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if value - value == 0 else None  # neither nan nor infinite


def _is_array(item: Any) -> bool:
    return not isinstance(item, str | bytes | Path) and (
        isinstance(item, int | float | list | tuple | Tensor) or type(item).__module__ == "numpy"
    )


@contextlib.contextmanager
def _opened(item: Any) -> Iterator[Image]:
    from PIL import Image

    if isinstance(item, Image.Image):
        yield item
    elif _is_array(item):
        import numpy as np

        yield Image.fromarray(np.asarray(item).astype("uint8"))
    else:
        with open_regular(item) as file, open_image(file) as image:
            yield image


def expanded(items: Sequence[Any]) -> list[Any]:
    """The items, with each folder replaced by its image files; raises UserError if it has none."""
    found: list[Any] = []
    for item in items:
        if isinstance(item, str | Path) and str(item) not in ("", "-") and len(str(item)) < 4096:
            with contextlib.suppress(OSError):
                if Path(item).is_dir():
                    files = sorted(path for path in Path(item).iterdir() if path.suffix.lower() in SUFFIXES)
                    if not files:
                        raise UserError(f"{item}: holds no images ({', '.join(sorted(SUFFIXES))})")
                    found += files
                    continue
        found.append(item)
    return found


def parts(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The items in the portions that a recipe gets: images in batches, so that any number of them fits in memory."""
    as_images = all(isinstance(i, str | Path) and Path(str(i)).suffix.lower() in SUFFIXES for i in items)
    size = IMAGES_AT_ONCE if as_images else max(1, len(items))
    for start in range(0, max(1, len(items)), size):
        yield items[start : start + size]

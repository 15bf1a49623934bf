"""What a person gives to trained networks and what these answer: images, numbers and texts; tables and pictures."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data import Data, Tensors
from .errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
MAX_DRAWN = 100
IMAGES_AT_ONCE = 256
LOOKED_AT = 1000  # examples by which it is found out how the images of a set lie in their frames


class NothingToAnswer(Exception):
    """None of the inputs can be read; why has been noted for each."""


@dataclass
class Answers:
    """What networks answer to k inputs.

    columns: values by name, k of each, for a table. details: what only a program wants, a dict for each input.
    images: what the networks have made, [k, h, w] or [k, h, w, 3], ink or colours from 0 to 1.
    """

    columns: Mapping[str, Sequence[Any] | Tensor]
    details: Sequence[Mapping[str, Any]] = ()
    images: Tensor | None = None


class Inputs:
    """What a person has given: a recipe's `predict` reads it as what it needs, and makes its answers.

    items: paths, "-" for standard input, or texts, as a command line has them; from Python also images of PIL, and
    tensors, arrays or lists of numbers. data: gives the recipe's Data. num: how many things are to be made, where there
    are no inputs. Whatever can't be read is noted in `failures`, and the others go on.
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
    ):
        self.items = items
        self.classes = classes
        self.device = device or torch.device("cpu")
        self.num = num
        self.generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.names: list[str] = []
        self.prepared: list[str] = []  # what had to be done to an image
        self.shown: list[Tensor] = []  # images as the networks see them
        self.numbers: Tensor | None = None
        self.failures: list[str] = []
        self._data = data

    def __len__(self) -> int:
        return len(self.items)

    # What `Recipe.predict` asks for.

    def batch(self) -> Tensors:
        """The inputs as a prepared batch, like one of the recipe's test set; its labels and the like mean nothing.

        Images where the test set's are, else numbers: of one dimension from CSV, of any from Python.
        """
        data = self._data()
        first, *others = next(iter(data.test.batches([torch.arange(1)])))
        if self.items and _is_array(self.items[0]) and list(torch.as_tensor(self.items[0]).shape) == [*first.shape[1:]]:
            given = torch.stack([torch.as_tensor(item) for item in self.items]).to(first.dtype).to(self.device)
            self._name([f"input {number}" for number in range(1, len(given) + 1)])
        elif (framing := self._framing) is not None:
            given = framing.stored(self.images(framing.see)).to(first.dtype)
            given = given / 255 if first.is_floating_point() else given
        elif first.dim() <= 2:
            given = self.rows(first.shape[1] if first.dim() == 2 else 1)
            given = given if first.dim() == 2 else given.squeeze(1)
        else:
            raise UserError(
                f"its inputs are tensors of shape {list(first.shape[1:])}: define predict() in the recipe to say how "
                "to read them, or give such tensors from Python"
            )
        return data.prepare((given, *(other.expand(len(given), *other.shape[1:]).clone() for other in others)))

    def images(self, see: Callable[[Image], tuple[Tensor, str]]) -> Tensor:
        """The images as `see` makes them of PIL's (upright, without transparency): the tensor, and what it did.

        uint8 [k, h, w] or [k, h, w, 3]; a file that can't be read is noted.
        """
        from PIL import Image, ImageOps

        for item in self.items:
            name = str(item) if isinstance(item, str | Path) else f"image {len(self.names) + 1}"
            try:
                with _opened(item) as opened:
                    image = ImageOps.exif_transpose(opened)
                    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                        colours = image.convert("RGBA")
                        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
                    tensor, done = see(image)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                why = getattr(error, "strerror", None) or "is no image that can be read"
                self.failures.append(f"{name}: {why}")
                continue
            self._name([name])
            self.prepared.append(done)
            self.shown.append(tensor)
        self._need_some("images: PNG or JPEG files, or folders of them")
        return torch.stack(self.shown[-len(self.names) :]).to(self.device)

    def rows(self, width: int) -> Tensor:
        """Rows of `width` numbers, float32 [k, width]: from CSV files (a first line of names is left out), standard
        input, numbers as they stand, or Python's; raises UserError for a row that is not so."""
        rows = []
        for place, cells in self._cells():
            values = [_number(cell) for cell in cells]
            if None in values or len(values) != width:
                bad = f"{cells[values.index(None)]!r} is no number" if None in values else f"{len(cells)} columns"
                raise UserError(f"{place}: {bad}; expected {width} number{'s' * (width > 1)} in each row")
            rows.append(values)
            self._name([place])
        self._need_some(f"rows of {width} number{'s' * (width > 1)}: a CSV file, - for standard input, or such as 0.5")
        self.numbers = torch.tensor(rows, dtype=torch.float32)
        return self.numbers.to(self.device)

    def records(self, columns: Sequence[str]) -> list[tuple[str, list[str]]]:
        """(place, cells) of each line of CSV; raises UserError where it has not the given columns.

        A first line of names may give them in another order, and others besides; without it they stand in this order.
        """
        found = []
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
        return found

    def texts(self, check: Callable[[str], object] = str) -> list[str]:
        """Texts as they stand, the lines of a file, or of standard input; one of which `check` raises ValueError is
        noted and left out."""
        texts = []
        for item in self.items:
            lines = [str(item)]
            if str(item) == "-":
                lines = sys.stdin.read().splitlines()
            elif len(str(item)) < 4096 and "\n" not in str(item) and Path(str(item)).is_file():
                try:
                    lines = Path(item).read_text(encoding="utf-8").splitlines()
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
        """Normally distributed numbers for `num` things to be made of nothing, [num, width]."""
        drawn = torch.randn(self.num or default_num, width, generator=self.generator)
        self._name([f"sample {number}" for number in range(1, len(drawn) + 1)])
        return drawn.to(self.device)

    # What it answers with.

    def classified(self, logits: Tensor) -> Answers:
        """The likeliest class of each input, of logits or logarithms of probabilities [k, classes], and the next."""
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
        """The numbers that each network gives, [k] or [k, a few]."""
        columns: dict[str, Any] = {}
        for name, values in outputs.items():
            label = "answer" if name == "model" else name
            flat = values.detach().float().cpu().flatten(1) if values.dim() > 1 else values.float().cpu().unsqueeze(1)
            if len(flat) != len(self.names) or flat.shape[1] > 16:
                raise UserError(
                    f"network {name!r} gives tensors of shape {list(values.shape)}: define predict() in the recipe to "
                    "say what they mean"
                )
            numbered = [label] if flat.shape[1] == 1 else [f"{label} {place + 1}" for place in range(flat.shape[1])]
            columns |= dict(zip(numbered, flat.T, strict=True))
        return Answers(columns)

    # Reading.

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
        data = self._data()
        images = next(iter(data.test.batches([torch.arange(min(LOOKED_AT, len(data.test)))])))[0]
        return framing_of(images.cpu())

    def _cells(self, *, names_too: bool = False) -> Iterator[tuple[str, Sequence[Any]]]:
        """(place, cells) of each line of numbers; a first line of a file without any number is one of names."""
        for number, item in enumerate(self.items, 1):
            if _is_array(item):
                values = torch.as_tensor(item)
                for row in values.reshape(-1, values.shape[-1] if values.dim() else 1):
                    yield f"row {len(self.names) + 1}", row.tolist()
                continue
            text, name = str(item), str(item)
            if text == "-":
                text, name = sys.stdin.read(), "standard input"
            elif Path(text).is_file():
                try:
                    text = Path(text).read_text(encoding="utf-8-sig")
                except (OSError, UnicodeDecodeError) as error:
                    raise UserError(f"{item}: can't be read as text ({error}); give a CSV file") from error
            elif all(_number(cell) is not None for cell in _split(text)):
                yield text, _split(text)
                continue
            else:
                raise UserError(f"{item}: input {number} is no such file, and no numbers either")
            for line, row in enumerate(text.splitlines(), 1):
                cells = _split(row)
                is_names = line == 1 and all(_number(cell) is None for cell in cells)
                if not any(cells) or (is_names and not names_too):
                    continue
                yield f"{name}, line {line}", cells


def _split(line: str) -> list[str]:
    """The cells of a line, between commas, semicolons, tabs or spaces."""
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
        with Image.open(item) as image:
            yield image


# Images as a set has them.


@dataclass(frozen=True)
class Framing:
    """How the images of a set lie in their frames, so that others can be laid alike.

    height, width: pixels. layout: "hw", "hwc" or "chw". background: 0 or 255 where they are drawn on black or on white,
    None for photographs. box: the longer side of what is drawn. centre: the row and column of its centre of mass, where
    the set's images agree on it (MNIST's do); else the middle of the box is put into the middle.
    """

    height: int
    width: int
    layout: str
    background: int | None = None
    box: int = 0
    centre: tuple[float, float] | None = None

    def see(self, image: Image) -> tuple[Tensor, str]:
        """An image in this frame, uint8 [h, w] or [h, w, 3], and what was done to it."""
        import numpy as np

        size, done = image.size, []
        if image.mode.startswith(("I", "F")):  # 16 bits or more
            values = np.asarray(image, dtype=np.float32)
            pixels = 255 * (values - values.min()) / max(1e-6, float(np.ptp(values)))
        else:
            pixels = np.asarray(image.convert("L" if self.layout == "hw" else "RGB"), dtype=np.float32)
        if self.layout == "hw" and pixels.ndim == 2 and self.background is not None:
            edge = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]))
            if (edge > 127) != (self.background > 127):
                pixels = 255 - pixels
                done.append("inverted")
        if size != (self.width, self.height):
            done.insert(0, f"{size[0]}x{size[1]} scaled")
            drawn = self._laid(pixels) if self.layout == "hw" and self.background is not None else None
            pixels = drawn if drawn is not None else self._fitted(pixels)
        return torch.from_numpy(pixels.round().clip(0, 255).astype("uint8")), ", ".join(done)

    def _fitted(self, pixels: Any) -> Any:
        """All of a picture in the frame, its shape kept; what is left over is of the colour of its edge."""
        import numpy as np

        scale = min(self.height / pixels.shape[0], self.width / pixels.shape[1])
        height, width = (max(1, round(scale * length)) for length in pixels.shape[:2])
        edge = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
        frame = np.empty((self.height, self.width, *pixels.shape[2:]), dtype=np.float32)
        frame[:] = edge
        top, left = (self.height - height) // 2, (self.width - width) // 2
        frame[top : top + height, left : left + width] = _resized(pixels, height, width)
        return frame

    def _laid(self, pixels: Any) -> Any:
        """What is drawn in a picture, cut out, scaled to the box and put where the set has it; None where it is empty.

        A photograph's paper is not all of one brightness: what differs little from its edge is taken for paper.
        """
        import numpy as np

        ink = pixels if self.background == 0 else 255 - pixels
        paper = float(np.median(np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])))
        darkest = float(np.quantile(ink, 0.995)) if ink.size > 2000 else float(ink.max())
        darkest = max(darkest, paper + 0.5 * (float(ink.max()) - paper))
        if darkest - paper < 24:
            return None
        ink = ((ink - paper) / (darkest - paper)).clip(0, 1)
        ink[ink < 0.2] = 0
        rows, columns = np.nonzero((ink > 0.5).any(1))[0], np.nonzero((ink > 0.5).any(0))[0]
        ink = ink[max(0, rows[0] - 1) : rows[-1] + 2, max(0, columns[0] - 1) : columns[-1] + 2]
        scale = self.box / max(ink.shape)
        height, width = (max(1, round(scale * length)) for length in ink.shape)
        ink = _resized(255 * ink, height, width).clip(0, 255)
        top, left = (self.height - height) / 2, (self.width - width) / 2
        if self.centre is not None and ink.sum() > 0:
            top = self.centre[0] - float((ink.sum(1) * np.arange(height)).sum() / ink.sum())
            left = self.centre[1] - float((ink.sum(0) * np.arange(width)).sum() / ink.sum())
        top = min(max(0, round(top)), self.height - height)
        left = min(max(0, round(left)), self.width - width)
        frame = np.zeros((self.height, self.width), dtype=np.float32)
        frame[top : top + height, left : left + width] = ink
        return frame if self.background == 0 else 255 - frame

    def stored(self, images: Tensor) -> Tensor:
        """Images [k, h, w] or [k, h, w, 3] in the layout of the set's tensors."""
        return images.permute(0, 3, 1, 2) if self.layout == "chw" and images.dim() == 4 else images


def framing_of(images: Tensor) -> Framing | None:
    """How the images of a set, its first raw tensor, lie in their frames; None where they are no images.

    uint8, or float from 0 to 1: [n, h, w], [n, h, w, 3] or [n, 3, h, w].
    """
    shape = images.shape[1:]
    if images.is_floating_point() and (images.min() < 0 or images.max() > 1 or images.max() < 0.5):
        return None
    if not (images.is_floating_point() or images.dtype == torch.uint8) or len(shape) not in (2, 3):
        return None
    if len(shape) == 3:
        layout = "hwc" if shape[2] == 3 else "chw" if shape[0] == 3 else ""
        sides = shape[:2] if layout == "hwc" else shape[1:]
        return Framing(int(sides[0]), int(sides[1]), layout) if layout and min(sides) >= 8 else None
    if min(shape) < 8:
        return None
    height, width = map(int, shape)
    values = images.float() * (255 if images.is_floating_point() else 1)
    ring = torch.cat([values[:, 0], values[:, -1], values[:, :, 0], values[:, :, -1]], 1)
    background = next((level for level in (0, 255) if ((ring - level).abs() < 32).float().mean() > 0.6), None)
    if background is None:
        return Framing(height, width, "hw")
    ink = values if background == 0 else 255 - values
    drawn = ink > 16
    sides_of = []
    for axis in (2, 1):
        present = drawn.any(axis).float()  # [n, h] or [n, w]
        places = torch.arange(1, present.shape[1] + 1)
        last = (present * places).amax(1)
        first = (present * places.flip(0)).amax(1)
        sides_of.append(last - (present.shape[1] - first))
    box = int(torch.stack(sides_of).amax(0).median())
    mass = ink.sum((1, 2)).clamp_min(1)
    centres = torch.stack(
        [(ink.sum(2) * torch.arange(height)).sum(1) / mass, (ink.sum(1) * torch.arange(width)).sum(1) / mass]
    )
    middle = centres.median(1).values
    agree = float((centres - middle.unsqueeze(1)).abs().median()) < 0.5
    return Framing(height, width, "hw", background, box, (float(middle[0]), float(middle[1])) if agree else None)


def _resized(pixels: Any, height: int, width: int) -> Any:
    """Pixels, float [h, w] or [h, w, 3], scaled; every one of them counts where it becomes smaller."""
    import numpy as np
    from PIL import Image

    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    scaled = [
        np.asarray(Image.fromarray(plane.astype("float32")).resize((width, height), Image.Resampling.BICUBIC))
        for plane in np.moveaxis(planes, -1, 0)
    ]
    return scaled[0] if pixels.ndim == 2 else np.stack(scaled, -1)


def expanded(items: Sequence[Any]) -> list[Any]:
    """The items with the image files of a folder in its place; raises UserError where it holds none."""
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
    """The items as they are given to a recipe: images some at a time, so that any number of them fits in memory."""
    as_images = all(isinstance(i, str | Path) and Path(str(i)).suffix.lower() in SUFFIXES for i in items)
    size = IMAGES_AT_ONCE if as_images else max(1, len(items))
    for start in range(0, max(1, len(items)), size):
        yield items[start : start + size]


# What is shown.


@dataclass
class Predictions:
    """Answers to inputs, for a terminal, a program or the eye.

    names: the inputs that could be read. columns: values by name, one for each of them. details: more, a dict for each.
    prepared: what was done to an image. failures: a line for each input that could not be read. title: which run, of
    which weights.
    """

    title: str
    names: list[str] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    details: list[dict[str, Any]] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shown: list[Tensor] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    numbers: Tensor | None = None

    def add(self, answers: Answers, inputs: Inputs) -> None:
        """Adds a part's answers."""
        for name, values in answers.columns.items():
            plain = values.detach().cpu().tolist() if isinstance(values, Tensor) else list(values)
            assert len(plain) == len(inputs.names), f"{len(plain)} answers {name!r} for {len(inputs.names)} inputs"
            self.columns.setdefault(name, []).extend(plain)
        self.details += [dict(detail) for detail in answers.details] or [{} for _ in inputs.names]
        if answers.images is not None:
            self.made += list(answers.images.detach().float().cpu())
        self.numbers = inputs.numbers
        self.names += inputs.names
        self.prepared += inputs.prepared or [""] * len(inputs.names)
        self.shown += inputs.shown

    def __len__(self) -> int:
        return len(self.names)

    def rows(self) -> list[dict[str, Any]]:
        """A dict for each input: "input", the columns, the details, and "prepared" where something was done to it."""
        rows = []
        for place, name in enumerate(self.names):
            row = {"input": name, **{key: values[place] for key, values in self.columns.items()}}
            done = {"prepared": self.prepared[place]} if self.prepared[place] else {}
            rows.append({**row, **self.details[place], **done})
        return rows

    def table(self, width: int = 80) -> list[str]:
        """The lines of a table, or, for long answers, a paragraph for each input."""
        texts = {name: [_shown(name, value) for value in values] for name, values in self.columns.items()}
        if any("\n" in text or len(text) > 60 for column in texts.values() for text in column):
            lines = []
            for place, name in enumerate(self.names):
                lines += [f"{name}:", *(f"    {line}" for c in texts.values() for line in c[place].split("\n")), ""]
            return lines[:-1]
        columns = {"input": self.names, **texts}
        if any(self.prepared):
            columns["image"] = self.prepared
        widths = {name: max(len(name), *map(len, values)) for name, values in columns.items()}
        while sum(widths.values()) + 2 * (len(widths) - 1) > width and max(widths.values()) > 8:
            widths[max(widths, key=widths.__getitem__)] -= 1
        right = {n for n, values in self.columns.items() if all(isinstance(v, int | float) for v in values)}

        def line(cells: Sequence[str]) -> str:
            cut = []
            for (name, space), cell in zip(widths.items(), cells, strict=True):
                if len(cell) > space:  # of a path the end says most
                    cell = f"…{cell[1 - space :]}" if name == "input" else f"{cell[: space - 1]}…"
                cut.append(cell.rjust(space) if name in right else cell.ljust(space))
            return "  ".join(cut).rstrip()

        return [line(list(columns)), *(line(cells) for cells in zip(*columns.values(), strict=True))]

    def __str__(self) -> str:
        return "\n".join([self.title, *(f"note     {n}" for n in self.notes), *self.table(), *self.failures])

    def figure(self) -> Figure:
        """The images with their answers, or a curve; raises UserError where the answers are no such thing."""
        from . import figures

        title = self.title if len(self) <= MAX_DRAWN else f"{self.title}, the first {MAX_DRAWN} of {len(self):,}"
        if self.shown or self.made:
            seen = [_ink(image.float() / 255) for image in self.shown[:MAX_DRAWN]]
            made = [_ink(image) for image in self.made[:MAX_DRAWN]]
            pairs = [torch.cat(pair, 2) for pair in zip(seen, made, strict=True)] if seen and made else seen or made
            captions = []
            for place, name in enumerate(self.names[: len(pairs)]):
                stem = Path(name).name
                values = [_shown(key, values[place]) for key, values in self.columns.items() if key != "or"]
                captions.append("\n".join([stem if len(stem) <= 14 else f"…{stem[-13:]}", " ".join(values)[:22]]))
            return figures.image_grid(torch.stack(pairs), captions, title)
        numeric = {n: v for n, v in self.columns.items() if all(isinstance(value, int | float) for value in v)}
        if self.numbers is None or self.numbers.shape[1] != 1 or not numeric:
            raise UserError("--picture: images and curves can be drawn; these answers are a table or a text")
        figure = figures.new_figure()
        axes = figure.add_subplot(title=title, xlabel="input", ylabel="answer")
        order = self.numbers[:, 0].argsort().tolist()
        for name, values in numeric.items():
            axes.plot(self.numbers[order, 0], [values[place] for place in order], marker="o", markersize=3, label=name)
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize="small")
        return figure


def _ink(image: Tensor) -> Tensor:
    """An image from 0 to 1, [h, w] or [h, w, 3], as [1 or 3, h, w]."""
    return image.permute(2, 0, 1) if image.dim() == 3 else image.unsqueeze(0)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if re.search("probability", name) else f"{value:.6g}"
    return str(value)

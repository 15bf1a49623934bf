"""The predictions of trained networks for a person's inputs, as tables, JSON and pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .inputs import Inputs

MAX_DRAWN = 100


@dataclass
class Answers:
    """The predictions for k inputs, as `Recipe.predict` returns them.

    columns: values by name, k each, for a table. details: more for programs, a dict per input. images: images that the
    networks generated, [k, h, w] or [k, h, w, 3], ink or colours from 0 to 1.
    """

    columns: Mapping[str, Sequence[Any] | Tensor]
    details: Sequence[Mapping[str, Any]] = ()
    images: Tensor | None = None


@dataclass
class Predictions:
    """Predictions for inputs, for a terminal, a program or as a picture.

    title: the run and its weights. names: the inputs that could be read. columns: values by name, one per input.
    details: more, a dict per input. prepared: how an image was transformed. failures: a line for each input that could
    not be read.
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
        """Add the answers to a part of the inputs."""
        inputs.name_records()
        for name, values in answers.columns.items():
            plain = values.detach().cpu().tolist() if isinstance(values, Tensor) else list(values)
            if len(plain) != len(inputs.names):
                raise UserError(
                    f"predict() gives {len(plain)} answers {name!r} for {len(inputs.names)} inputs; it must give one "
                    "for each of inputs.names"
                )
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
        """A dict per input: "input", the columns, the details, and "prepared" if it was transformed."""
        rows = []
        for place, name in enumerate(self.names):
            row = {"input": name, **{key: values[place] for key, values in self.columns.items()}}
            done = {"prepared": self.prepared[place]} if self.prepared[place] else {}
            rows.append({**row, **self.details[place], **done})
        return rows

    def table(self, width: int = 80) -> list[str]:
        """The lines of a table or, for long answers, a paragraph per input."""
        texts = {name: [_shown(name, value) for value in values] for name, values in self.columns.items()}
        if any("\n" in text or len(text) > 60 for column in texts.values() for text in column):
            lines = []
            for place, name in enumerate(self.names):
                lines += [f"{name}:", *(f"    {line}" for c in texts.values() for line in c[place].split("\n")), ""]
            return lines[:-1]
        columns = {"input": self.names, **texts}
        if any(self.prepared):
            columns["image"] = self.prepared
        widths = {name: max([len(name), *map(len, values)]) for name, values in columns.items()}
        while sum(widths.values()) + 2 * (len(widths) - 1) > width and max(widths.values()) > 8:
            widths[max(widths, key=widths.__getitem__)] -= 1
        right = {n for n, values in self.columns.items() if all(isinstance(v, int | float) for v in values)}

        def line(cells: Sequence[str]) -> str:
            cut = []
            for (name, space), cell in zip(widths.items(), cells, strict=True):
                if len(cell) > space:  # the end of a path says most
                    cell = f"…{cell[1 - space :]}" if name == "input" else f"{cell[: space - 1]}…"
                cut.append(cell.rjust(space) if name in right else cell.ljust(space))
            return "  ".join(cut).rstrip()

        return [line(list(columns)), *(line(cells) for cells in zip(*columns.values(), strict=True))]

    def __str__(self) -> str:
        return "\n".join([self.title, *(f"note     {n}" for n in self.notes), *self.table(), *self.failures])

    def figure(self) -> Figure:
        """The images with their answers, or a curve; raises UserError if the answers are neither."""
        from .. import figures

        title = self.title if len(self) <= MAX_DRAWN else f"{self.title}, the first {MAX_DRAWN} of {len(self):,}"
        if self.shown or self.made:
            seen = [_ink(image.float() / 255) for image in self.shown[:MAX_DRAWN]]
            made = [_ink(image) for image in self.made[:MAX_DRAWN]]
            beside = [torch.cat(_alike(*pair), 2) for pair in zip(seen, made, strict=True)] if seen and made else []
            pairs = beside or seen or made
            captions = []
            for place, name in enumerate(self.names[: len(pairs)]):
                stem = Path(name).name
                values = [_shown(key, values[place]) for key, values in self.columns.items() if key != "or"]
                captions.append("\n".join([stem if len(stem) <= 14 else f"…{stem[-13:]}", " ".join(values)[:22]]))
            return figures.image_grid(torch.stack(pairs), captions, title)
        numeric = {n: v for n, v in self.columns.items() if all(isinstance(value, int | float) for value in v)}
        if self.numbers is None or self.numbers.shape[1] != 1 or not numeric:
            raise UserError("--picture: only images and curves can be drawn; these answers are a table or a text")
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


def _alike(seen: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    """Two images, [1 or 3, h, w], with ink as colours if the other one has any."""
    if len(seen) == len(made):
        return seen, made
    seen, made = (1 - image.expand(3, -1, -1) if len(image) == 1 else image for image in (seen, made))
    return seen, made


def _shown(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if re.search("probability", name) else f"{value:.6g}"
    return str(value)

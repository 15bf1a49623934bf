"""Figures that recipes share, and how they are written. matplotlib loads with the first; no window is opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .tracking import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110


def new_figure(width: float = 8.0, height: float = 5.0) -> Figure:
    """An empty figure of width x height inches that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def loss_and_scores(history: History, title: str) -> Figure:
    """Training loss and every evaluated score against the optimizer step, one panel per kind of score."""
    kinds: dict[str, list[str]] = {}
    for name in history.names():
        if "/" in name:
            kinds.setdefault(name.split("/")[1], []).append(name)
    figure = new_figure(8.0, 1.0 + 3.2 * max(1, len(kinds)))
    for number, (kind, names) in enumerate(kinds.items(), 1):
        axes = figure.add_subplot(max(1, len(kinds)), 1, number)
        variants = list(dict.fromkeys(name.split("/", 2)[2] for name in names if name.count("/") > 1))
        for place, name in enumerate(names):
            steps, values = history.series(name)
            # of several networks, each has its colour, dashed on the training set
            color = variants.index(name.split("/", 2)[2]) if name.count("/") > 1 else place
            axes.plot(
                *(steps, values),
                color=f"C{color}",
                linestyle="--" if variants and name.startswith("train/") else "-",
                marker="o" if len(steps) < 30 else None,
                markersize=3,
                linewidth=1.2,
                label=name,
            )
        values = [value for name in names for value in history.series(name)[1]]
        if "loss" in kind and min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(kind)
        axes.grid(alpha=0.3)
        if len(names) > 6:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
        else:
            axes.legend(loc="best", fontsize="small")
    figure.suptitle(title)
    return figure


def image_grid(images: Tensor, titles: Sequence[str], title: str, *, wrong: Sequence[bool] = ()) -> Figure:
    """Images, [k, 1, h, w] or [k, h, w], in rows of up to ten, each under its title; the wrong ones in red."""
    columns = min(10, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(1.05 * columns, 1.35 * rows + 0.5)
    for number, (image, text) in enumerate(zip(images, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(image.detach().float().cpu().reshape(image.shape[-2:]), cmap="gray_r")
        axes.set_title(text, fontsize=8, color="tab:red" if wrong and wrong[number] else "black")
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10)
    return figure


def fitted_curve(axes: Axes, x: Tensor, y: Tensor, curve_x: Tensor, curve_y: Tensor) -> None:
    """Data points and the curve fitted to them, all [k, 1]."""
    axes.scatter(x.cpu().flatten(), y.cpu().flatten(), s=14, alpha=0.7, label="data")
    axes.plot(curve_x.cpu().flatten(), curve_y.cpu().flatten(), color="tab:red", linewidth=2.5, label="network")
    axes.set_xlabel("x")
    axes.set_ylabel("y")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")


def activation_functions(functions: Mapping[str, torch.nn.Module]) -> Figure:
    """Each activation function over [-5, 5] (document 001, part 2)."""
    figure = new_figure(8.0, 5.5)
    x = torch.linspace(-5, 5, 201)
    for number, (name, function) in enumerate(functions.items(), 1):
        axes = figure.add_subplot(-(-len(functions) // 2), 2, number)
        axes.plot(x, function(x).detach(), color="tab:red")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
    figure.suptitle("Activation functions")
    return figure


def save(figures: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes figures as PNG, animations as GIF and texts as .txt; returns the paths. A file is never half written."""
    from matplotlib.animation import Animation, PillowWriter

    folder.mkdir(exist_ok=True)
    written = []
    for name, figure in figures.items():
        suffix = ".gif" if isinstance(figure, Animation) else ".txt" if isinstance(figure, str) else ".png"
        path, part = folder / f"{name}{suffix}", folder / f".{name}.part{suffix}"
        if isinstance(figure, Animation):
            figure.save(part, writer=PillowWriter(fps=5), dpi=DPI * 0.8)
        elif isinstance(figure, str):
            part.write_text(figure + "\n", encoding="utf-8")
        else:
            figure.savefig(part, dpi=DPI)
        part.replace(path)
        written.append(path)
    return written

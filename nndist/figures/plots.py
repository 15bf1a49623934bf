"""Figures that recipes share, and writing them. matplotlib is imported on first use; no window is opened."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.batches import first_tensor, inputs_and_classes
from ..data.sets import keeps_order
from ..errors import UserError
from ..files import replacing
from ..metrics import MAX_OUTPUTS
from ..runs.reading import LAST_PANELS, MACHINE_PANELS, PLOT_MARK, panels_of
from ..runs.tracking import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..data.sets import Data

DPI = 110


def new_figure(width: float = 8.0, height: float = 5.0) -> Figure:
    """An empty figure of width x height inches that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def training(history: History, title: str) -> Figure:
    """Losses and scores by optimizer step, a panel for each kind; then learning rate, norms and speed."""
    panels = {kind: names for kind, names in panels_of(history.names()).items() if kind not in MACHINE_PANELS}
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    figure = new_figure(6.2 * columns, 0.6 + 2.9 * max(1, rows))
    for number, (kind, names) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        variants = list(dict.fromkeys(name.split("/", 2)[2] for name in names if name.count("/") > 1))
        for place, name in enumerate(names):
            steps, values = history.series(name)
            # with several networks, one colour each, dashed on the training set
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
        if "loss" in kind and min(values, default=0) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(LAST_PANELS.get(kind, kind))
        if kind in LAST_PANELS:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if len(names) > 6:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
        elif len(names) > 1 or "/" in names[0]:
            axes.legend(loc="best", fontsize="small")
    figure.suptitle(title)
    return figure


@dataclass(frozen=True)
class Table:
    """Rows for a person or a program, written as CSV."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def classification(
    network: Callable[..., Tensor],
    data: Data,
    name: str,
    history: History | None = None,
    *,
    labels_last: bool = False,
    ignored: int | None = None,
) -> dict[str, Any]:
    """A classifier's predictions on the test set: confusion matrix, scores by class, worst errors, first predictions.

    `network` returns logits, [k, classes], for the first tensor of a prepared batch, whose second holds the labels,
    [k], or with `labels_last` for all tensors but the last; it is not called if `history.outputs["logits"]` has its
    outputs. Inputs other than images are not drawn, nor are any if `collate` changes the order of a batch's examples:
    then examples have no numbers either. Examples whose label is `ignored`, or no class, are left out.
    """
    counted = min(len(data.test), MAX_OUTPUTS)
    which = f"{data.source}, {'first ' if counted < len(data.test) else ''}{counted:,} test examples"
    in_order = keeps_order(data.test, torch.arange(counted), data.prepare)
    log_probabilities, labels = _answers(network, data, counted, history, labels_last=labels_last, in_order=in_order)
    counts = (labels >= 0) & (labels < log_probabilities.shape[1])
    if ignored is not None:
        counts &= labels != ignored
    labels = labels.where(counts, 0)
    losses = -log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    predicted = log_probabilities.argmax(1)
    confidence = log_probabilities.max(1).values.exp()
    classes = [str(c) for c in data.classes] or [str(c) for c in range(log_probabilities.shape[1])]
    wrong = (predicted != labels) & counts
    num_wrong = int(wrong.sum())
    ranked = losses.argsort(descending=True)
    worst = ranked[wrong[ranked]][:25]
    first = counts.nonzero().flatten()[:30]

    def caption(number: int) -> str:
        said = f"{classes[predicted[number]]} {confidence[number]:.0%}"
        return f"{said}\nis {classes[labels[number]]}" if wrong[number] else said

    matrix = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    matrix.index_put_((labels, predicted), counts.long(), accumulate=True)
    judged = int(counts.sum())
    share = f"{judged - num_wrong:,} of {judged:,} right"
    drawn: dict[str, Any] = {"confusion_matrix": confusion_matrix(matrix, classes, f"{name} on {which}\n{share}")}
    pictures = _pictures(data, first) if in_order and len(first) else None
    if pictures is not None:
        drawn["predictions"] = image_grid(
            *(pictures, [caption(n) for n in first.tolist()]),
            f"{name}: predictions for the first {len(first)} test examples of {data.source}",
            wrong=wrong[first].tolist(),
        )
    if pictures is not None and len(worst):
        mistaken = _pictures(data, worst)
        assert mistaken is not None
        drawn["worst_errors"] = image_grid(
            *(mistaken, [caption(n) for n in worst.tolist()]),
            f"{name} on {which}: the {len(worst)} worst of {num_wrong:,} errors, by their loss",
        )
    rows = [
        (n, classes[labels[n]], classes[predicted[n]], round(confidence[n].item(), 6), round(losses[n].item(), 6))
        for n in dict.fromkeys([*worst.tolist(), *first.tolist()])
    ]
    columns = ("test example", "label", "prediction", "confidence", "loss")
    listed = Table(columns, rows) if in_order else Table(columns[1:], [row[1:] for row in rows])
    of_classes = by_class(matrix, classes, first=counted if counted < len(data.test) else None)
    return {**drawn, "by_class": of_classes, "prediction_list": listed}


def _answers(
    network: Callable[..., Tensor],
    data: Data,
    counted: int,
    history: History | None,
    *,
    labels_last: bool,
    in_order: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [counted, classes] and labels [counted] of the first test examples, on the CPU.

    in_order: whether a batch has its examples in the order of their numbers. If not, known logits have the order of the
    evaluation's batches, and only labels that were kept beside them are theirs.
    """
    outputs = history.outputs if history is not None else {}
    known, beside = (
        found if found is not None and len(found) == counted else None
        for found in (outputs.get("logits"), outputs.get("labels"))
    )
    if known is not None and beside is not None and beside.dim() == 1 and not beside.is_floating_point():
        return known.float().log_softmax(1).cpu(), beside.long().cpu()
    known = known if in_order else None
    parts = []
    for numbers in torch.arange(counted).split(1000):
        batch = data.prepare(next(iter(data.test.batches([numbers]))))
        what = "a classifier's figures: define figures() in the recipe"
        inputs, labels = inputs_and_classes(batch, last=labels_last, what=what)
        logits = network(*inputs) if known is None else known[numbers]
        parts.append((logits.float().log_softmax(1).cpu(), labels.cpu()))
    log_probabilities, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return log_probabilities, labels


def training_images(data: Data, name: str) -> dict[str, Figure]:
    """The first training images as the networks get them, each under its class or number; {} for other inputs."""
    numbers = torch.arange(min(20, len(data.train)))
    batch = data.prepare(next(iter(data.train.batches([numbers]))))
    try:
        pictures = as_pictures(first_tensor(batch, ""))
    except UserError:
        pictures = None
    if pictures is None:
        return {}
    try:
        labels = inputs_and_classes(batch, last=False, what="")[1].tolist()
        known = range(len(data.classes))  # a label that is ignored may be none of them
        captions = [str(data.classes[label]) if label in known else str(label) for label in labels]
    except UserError:  # no class each: masks, boxes, several labels
        captions = [f"example {number}" for number in numbers.tolist()]
    title = f"{name} on {data.source}: the first {len(numbers)} training images"
    return {"training_images": image_grid(pictures, captions, title)}


def _pictures(data: Data, numbers: Tensor) -> Tensor | None:
    """The inputs of test examples as images; None if they are not images."""
    return as_pictures(data.prepare(next(iter(data.test.batches([numbers]))))[0])


def as_pictures(inputs: Tensor) -> Tensor | None:
    """Inputs as float32 images on the CPU, [k, h, w] or [k, colours, h, w]; None if they are not images."""
    inputs = inputs.detach().cpu()
    if not inputs.is_floating_point():
        return None  # numbers of tokens
    inputs = inputs.float()
    side = math.isqrt(inputs.shape[-1])
    if inputs.dim() == 2 and side > 4 and side * side == inputs.shape[-1]:  # flattened for a perceptron
        inputs = inputs.reshape(-1, side, side)
    is_image = inputs.dim() >= 3 and min(inputs.shape[-2:]) > 4 and (inputs.dim() == 3 or inputs.shape[1] in (1, 3))
    return inputs if is_image else None


def confusion_matrix(counts: Tensor, classes: Sequence[str], title: str) -> Figure:
    """Confusion matrix: `counts` int64 [classes, classes], rows true, columns predicted. Errors are coloured."""
    # small, so that its numbers can still be read in half of a report's page
    size = min(14.0, 2.2 + 0.4 * len(classes))
    figure = new_figure(size + 0.8, size)
    axes = figure.add_subplot()
    errors = counts.clone().fill_diagonal_(0)
    axes.imshow(errors.numpy(), cmap="Reds", vmin=0, vmax=max(1, 2.2 * errors.max().item()))
    right = [f"{100 * int(counts[c, c]) / max(1, int(counts[c].sum())):.1f} %" for c in range(len(classes))]
    if len(classes) <= 20:
        digits = len(f"{int(counts.max()):,}")
        fontsize = min(10.0, 46 / digits)  # so that five digits of bold type fill a cell
        for row in range(len(classes)):
            for column in range(len(classes)):
                if count := int(counts[row, column]):
                    weight = "bold" if row == column else "normal"
                    text = axes.text(column, row, f"{count:,}", ha="center", va="center", fontweight=weight)
                    text.set_fontsize(fontsize)
                    text.set_in_layout(False)  # it lies within the axes, and measuring a hundred of them is slow
    if len(classes) <= 50:
        slant = 45 if max(map(len, classes)) > 3 else 0
        axes.set_xticks(range(len(classes)), classes, rotation=slant, ha="right" if slant else "center")
        axes.set_yticks(range(len(classes)), classes)
        beside = axes.secondary_yaxis("right")
        beside.set_yticks(range(len(classes)), right, fontsize=8)
        beside.set_ylabel("recall")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=10)
    return figure


def by_class(matrix: Tensor, classes: Sequence[str], *, first: int | None = None) -> Table:
    """Examples, precision, recall and F1 of each class, the lowest recall first. matrix: int64, rows true.

    first: how many of the set's examples are counted, if not all; a column says so.
    """
    rows = []
    for number, name in enumerate(classes):
        right, true, said = int(matrix[number, number]), int(matrix[number].sum()), int(matrix[:, number].sum())
        precision, recall = right / max(1, said), right / max(1, true)
        f1 = 2 * precision * recall / max(1e-12, precision + recall)
        rows.append((name, true, *(round(value, 4) for value in (precision, recall, f1))))
    examples = "examples" if first is None else f"examples of the first {first:,}"
    return Table(("class", examples, "precision", "recall", "f1"), sorted(rows, key=lambda row: row[3]))


def image_grid(images: Tensor, titles: Sequence[str], title: str, *, wrong: Sequence[bool] = ()) -> Figure:
    """Images, [k, 1 or 3, h, w] or [k, h, w], in rows of up to ten, each under its title; wrong ones in red."""
    columns = min(10, len(images))
    rows = -(-len(images) // columns)
    lines = 1 + max((text.count("\n") for text in titles), default=0)
    # one pair of axes for all: the layout of one per image takes seconds
    tall = images.shape[-2] / images.shape[-1] + 0.17 * lines + 0.1
    figure = new_figure(max(5.0, 1.05 * columns), 1.05 * tall * rows + 0.5)
    axes = figure.add_subplot()
    for number, (image, text) in enumerate(zip(images, titles, strict=True)):
        row, column = divmod(number, columns)
        pixels = image.detach().float().cpu()
        left, bottom = column + 0.06, -tall * (row + 1) + 0.06
        top = bottom + 0.88 * pixels.shape[-2] / pixels.shape[-1]
        place = (left, left + 0.88, bottom, top)
        if pixels.dim() == 3 and len(pixels) == 3:  # colours, on any scale
            low, high = pixels.min(), pixels.max()
            axes.imshow(((pixels - low) / (high - low).clamp_min(1e-6)).permute(1, 2, 0).numpy(), extent=place)
        else:
            axes.imshow(pixels.reshape(pixels.shape[-2:]).numpy(), cmap="gray_r", extent=place)
        color = "tab:red" if wrong and wrong[number] else "black"
        caption = axes.text(column + 0.5, top + 0.02, text, fontsize=8, color=color, ha="center", va="bottom")
        caption.set_in_layout(False)
    axes.set_xlim(0, columns)
    axes.set_ylim(-tall * rows, 0)
    axes.set_axis_off()
    figure.suptitle(title, fontsize=10)
    return figure


def fitted_curve(axes: Axes, x: Tensor, y: Tensor, curve_x: Tensor, curve_y: Tensor) -> None:
    """Plot data points and the curve fitted to them, all [k, 1]."""
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


def save(figures: Mapping[str, Any], folder: Path, say: Callable[[str], None] = print) -> list[Path]:
    """Write figures as PNG, animations as GIF, tables as CSV and texts as .txt, each atomically; returns the paths.

    If no font on the machine has some of a figure's characters, `say` gets a line that names them.
    """
    folder.mkdir(exist_ok=True)
    written = []
    for name, figure in figures.items():
        suffix, write = writer(figure)
        path = folder / f"{name}{suffix}"
        drawn = suffix not in (".txt", ".csv")
        try:
            with replacing(path) as part, fonts_for(name, figure, say) if drawn else contextlib.nullcontext():
                write(part)
            written.append(path)
        except PermissionError as error:  # on Windows: it is open in another program
            say(f"{path}: can't be written ({error.strerror}); close what shows it and start the same command again")
    return written


def writer(figure: Any) -> tuple[str, Callable[[Path], object]]:
    """The suffix of a figure's file, and a function that writes it to a path."""
    if isinstance(figure, str):
        return ".txt", lambda path: path.write_text(figure + "\n", encoding="utf-8")
    if isinstance(figure, Table):
        return ".csv", lambda path: path.write_text(csv_text(figure), encoding="utf-8")
    from matplotlib.animation import Animation, PillowWriter

    if isinstance(figure, Animation):
        return ".gif", lambda path: figure.save(path, writer=PillowWriter(fps=5), dpi=DPI * 0.8)
    return ".png", lambda path: _write_png(figure, path)


def _write_png(figure: Figure, path: Path) -> None:
    """The pixels of savefig, which draws everything twice for the layout and again for the file; here it is once."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    engine, canvas = figure.get_layout_engine(), figure.canvas
    figure.set_dpi(DPI)
    if engine is not None and figure.axes:
        engine.execute(figure)
        figure.set_layout_engine("none")
    try:
        FigureCanvasAgg(figure).print_png(path, metadata={} if _has_photographs(figure) else {"Comment": PLOT_MARK})
    finally:
        figure.set_canvas(canvas)


def _has_photographs(figure: Figure) -> bool:
    """Whether a figure shows pixels that have colours of their own, not those of a colour map."""
    from matplotlib.image import AxesImage

    for image in figure.findobj(AxesImage):
        pixels = image.get_array()
        if pixels is not None and pixels.ndim == 3 and (pixels[..., :3] != pixels[..., :1]).any():
            return True
    return False


def csv_text(table: Table) -> str:
    """A table as CSV, with a header."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.columns, *table.rows])
    return text.getvalue()


@contextlib.contextmanager
def fonts_for(name: str, figure: Any, say: Callable[[str], None]) -> Iterator[None]:
    """Context manager: texts are drawn with fonts that have their characters, if the machine has such fonts.

    matplotlib's default font lacks Chinese, Japanese and Korean and draws boxes instead.
    """
    import matplotlib
    from matplotlib.text import Text

    drawn = getattr(figure, "_fig", figure)  # an animation's
    characters = {c for text in drawn.findobj(Text) for c in text.get_text() if ord(c) > 0x2FF}
    if not characters:
        yield
        return
    families, missing = covering_fonts(frozenset(characters))
    if missing:
        some = "".join(sorted(missing)[:12])
        say(f"figure {name}: no font on this machine has {some!r}, so boxes are drawn; Debian: fonts-noto-cjk")
    with matplotlib.rc_context({"font.sans-serif": families, "font.family": "sans-serif"}):
        for text in drawn.findobj(Text):
            if text.get_fontfamily() != ["monospace"]:
                text.set_fontfamily(families)
        with warnings.catch_warnings():
            if missing:
                warnings.filterwarnings("ignore", message="Glyph .* missing from")  # reported above
            yield


@lru_cache
def covering_fonts(characters: frozenset[str]) -> tuple[list[str], set[str]]:
    """Font families that together cover the characters, matplotlib's default first, and the characters none has."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    families = ["DejaVu Sans"]
    own = FT2Font(font_manager.findfont("DejaVu Sans"))
    missing = {c for c in characters if not own.get_char_index(ord(c))}
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    files = sorted(font_manager.findSystemFonts(), key=lambda file: ("CJK" not in file, "Regular" not in file, file))
    for file in files:
        if not missing:
            break
        try:
            font = FT2Font(file)
            found = {c for c in missing if font.get_char_index(ord(c))}
            if found:
                if file not in known:  # installed since matplotlib made its list
                    font_manager.fontManager.addfont(file)
                families.append(font.family_name)
                missing -= found
        except (OSError, RuntimeError):  # not a font that matplotlib can use
            continue
    return families, missing

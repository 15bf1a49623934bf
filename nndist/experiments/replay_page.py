"""What a replayed step was, as text for a terminal and as a page."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..figures.plots import as_pictures, image_grid
from ..files import write_whole
from ..report import markup
from ..report.run_page import panel
from ..runs.reading import Series
from .examine import Examined
from .replay import Replay

MOST_EXAMPLES, MOST_ROWS, MOST_CHARACTERS = 40, 12, 300
FOLDER = "replay"


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def compared(shown: dict[str, Any]) -> list[str]:
    """Lines on what the replay reproduced (see replay.summary)."""
    same, differs, against = shown["records_identical"], shown["record_differs"], shown["checkpoint"]
    records = f"differ from metrics.jsonl: {differs}" if differs else f"{same} identical to those of metrics.jsonl"
    weights = {
        "none": "the run has no checkpoint of this step to compare with",
        "identical": "bit-identical to the run's checkpoint of this step",
    }.get(against, f"differ from the run's checkpoint: {against}")
    return [f"records  {records}", f"weights  {weights}"]


def sentence(line: str) -> str:
    """A line of the terminal, "records  12 identical", as a sentence: "Records: 12 identical."."""
    name, _, rest = line.partition("  ")
    return f"{name.capitalize()}: {rest.strip()}."


def lines_of(replay: Replay, found: Examined, shown: dict[str, Any]) -> list[str]:
    """For the terminal, in 80 columns."""
    trainer = replay.trainer
    since = f"the checkpoint of step {replay.began:,}" if replay.began else "the start"
    lines = [
        f"replay   {replay.run.name}, step {found.step:,} of {trainer.total_steps:,}, from {since}",
        *(f"note     {note}" for note in replay.notes),
        *compared(shown),
    ]
    for name, losses in found.losses.items():
        worst = sorted(zip(losses, found.examples, strict=True), key=_badness, reverse=True)[:3]
        mean = sum(losses) / max(1, len(losses))
        said = ", ".join(f"{number(loss)} (example {example:,})" for loss, example in worst)
        of = "" if name == "model" else f" of {name}"
        lines.append(f"loss{of}     mean {number(mean)} of {len(losses):,}; largest {said}")
    if found.first is not None:
        lines.append(f"first    {found.first}")
    width = max([len(layer.name) for layer in found.layers] + [9])
    lines.append(f"\n{'parameter':<{width}} {'gradient':>10} {'update':>10} {'update/weight':>14}")
    for layer in found.layers:
        ratio = layer.update / layer.weight if layer.weight else math.nan
        lines.append(
            f"{layer.name:<{width}} {number(layer.gradient):>10} {number(layer.update):>10} {number(ratio):>14}"
        )
    return lines


def _badness(pair: tuple[float, int]) -> float:
    return math.inf if not math.isfinite(pair[0]) else pair[0]


def write(replay: Replay, found: Examined, shown: dict[str, Any]) -> Path:
    """Writes the page RUN/replay/step-N.html."""
    title = f"{replay.run.name}, step {found.step:,}"
    head = [
        f'<header><p class="eyebrow"><span>nndist replay</span></p><h1>{markup.text(title)}</h1>',
        "".join(f"<p>{markup.text(sentence(line))}</p>" for line in compared(shown)),
        "".join(f'<p class="soft">{markup.text(note)}</p>' for note in replay.notes),
    ]
    if found.first is not None:
        head.append(f'<p class="notice"><strong>{markup.text(f"The first: {found.first}")}</strong></p>')
    body = [
        "".join([*head, "</header>"]),
        examples(found, replay.trainer.data.as_text),
        layers(found),
        activations(found),
    ]
    return put(replay.folder, f"step-{found.step}", title, "\n".join(body), [])


def put(run: Path, name: str, title: str, body: str, panels: list[dict[str, Any]]) -> Path:
    """Writes a page into the folder replay/ of a run's folder."""
    data = {"page": "run", "running": False, "updated": None, "panels": panels}
    data |= {"refresh_seconds": 0, "stale_seconds": 0}
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.html"
    write_whole(path, markup.page(title, body, data).encode())
    return path


def examples(found: Examined, as_text: Callable[[Tensor], str] | None = None) -> str:
    """The batch: the examples with the largest losses, and this process's inputs in that order."""
    names = list(found.losses)
    order = sorted(
        range(len(found.examples)), key=lambda n: [_badness((found.losses[o][n], 0)) for o in names], reverse=True
    )
    rows = [[f"{found.examples[n]:,}", *(number(found.losses[name][n]) for name in names)] for n in order]
    said = f"{len(rows):,} examples" + (f", the {MOST_ROWS} with the largest losses" if len(rows) > MOST_ROWS else "")
    columns = ["example", *("loss" if name == "model" else name for name in names)]
    table = markup.table(columns, rows[:MOST_ROWS], numeric={0, *range(1, len(columns))})
    return f"<section><h2>Examples</h2><p>{said}.</p>{inputs_of(found, order, as_text)}{table}</section>"


def inputs_of(found: Examined, order: list[int], as_text: Callable[[Tensor], str] | None) -> str:
    """The inputs of the first micro-batch as pictures or texts, or their first numbers."""
    parts = found.inputs if isinstance(found.inputs, tuple | list) else (found.inputs,)
    first = next((part for part in parts if isinstance(part, Tensor)), None)
    if first is None or not len(first):
        return ""
    shown = [n for n in order if n < len(first)][:MOST_EXAMPLES]
    titles = [f"{found.examples[n]:,}" for n in shown]
    if as_text is not None:
        texts = [as_text(first[n])[:MOST_CHARACTERS].replace("\n", "\u21b5") for n in shown[:MOST_ROWS]]
        rows = [list(row) for row in zip(titles, texts, strict=False)]
        return markup.table(["example", "its text"], rows, numeric={0})
    images = as_pictures(first[shown])
    if images is None or not bool(torch.isfinite(images).all()):
        rows = [
            [title, ", ".join(number(float(v)) for v in first[n].flatten()[:12].tolist())]
            for title, n in zip(titles, shown[:MOST_ROWS], strict=False)
        ]
        return markup.table(["example", "its inputs"], rows, numeric={0})
    losses = next(iter(found.losses.values()), None)
    if losses is not None:
        titles = [f"{title}\n{number(losses[n])}" for title, n in zip(titles, shown, strict=True)]
    figure = image_grid(images, titles, "inputs of the step: number of the example, loss")
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    drawn = base64.b64encode(file.getvalue()).decode()
    return f'<figure class=full><img src="data:image/png;base64,{drawn}" alt="inputs of the step"></figure>'


def layers(found: Examined) -> str:
    """Gradient and update of each parameter."""
    rows = [
        [
            layer.name,
            number(layer.gradient),
            number(layer.update),
            number(layer.weight),
            number(layer.update / layer.weight if layer.weight else math.nan),
        ]
        for layer in found.layers
    ]
    columns = ["parameter", "gradient's norm, before clipping", "update's norm", "weight's norm", "update / weight"]
    return f"<section><h2>Gradients and updates</h2>{markup.table(columns, rows, numeric={1, 2, 3, 4})}</section>"


def activations(found: Examined) -> str:
    """The range of each module's outputs."""
    rows = [[a.name, number(a.least), number(a.largest), f"{a.not_finite:,}"] for a in found.activations]
    columns = ["module", "lowest output", "highest output", "not finite"]
    said = "<p>Of this process's examples.</p>"
    return f"<section><h2>Activations</h2>{said}{markup.table(columns, rows, numeric={1, 2, 3})}</section>"


def write_variation(replay: Replay, changes: dict[str, str], first: int, curves: dict[str, dict[str, Any]]) -> Path:
    """Writes the page of a run continued with other values beside the original; curves: metric -> name -> points."""
    said = " ".join(f"{name}={value}" for name, value in changes.items())
    title = f"{replay.run.name} from step {first:,} with {said}"
    panels = []
    for metric, lines in curves.items():
        members = [
            Series(f"{name}/{metric}", steps, [None] * len(steps), values) for name, (steps, values) in lines.items()
        ]
        panels.append({**panel(metric, members), "title": metric})
    head = f'<header><p class="eyebrow"><span>nndist replay</span></p><h1>{markup.text(title)}</h1></header>'
    body = f'{head}<section><h2>Curves</h2><div class="panels" id="panels"></div></section>'
    name = "".join(c if c.isalnum() or c in "=.-" else "_" for c in f"step-{first}-{said}")[:100]
    return put(replay.folder, name, title, body, panels)

"""The learning-rate finder: the loss under a growing learning rate; nothing that it trains is kept."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..data.feed import GlobalBatch
from ..distributed.runtime import on_main
from ..errors import UserError
from ..files import write_json
from ..metrics import Means
from ..progress import bar
from ..recipe.contract import Recipe
from ..stores import redacted
from ..training.description import plan
from ..training.run import begin
from ..training.trainer import Trainer

LOWEST_LR, HIGHEST_LR = 1e-6, 10.0
NUM_STEPS = 200
SMOOTHING = 0.9  # the decay of the loss's moving average
DIVERGED = 4.0  # times the initial loss
FIRST_STEPS = 10  # their mean loss is the initial loss
LEAST_FALL = 0.02  # of the initial loss; less is not a descent


@dataclass
class Curve:
    """The loss of one objective under a growing learning rate; one learning rate and loss per step."""

    objective: str
    lrs: list[float]
    losses: list[float]

    def smoothed(self) -> list[float]:
        """The exponential moving average of the losses with bias correction (Kingma and Ba 2015)."""
        average, found = 0.0, []
        for number, loss in enumerate(self.losses, 1):
            average = SMOOTHING * average + (1 - SMOOTHING) * loss
            found.append(average / (1 - SMOOTHING**number))
        return found

    def suggestions(self) -> tuple[float, float] | None:
        """The learning rate at which the loss falls fastest, and a tenth of the one at which it is lowest.

        None if it never falls. Source: Smith 2017, section 3.3, and fast.ai's rules of thumb.
        """
        smooth = self.smoothed()
        if len(smooth) <= FIRST_STEPS:
            return None
        lowest = min(range(FIRST_STEPS - 1, len(smooth)), key=smooth.__getitem__)
        if smooth[FIRST_STEPS - 1] - smooth[lowest] < LEAST_FALL * abs(smooth[FIRST_STEPS - 1]):
            return None
        reach = max(2, len(smooth) // 40)  # slopes over several steps: between neighbours they are noise
        falls = {
            place: smooth[place - reach] - smooth[min(place + reach, lowest)]
            for place in range(FIRST_STEPS - 1 + reach, max(lowest, FIRST_STEPS + reach))
        }
        steepest = max(falls, key=falls.__getitem__)
        return self.lrs[steepest], self.lrs[lowest] / 10


def find_lr(recipe: Recipe, config: RunConfig) -> None:
    """Runs the learning-rate range test: from the initial weights, the learning rate grows from 1e-6 to 10.

    Prints a table, and writes RUNS_DIR/<recipe>/find-lr/find-lr.png and .json. `--max-steps` sets the number of steps
    (200). Every network's learning rate grows by the same factor, the first one's from 1e-6. Raises UserError.
    """
    num_steps = config.max_steps or NUM_STEPS
    if num_steps < 2 * FIRST_STEPS:
        raise UserError(f"--max-steps {num_steps}: a range test needs at least {2 * FIRST_STEPS} steps")
    trainer = begin(recipe, dataclasses.replace(config, max_steps=None))
    folder = Path(on_main(trainer.runtime, lambda: make_folder(recipe, config, "find-lr")))
    if trainer.runtime.is_main:
        shown = plan(trainer)
        lines = [f"{name:<8} {shown[name]}" for name in ("recipe", "data", "network", "device", "batch")]
        lines.append(f"test     {num_steps} steps, learning rate {LOWEST_LR:g} to {HIGHEST_LR:g}; nothing is kept")
        print("\n".join(lines), flush=True)
    curves = range_test(trainer, num_steps, progress=config.progress and trainer.runtime.is_main)
    if not trainer.runtime.is_main:
        return
    print(table(curves, num_steps))
    print("\n".join(advice(curves, recipe, trainer)))
    for path in write(curves, trainer, folder):
        print(f"written  {path}", flush=True)


def range_test(trainer: Trainer, num_steps: int, *, progress: bool) -> list[Curve]:
    """Takes the steps until the loss of an objective is not finite or has diverged; returns a curve per objective."""
    step, runtime = trainer.optimizer_step, trainer.runtime
    base = trainer.rates.own(next(iter(trainer.optimizers)))
    bases = {name: trainer.rates.own(name) for name in step.objectives}
    curves = {name: Curve(name, [], []) for name in step.objectives}
    trainer.set_modes()
    with bar(num_steps, "range test", shown=progress) as shown:
        for number, batch in enumerate(itertools.islice(endless(trainer), num_steps)):
            lr = LOWEST_LR * (HIGHEST_LR / LOWEST_LR) ** (number / (num_steps - 1))
            trainer.rates.scale(lr / base)
            window = Means()
            for name, losses in step(batch).items():
                for loss in losses:
                    window.add(name, loss)
            means = {name: mean for name, (mean, _) in window.reduce(runtime.sum, runtime.device).items()}
            if not all(map(math.isfinite, means.values())):
                break
            for name, mean in means.items():
                curves[name].lrs.append(lr / base * bases[name])
                curves[name].losses.append(mean)
            shown.update()
            if number >= FIRST_STEPS and any(has_diverged(curve) for curve in curves.values()):
                break
    return list(curves.values())


def has_diverged(curve: Curve) -> bool:
    """Whether the smoothed loss is far above the initial loss."""
    beginning = sum(curve.losses[:FIRST_STEPS]) / FIRST_STEPS
    return curve.smoothed()[-1] > DIVERGED * abs(beginning)


def endless(trainer: Trainer) -> Iterator[GlobalBatch]:
    """The global batches, epoch after epoch."""
    return (batch for epoch in itertools.count() for batch in trainer.feed.epoch(epoch))


def table(curves: Sequence[Curve], num_steps: int) -> str:
    """The smoothed losses at about 14 of the learning rates, for a terminal."""
    names = [curve.objective for curve in curves]
    head = ["loss"] if names == ["model"] else names
    lines = ["".join([f"{'lr':>10}", *(f" {name[:13]:>13}" for name in head)])]
    smooth = [curve.smoothed() for curve in curves]
    length = len(curves[0].lrs)
    for place in [*range(0, length, max(1, num_steps // 14))]:
        lines.append(f"{curves[0].lrs[place]:>10.2g}" + "".join(f" {values[place]:>13.5g}" for values in smooth))
    if length < num_steps:
        ended = f"{curves[0].lrs[-1]:.2g}" if length else f"{LOWEST_LR:g}"
        lines.append(f"stopped after step {length}, lr {ended}: the loss diverges")
    return "\n".join(lines)


def advice(curves: Sequence[Curve], recipe: Recipe, trainer: Trainer) -> list[str]:
    """The suggested learning rates, each with its rule."""
    lines = []
    for curve in curves:
        whose = "" if len(curves) == 1 else f" of {curve.objective}"
        found = curve.suggestions()
        if found is None:
            lines.append(f"suggests nothing: the loss{whose} never falls; look at the figure")
            continue
        steepest, tenth = found
        lines.append(f"suggests lr {steepest:.1g}{whose}: where the loss falls fastest; a tenth of the lr")
        lines.append(f"         with the lowest loss is {tenth:.1g}; the recipe has {own_lr(curve, trainer):g}")
    if len(curves) == 1 and (found := curves[0].suggestions()) and own_lr(curves[0], trainer) == recipe.lr:
        lines.append(f"try      --lr {found[0]:.1g}")
    return lines


def own_lr(curve: Curve, trainer: Trainer) -> float:
    """The recipe's learning rate for a curve's network."""
    return trainer.rates.own(curve.objective)


def write(curves: Sequence[Curve], trainer: Trainer, folder: Path) -> list[Path]:
    """Writes the figure and all numbers and returns their paths; raises OSError."""
    from .. import figures

    figure = figures.new_figure(7.5, 4.6)
    axes = figure.add_subplot()
    for place, curve in enumerate(curves):
        name = "loss" if len(curves) == 1 else f"loss of {curve.objective}"
        axes.plot(curve.lrs, curve.losses, color=f"C{place}", linewidth=0.6, alpha=0.4)
        axes.plot(curve.lrs, curve.smoothed(), color=f"C{place}", linewidth=2, label=f"{name}, smoothed")
        if found := curve.suggestions():
            label = f"falls fastest at {found[0]:.1g}"
            axes.axvline(found[0], color=f"C{place}", linestyle="--", linewidth=1.2, label=label)
        axes.axvline(own_lr(curve, trainer), color=f"C{place}", linestyle=":", linewidth=1.2)
    axes.plot([], [], color="gray", linestyle=":", linewidth=1.2, label="the recipe's own")
    values = [value for curve in curves for value in curve.smoothed()]
    if values:
        low, high = min(values), max(values)
        if low > 0 and high > 20 * low:
            axes.set_yscale("log")
        else:  # single high losses would flatten the curve
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) or None)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss of one batch")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize="small")
    axes.set_title(f"{trainer.recipe.name} on {trainer.data.source}: learning-rate range test")
    record: dict[str, Any] = {
        "recipe": trainer.recipe.name,
        "fields": trainer.recipe.fields(),
        "seed": trainer.config.seed,
        "data": trainer.data.source,
        "device": trainer.runtime.describe(),
        "curves": [
            {
                "objective": curve.objective,
                "lr": curve.lrs,
                "loss": curve.losses,
                "smoothed_loss": curve.smoothed(),
                "own_lr": own_lr(curve, trainer),
                **dict(zip(("steepest", "tenth_of_lowest"), curve.suggestions() or (None, None), strict=True)),
            }
            for curve in curves
        ],
    }
    write_json(folder / "find-lr.json", record)
    return [*figures.save({"find-lr": figure}, folder), folder / "find-lr.json"]


def make_folder(recipe: Recipe, config: RunConfig, name: str) -> str:
    """Creates and returns RUNS_DIR/<recipe>/<name>, for a measurement's files; raises UserError if that fails."""
    folder = config.runs_folder / recipe.name / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--runs-dir {redacted(str(config.runs_dir))}: {error.filename}: {error.strerror}; choose another folder"
        ) from error
    return str(folder)

"""The trainings of a comparison: one recipe with several values, seeds and folds, checked before any is started."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..config import RunConfig
from ..errors import UserError
from ..files import Each, open_regular, read_json
from ..flags.parse import parse
from ..recipe import helpers
from ..recipe.contract import Recipe
from ..recipe.fields import comparable
from ..recipe.loading import load_recipe
from ..runs.reading import mapping, number

OWN = ("run", "run_name", "seed", "fold", "runs_dir", "threads", "check", "find_lr", "find_batch")
ABOUT_KIND = {
    "status?": str,
    "step?": (int, None),
    "total_steps?": (int, None),
    "source_sha256?": (str, None),
    "fields?": dict,
    "modules?": Each(str),
    "settings?": {"max_steps?": (int, None), "threads?": (int, None), "precision?": (str, None)},
}
"""What a comparison reads of its trainings' run.json (see files.check)."""


@dataclass
class Member:
    """One training: its row of the table, its settings and its state."""

    label: str
    seed: int
    folder: Path
    arguments: list[str]
    config: RunConfig
    fields: dict[str, Any]
    source: str
    modules: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    fold: int = 0
    failure: str = ""
    pruned: bool = False
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    slot: int = 0
    began: float = 0.0
    position: list[int] = field(default_factory=lambda: [0, 0])  # bytes of metrics.jsonl read, last step in them
    usage: dict[str, float] = field(default_factory=dict)
    """Once the training has ended: its `cpu_seconds`, and the cores that `others` kept busy meanwhile."""
    before: tuple[float, float] = (0.0, 0.0)
    is_new: bool = True

    @property
    def text(self) -> str:
        """Its name in messages."""
        return f"{self.label}, {f'fold {self.fold}, ' * bool(self.fold)}seed {self.seed}"

    def about(self) -> dict[str, Any]:
        """Its run.json; empty before there is one. Raises UserError if it is damaged."""
        path = self.folder / "run.json"
        try:
            return read_json(path, ABOUT_KIND)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"{path}: can't be read ({reason}); restore it from a copy, or give this comparison a different --name"
            ) from error

    def is_finished(self) -> bool:
        """Whether it has been trained to the end that is requested now."""
        about = self.about()
        before = mapping(about.get("settings")).get("max_steps")
        step = number(about.get("step")) or 0
        return about.get("status") in ("finished", "cut") and (
            before == self.config.max_steps or bool(self.config.max_steps and step >= self.config.max_steps)
        )

    def share_done(self) -> float:
        """The share that is done, 0 to 1."""
        total = number(self.about().get("total_steps"))
        if not total:
            return 0.0
        self._read_on()
        return min(1.0, self.position[1] / min(total, self.config.max_steps or total))

    def _read_on(self) -> None:
        """Reads the last step from what has been added to metrics.jsonl."""
        try:
            with open_regular(self.folder / "metrics.jsonl") as file:
                file.seek(self.position[0])
                added = file.read()
        except OSError:
            return
        whole = added.rfind(b"\n") + 1
        steps = re.findall(rb'"step": (\d+)', added[:whole])
        self.position = [self.position[0] + whole, int(steps[-1]) if steps else self.position[1]]


def plan(
    recipe: str,
    vary: Sequence[str],
    seeds: int,
    flags: Sequence[str],
    *,
    name: str | None,
    runs_dir: str | Path,
    folds: int = 1,
) -> tuple[str, list[Member]]:
    """The comparison's name and its trainings; every value is parsed as its flag. Raises UserError.

    vary: such as "lr=0.01,0.1". flags: train.py's, for all trainings. folds: trainings of each value, each with another
    part of the training examples as validation set; 1: as the recipe says.
    """
    check_numbers(seeds, folds, name, flags)
    kind = load_recipe(recipe)
    axes = [axis(text, kind) for text in vary]
    names = [axis_name for axis_name, _ in axes]
    if repeated := next((n for n in names if names.count(n) > 1), None):
        raise UserError(f"--vary {repeated}: given twice; list all its values in one, with commas between")
    members: list[Member] = []
    taken: dict[str, str] = {}
    for values in itertools.product(*(choices for _, choices in axes)):
        chosen = dict(zip(names, values, strict=True))
        made, config = parsed(recipe, kind, chosen, flags)
        label = " ".join(f"{axis_name}={canonical(made, config, axis_name)}" for axis_name in names)
        run_name = "-".join(
            [*([name] if name else []), *([re.sub(r"[^\w.=+-]", "_", label.replace(" ", "-"))] * bool(label))]
        )
        if run_name in taken:
            raise UserError(f"--vary: {taken[run_name]} and {' '.join(values)} are the same; give each value once")
        taken[run_name] = " ".join(values)
        default = "all folds" if folds > 1 else "all seeds"
        members += trainings(recipe, kind, chosen, flags, label or default, run_name, seeds, folds, runs_dir)
    for member in members:
        check_same(member)
    return name or "-".join(names) or ("folds" if folds > 1 else "seeds"), members


def check_numbers(seeds: int, folds: int, name: str | None, flags: Sequence[str]) -> None:
    """Raises UserError for numbers, a name or flags that no comparison can have."""
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: must be at least 1")
    if folds < 1:
        raise UserError(f"--folds {folds}: must be at least 2, or left out")
    if name is not None and not re.fullmatch(r"\w[\w.=-]*", name):
        raise UserError(f"--name {name!r}: give a plain name of letters, digits, '-', '_', '=' and '.'")
    for flag in flags:
        own = flag.removeprefix("--").partition("=")[0].replace("-", "_")
        if flag.startswith("--") and own in OWN:
            remedy = {"seed": "give their number with --seeds", "check": "try the recipe with nndist train first"}
            remedy |= dict.fromkeys(("find_lr", "find_batch"), "is a flag of nndist train")
            raise UserError(f"{flag}: {remedy.get(own, 'the comparison chooses it for each training')}")


def parsed(
    recipe: str, kind: type[Recipe], chosen: Mapping[str, str], flags: Sequence[str]
) -> tuple[Recipe, RunConfig]:
    """The recipe with the chosen values, and the settings of its runs; raises UserError."""
    made, config = parse(arguments_of(recipe, kind, chosen, flags))
    for settings in (made, config):
        settings.validate()
    return made, config


def arguments_of(recipe: str, kind: type[Recipe], chosen: Mapping[str, str], flags: Sequence[str]) -> list[str]:
    """train.py's arguments but for what differs between the trainings of one row."""
    defaults = ["--no-progress", "--no-figures", "--wandb", "off"]
    given = {flag.partition("=")[0].replace("--no-", "--") for flag in flags}
    for flag in ("--progress", "--figures", "--wandb"):
        if flag in given:
            at = defaults.index(flag if flag == "--wandb" else flag.replace("--", "--no-"))
            del defaults[at : at + (2 if flag == "--wandb" else 1)]
    return [
        recipe,
        *defaults,
        *flags,
        *(part for name, value in chosen.items() for part in as_flags(name, value, kind)),
    ]


def trainings(
    recipe: str,
    kind: type[Recipe],
    chosen: Mapping[str, str],
    flags: Sequence[str],
    label: str,
    run_name: str,
    seeds: int,
    folds: int,
    runs_dir: str | Path,
) -> list[Member]:
    """The trainings of one row, one for each fold and seed; raises UserError."""
    found = []
    for place, seed in itertools.product(range(1, folds + 1), range(seeds)):
        fold = {"fold": f"{place}/{folds}"} if folds > 1 else {}
        made, config = parsed(recipe, kind, {**chosen, **fold}, flags)
        last = f"fold{place}of{folds}-seed{seed}" if fold else f"seed{seed}"
        run = f"{run_name}-{last}" if run_name else last
        own = ["--seed", str(seed), "--runs-dir", str(runs_dir), f"--run-name={run}"]
        found.append(
            Member(
                label=label,
                seed=seed,
                fold=place if fold else 0,
                folder=RunConfig(runs_dir=str(runs_dir)).runs_folder / made.name / run,
                arguments=[*arguments_of(recipe, kind, {**chosen, **fold}, flags), *own],
                config=config,
                fields=made.fields(),
                source=made.source_hash(),
                modules=helpers.hashes(made.helpers()),
            )
        )
    return found


def axis(text: str, kind: type[Recipe]) -> tuple[str, list[str]]:
    """The field and the values of one --vary; raises UserError."""
    field_name, equals, values = text.partition("=")
    field_name = field_name.strip().removeprefix("--").replace("-", "_")
    choices = [value.strip() for value in values.split(",")]
    if not equals or not all(choices):
        raise UserError(f"--vary {text}: give a field and its values, such as --vary lr=0.01,0.1")
    if re.search(r"[\d.]\.\.[-\d.]", values):
        raise UserError(f"--vary {text}: a range needs --search optuna; without it list the values")
    fields = {f.name for f in (*dataclasses.fields(kind), *dataclasses.fields(RunConfig))} - set(OWN)
    if field_name not in fields:
        near = difflib.get_close_matches(field_name, sorted(fields), n=1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"nndist train {kind.__module__.removeprefix('nndist_recipe_')}.py --help lists all"
        )
        if field_name in OWN:
            hint = "seeds are given by --seeds N" if field_name == "seed" else "the comparison chooses it"
        raise UserError(f"--vary {text}: no field {field_name!r} can be varied; {hint}")
    return field_name, choices


def as_flags(name: str, value: str, kind: type[Recipe]) -> list[str]:
    """A value as flags of train.py; raises UserError if a boolean field's value is neither true nor false."""
    flag = "--" + name.replace("_", "-")
    types = {f.name: f.type for f in (*dataclasses.fields(RunConfig), *dataclasses.fields(kind))}
    if types[name] not in (bool, "bool"):
        return [f"{flag}={value}"]
    if value.lower() not in ("true", "false", "yes", "no"):
        raise UserError(f"--vary {name}={value}: must be true or false")
    return [flag if value.lower() in ("true", "yes") else flag.replace("--", "--no-", 1)]


def canonical(recipe: Recipe, config: RunConfig, name: str) -> str:
    """A parsed value as text, so that 1e-2 and 0.01 are one run."""
    value = getattr(recipe if hasattr(recipe, name) else config, name)
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def check_same(member: Member) -> None:
    """Raises UserError if an earlier comparison trained a run of this name with different fields or source."""
    about = member.about()
    if not about:
        return
    before = {"source": about.get("source_sha256"), **comparable(mapping(about.get("fields")))}
    now = {"source": member.source, **comparable(member.fields)}
    if isinstance(then := about.get("modules"), dict):  # earlier versions did not record them
        before |= {f"source of {place}": text for place, text in then.items()}
        now |= {f"source of {place}": member.modules.get(place) for place in {*then, *member.modules}}
    settings = mapping(about.get("settings"))
    before["precision"], now["precision"] = settings.get("precision"), member.config.precision
    for name, value in now.items():
        is_source = name.partition(" ")[0] == "source"
        allowed = {n.replace("-", "_") for n in member.config.allow_change}
        if before.get(name) != value and ("source" if is_source else name) not in allowed:
            what = "the recipe's file" if name == "source" else name.removeprefix("source of ")
            what = what if is_source else f"{name} {before.get(name)}, not {value},"
            verb = "was different" if is_source else "was used"
            raise UserError(
                f"{member.folder}: {what} {verb} when it was trained; give this comparison a different --name"
            )

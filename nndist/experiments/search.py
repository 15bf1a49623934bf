"""A search over hyper-parameters: trials that optuna chooses one after the other, trained as any comparison's are.

Which trials there are is a function of the space, the sampler's seed, the number of jobs and the scores, whatever is
killed and whichever training is faster: trial n is asked for once trials 0 to n - jobs have ended, and with these told,
in order. So at most `jobs` trials run at a time, and a resumed search asks and tells again what study.json records
(optuna's own storages would do so in the order in which trainings happened to end). Pruning compares a trial at each
evaluation with those same trials.
"""

from __future__ import annotations

import importlib.util
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import machine
from ..directions import direction_of
from ..errors import UserError
from ..files import Each, read_json, write_json
from ..recipe.contract import Recipe
from ..recipe.fields import hints_of, options_of
from ..runs import reading
from ..runs.reading import Series, mapping, read_run
from . import members
from .comparison import Group
from .members import Member
from .sweep import Sweep

FILE = "study.json"
SAMPLERS = ("tpe", "random")
STEPWISE = 10.0  # a range whose ends differ by this factor is searched on a logarithmic scale
TRIAL_KIND = {"values": Each(str), "state?": str, "value?": (float, None), "seen?": [[(float, None)]]}
STUDY_KIND = {"settings": dict, "trials": [TRIAL_KIND]}
"""What is read of study.json (see files.check)."""


@dataclass(frozen=True)
class Choice:
    """What a field is chosen from: the texts `options`, or the range from `low` to `high`, both included."""

    options: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    def distribution(self) -> Any:
        """As optuna has it."""
        from optuna import distributions

        if self.options:
            return distributions.CategoricalDistribution(list(self.options))
        log = self.low > 0 and self.high >= STEPWISE * self.low
        if self.whole:
            return distributions.IntDistribution(int(self.low), int(self.high), log=log)
        return distributions.FloatDistribution(self.low, self.high, log=log)

    def ends(self) -> list[str]:
        """The values that are checked before anything starts."""
        return [*self.options] or [self.text(self.low), self.text(self.high)]

    def text(self, value: Any) -> str:
        """A value as a flag has it."""
        return value if isinstance(value, str) else str(int(value)) if self.whole else repr(float(value))


def space_of(vary: Sequence[str], kind: type[Recipe]) -> dict[str, Choice]:
    """The space of `--vary lr=1e-4..1e-1 --vary width=16,32`, by fields; raises UserError."""
    if not vary:
        raise UserError("--search: say what is searched, such as --vary lr=1e-4..1e-1")
    found: dict[str, Choice] = {}
    for text in vary:
        name, _, values = text.partition("=")
        ends = re.fullmatch(r"\s*(.+?)\s*\.\.\s*(.+?)\s*", values)
        name, options = members.axis(f"{name}={','.join(ends.groups())}" if ends else text, kind)
        if name in found:
            raise UserError(f"--vary {name}: given twice; list all its values in one, with commas between")
        found[name] = _range(text, name, options, kind) if ends else Choice(tuple(options))
    return found


def _range(text: str, name: str, ends: Sequence[str], kind: type[Recipe]) -> Choice:
    try:
        low, high = map(float, ends)
    except ValueError:
        raise UserError(f"--vary {text}: the ends of a range are numbers, such as 1e-4..1e-1") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--vary {text}: a range goes from its lower end to its higher one")
    whole = int in options_of(hints_of(kind).get(name, float))
    if whole and not (low.is_integer() and high.is_integer()):
        raise UserError(f"--vary {text}: {name} is a whole number, and so are the ends")
    return Choice(low=low, high=high, whole=whole)


@dataclass
class Trial:
    """values: of the fields, as flags have them. state: "" while it is trained, then "complete", "pruned" or "failed".
    value: mean of the scores that count, see final_of. seen: [step, score] of its evaluations, up to its end."""

    values: dict[str, str]
    state: str = ""
    value: float | None = None
    seen: list[list[float | None]] = field(default_factory=list)


class Study:
    """Trials asked for and told in one order; kept in a JSON file, and asked and told again from there.

    Raises UserError if the file is damaged, or is that of another search.
    """

    def __init__(
        self,
        path: Path,
        space: Mapping[str, Choice],
        *,
        sampler: str,
        seed: int,
        window: int,
        prune: bool,
        lowest: bool,
        score: str,
    ):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        kind = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[sampler]
        self.path, self.space, self.window, self.prune = path, space, window, prune
        self.direction = "minimize" if lowest else "maximize"
        self._optuna = optuna
        self._study = optuna.create_study(sampler=kind(seed=seed), direction=self.direction)
        self._distributions = {name: choice.distribution() for name, choice in space.items()}
        self._asked: list[Any] = []
        self._told = 0
        self.trials: list[Trial] = []
        self.settings = {
            "optuna": optuna.__version__,
            "sampler": sampler,
            "search-seed": seed,
            "jobs": window,
            "prune": prune,
            "score": score,
            **{f"vary {name}": {**asdict(choice), "options": list(choice.options)} for name, choice in space.items()},
            "direction": self.direction,
        }
        self._replay()

    def can_ask(self) -> bool:
        """Whether enough trials have ended for the next one."""
        return all(trial.state for trial in self.trials[: max(0, len(self.trials) + 1 - self.window)])

    def ask(self) -> int:
        """Chooses the next trial and returns its number."""
        self.trials.append(Trial(self._ask()))
        self.save()
        return len(self.trials) - 1

    def end(self, number: int, state: str, value: float | None, seen: list[list[float | None]]) -> None:
        """Records the outcome of a trial."""
        trial = self.trials[number]
        trial.state, trial.value, trial.seen = state, value, seen
        self.save()

    def _ask(self) -> dict[str, str]:
        number = len(self._asked)
        while self._told <= number - self.window:
            self._tell(self._told)
            self._told += 1
        self._asked.append(self._study.ask(self._distributions))
        return {name: self.space[name].text(value) for name, value in self._asked[-1].params.items()}

    def _tell(self, number: int) -> None:
        states, trial = self._optuna.trial.TrialState, self.trials[number]
        if self.prune:
            for step, value in trial.seen:
                self._asked[number].report(math.nan if value is None else value, int(step or 0))
        if trial.state == "failed" or trial.value is None:
            self._study.tell(self._asked[number], state=states.FAIL)
        elif trial.state == "pruned":
            self._study.tell(self._asked[number], state=states.PRUNED)
        else:
            self._study.tell(self._asked[number], trial.value)

    def prunes_at(self, number: int, seen: Sequence[Sequence[float | None]]) -> int | None:
        """The evaluation at which a trial is worse than the median of those before it; None if at none."""
        before = [one for one in self._study.trials[: max(0, number + 1 - self.window)] if one.state.is_finished()]
        study = self._optuna.create_study(pruner=self._optuna.pruners.MedianPruner(), direction=self.direction)
        study.add_trials(before)
        trial = study.ask(self._distributions)
        for place, (step, value) in enumerate(seen):
            trial.report(math.nan if value is None else value, int(step or 0))
            if trial.should_prune():
                return place
        return None

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"settings": self.settings, "trials": [asdict(trial) for trial in self.trials]})

    def _replay(self) -> None:
        try:
            read = read_json(self.path, STUDY_KIND)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{self.path}: can't be read ({why}); restore it from a copy, or give --name") from error
        for name, now in self.settings.items():
            if (before := read["settings"].get(name)) != now:
                raise UserError(
                    f"{self.path}: {name} was {before}, and is now {now}; give it as before, or another --name"
                )
        for number, record in enumerate(read["trials"]):
            self.trials.append(Trial(**record))
            if (values := self._ask()) != record["values"]:
                raise UserError(
                    f"{self.path}: trial {number} would be {values}, not {record['values']}; give another --name"
                )


class Search(Sweep):
    """The trainings of a study's trials; `make` gives those of a trial from its number and values."""

    def __init__(
        self,
        study: Study,
        num_trials: int,
        score: str,
        make: Callable[[int, Mapping[str, str]], list[Member]],
        logs: Path,
        **settings: Any,
    ):
        self.study, self.num_trials, self.score, self.make = study, num_trials, score, make
        self._of_trial: dict[int, list[Member]] = {}
        self._next_look = 0.0
        super().__init__([], logs, **settings)
        for number, trial in enumerate(study.trials[:num_trials]):
            self._of_trial[number] = make(number, trial.values)
            if trial.state:
                self.members += self._of_trial[number]
                self.num_finished += len(self._of_trial[number])
            else:
                self.add(self._of_trial[number])

    def _more(self) -> bool:
        began = time.monotonic()
        due = began >= self._next_look
        for number, members_ in self._of_trial.items():
            if not self.study.trials[number].state:
                self._look_at(number, members_, due)
        if due:  # at curves that grow, for at most a twentieth of the time
            self._next_look = began + max(1.0, 20 * (time.monotonic() - began))
        while len(self.study.trials) < self.num_trials and self.study.can_ask():
            number = self.study.ask()
            self._of_trial[number] = self.make(number, self.study.trials[number].values)
            self.add(self._of_trial[number])
        return any(not trial.state for trial in self.study.trials[: self.num_trials])

    def _look_at(self, number: int, members_: list[Member], due: bool) -> None:
        """Ends a trial whose trainings have ended, or that is to be pruned; due: also look at those still running."""
        busy = [one for one in members_ if one in self.running or one in self.waiting]
        if any(one.failure for one in members_):
            self.waiting = [one for one in self.waiting if one not in members_]
            if not [one for one in busy if one in self.running]:
                self.study.end(number, "failed", None, [])
        elif not busy or (self.study.prune and due):
            seen = [one for member in members_ for one in seen_of(member, self.score)]
            cut = self.study.prunes_at(number, seen) if self.study.prune else None
            if cut is not None:
                self._prune(members_)
                self.study.end(number, "pruned", seen[cut][1], seen[: cut + 1])
            elif not busy:
                finals = [final_of(member, self.score) for member in members_]
                known = [value for value in finals if value is not None]
                whole = len(known) == len(finals)
                value = sum(known) / len(known) if whole else None
                self.study.end(number, "complete" if whole else "failed", value, seen if self.study.prune else [])

    def _prune(self, members_: list[Member]) -> None:
        self.waiting = [one for one in self.waiting if one not in members_]
        for member in members_:
            member.pruned = True
            if member.process and member.process.poll() is None:
                machine.ask_to_stop(member.process)  # it saves

    def groups(self) -> list[Group]:
        """The table's rows, the best first; pruned trials have none."""
        ended = [
            (n, t) for n, t in enumerate(self.study.trials[: self.num_trials]) if t.state in ("complete", "failed")
        ]
        sign = 1 if self.study.direction == "minimize" else -1
        ended.sort(key=lambda one: (one[1].value is None, sign * (one[1].value or 0.0)))
        found = []
        for number, trial in ended:
            group = Group(self._of_trial[number][0].label)
            for member in self._of_trial[number]:
                if trial.state == "complete":
                    group.runs.append(read_run(member.folder))
                elif member.failure or member is self._of_trial[number][0]:
                    group.failures.append(f"{member.text}: {member.failure or 'failed when it was trained'}")
            found.append(group)
        return found


def check(options: Any, recipe: Recipe) -> bool:
    """Whether the lowest score is best; sets `options.score` where it follows. Raises UserError for what can't be."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("--search optuna: the package optuna is not installed: pip install optuna")
    if options.trials < 1:
        raise UserError(f"--trials {options.trials}: must be at least 1")
    if options.prune and (options.seeds > 1 or options.folds > 1):
        raise UserError("--prune: needs one training for each trial; leave out --seeds and --folds, or --prune")
    options.score = options.score or recipe.best
    if options.score is None:
        raise UserError("--search: name the score that is searched for, such as --score val/loss")
    direction = recipe.best_is if options.score == recipe.best and recipe.best_is else direction_of(options.score)
    if direction is None:
        raise UserError(
            f"--score {options.score}: its name does not say whether highest or lowest is best; add "
            f"--best {options.score} --best-is highest or lowest"
        )
    return direction == "lowest"


def trial_members(
    recipe: str, kind: type[Recipe], flags: Sequence[str], name: str, options: Any
) -> Callable[[int, Mapping[str, str]], list[Member]]:
    """Makes the trainings of a trial; raises UserError if an earlier run of its name is another."""

    def make(number: int, values: Mapping[str, str]) -> list[Member]:
        said = " ".join(f"{field}={short(value)}" for field, value in values.items())
        label, run = f"trial {number}: {said}", f"{name}-trial{number:04d}"
        found = members.trainings(
            recipe, kind, values, flags, label, run, options.seeds, options.folds, options.runs_dir
        )
        for member in found:
            members.check_same(member)
        return found

    return make


def short(value: str) -> str:
    """A value for the table."""
    try:
        return f"{float(value):.4g}" if re.search(r"[.e]", value) else value
    except ValueError:
        return value


def scores_of(member: Member, score: str) -> Series:
    """A score over a run so far; empty before its first evaluation."""
    try:
        return read_run(member.folder).series.get(score, Series(score))
    except UserError:
        return Series(score)


def seen_of(member: Member, score: str) -> list[list[float | None]]:
    """[step, score] of each evaluation."""
    series = scores_of(member, score)
    return [[step, value] for step, value in zip(series.steps, series.values, strict=True)]


def final_of(member: Member, score: str) -> float | None:
    """A run's last score, or its best if it keeps the weights that have it; None if it is not a finite number.

    Raises UserError if there is no such score.
    """
    run = read_run(member.folder)
    if score not in run.series:
        known = ", ".join(one.name for one in run.scores)
        raise UserError(f"--score {score}: {member.folder} has no such score; choose from {known}")
    best = mapping(run.about.get("best"))
    if mapping(run.about.get("fields")).get("best") == score and best:
        return reading.number(mapping(best.get("scores")).get(score))
    return run.series[score].values[-1]

"""Trains one recipe with several values and seeds: a process each, some at a time, resumable together."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .. import machine
from ..config import RunConfig, check_choices
from ..errors import UserError
from ..files import Each, open_regular, read_json
from ..flags.parse import parse
from ..recipe import helpers
from ..recipe.contract import Recipe
from ..recipe.fields import comparable
from ..recipe.loading import load_recipe
from ..runs.reading import mapping, number, read_run
from .comparison import Group

OWN = ("run", "run_name", "seed", "runs_dir", "threads", "check", "find_lr", "find_batch")
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
LAST_WORDS_SECONDS = 60.0  # for the last save of trainings that were told to stop


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
    failure: str = ""
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
        return f"{self.label}, seed {self.seed}"

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
    recipe: str, vary: Sequence[str], seeds: int, flags: Sequence[str], *, name: str | None, runs_dir: str | Path
) -> tuple[str, list[Member]]:
    """The comparison's name and its trainings; every value is parsed as its flag. Raises UserError.

    vary: such as "lr=0.01,0.1". flags: train.py's, for all trainings.
    """
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: must be at least 1")
    if name is not None and not re.fullmatch(r"\w[\w.=-]*", name):
        raise UserError(f"--name {name!r}: give a plain name of letters, digits, '-', '_', '=' and '.'")
    for flag in flags:
        own = flag.removeprefix("--").partition("=")[0].replace("-", "_")
        if flag.startswith("--") and own in OWN:
            remedy = {"seed": "give their number with --seeds", "check": "try the recipe with nndist train first"}
            remedy |= dict.fromkeys(("find_lr", "find_batch"), "is a flag of nndist train")
            raise UserError(f"{flag}: {remedy.get(own, 'the comparison chooses it for each training')}")
    kind = load_recipe(recipe)
    axes = [axis(text, kind) for text in vary]
    names = [axis_name for axis_name, _ in axes]
    if repeated := next((n for n in names if names.count(n) > 1), None):
        raise UserError(f"--vary {repeated}: given twice; list all its values in one, with commas between")
    defaults = ["--no-progress", "--no-figures", "--wandb", "off"]
    given = {flag.partition("=")[0].replace("--no-", "--") for flag in flags}
    for flag in ("--progress", "--figures", "--wandb"):
        if flag in given:
            at = defaults.index(flag if flag == "--wandb" else flag.replace("--", "--no-"))
            del defaults[at : at + (2 if flag == "--wandb" else 1)]
    members: list[Member] = []
    taken: dict[str, str] = {}
    for values in itertools.product(*(choices for _, choices in axes)):
        chosen = [
            part for axis_name, value in zip(names, values, strict=True) for part in as_flags(axis_name, value, kind)
        ]
        arguments = [recipe, *defaults, *flags, *chosen]
        made, config = parse(arguments)
        for settings in (made, config):
            check_choices(settings)
            settings.validate()
        label = " ".join(f"{axis_name}={canonical(made, config, axis_name)}" for axis_name in names)
        run_name = "-".join(
            [*([name] if name else []), *([re.sub(r"[^\w.=+-]", "_", label.replace(" ", "-"))] * bool(label))]
        )
        if run_name in taken:
            raise UserError(f"--vary: {taken[run_name]} and {' '.join(values)} are the same; give each value once")
        taken[run_name] = " ".join(values)
        for seed in range(seeds):
            run = f"{run_name}-seed{seed}" if run_name else f"seed{seed}"
            members.append(
                Member(
                    label=label or "all seeds",
                    seed=seed,
                    folder=RunConfig(runs_dir=str(runs_dir)).runs_folder / made.name / run,
                    arguments=[*arguments, "--seed", str(seed), "--runs-dir", str(runs_dir), f"--run={run}"],
                    config=config,
                    fields=made.fields(),
                    source=made.source_hash(),
                    modules=helpers.hashes(made.helpers()),
                )
            )
    for member in members:
        check_same(member)
    return name or "-".join(names) or "seeds", members


def axis(text: str, kind: type[Recipe]) -> tuple[str, list[str]]:
    """The field and the values of one --vary; raises UserError."""
    field_name, equals, values = text.partition("=")
    field_name = field_name.strip().removeprefix("--").replace("-", "_")
    choices = [value.strip() for value in values.split(",")]
    if not equals or not all(choices):
        raise UserError(f"--vary {text}: give a field and its values, such as --vary lr=0.01,0.1")
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
    """Raises UserError if an earlier comparison trained a run of this name with other fields or another source."""
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


def devices(cpu: bool) -> list[str]:
    """The GPUs for the trainings, as CUDA_VISIBLE_DEVICES names them; empty for CPUs only."""
    import torch

    if cpu or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


class Sweep:
    """The trainings of a comparison, at most `jobs` at a time; finished ones are not trained again.

    `train` raises Stopped after a signal, once every training has saved.
    """

    def __init__(
        self,
        members: list[Member],
        logs: Path,
        *,
        jobs: int,
        gpus: list[str],
        say: Callable[[str], None],
        threads: int | None = None,
    ):
        self.members, self.logs, self.gpus, self.say = members, logs, gpus, say
        self.waiting = [member for member in members if not member.is_finished()]
        self.num_finished = len(members) - len(self.waiting)
        self.running: list[Member] = []
        self.jobs = jobs
        self.signal: int | None = None
        for member in members:  # a resumed one keeps its number of threads: a different one would change bits
            before = number(mapping(member.about().get("settings")).get("threads"))
            member.threads = int(before) if before else threads or max(1, machine.cores() // jobs)

    def train(self, show: Callable[[float], None]) -> None:
        """Runs all waiting trainings; `show` is called with the progress, in trainings."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with self._signals():
            try:
                while (self.waiting or self.running) and self.signal is None:
                    self._start_some()
                    time.sleep(0.1)
                    self._look_after()
                    show(self.num_finished + sum(member.share_done() for member in self.running))
            finally:
                self._stop_all()
        if self.signal is not None:
            raise Stopped(self.signal)

    def _start_some(self) -> None:
        while self.waiting and len(self.running) < self.jobs:
            if self.running and not self.num_finished and not any(m.about() for m in self.running):
                return  # the first one may have to download the data for all
            used = {member.slot for member in self.running}
            self._start(self.waiting.pop(0), next(n for n in range(self.jobs) if n not in used))

    def _start(self, member: Member, slot: int) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "NNDIST_COMPARISON": str(os.getpid())}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        member.slot, member.began = slot, time.monotonic()
        member.before = (machine.busy_seconds(), machine.children_seconds())
        member.is_new = not member.about()
        member.log = (self.logs / f"{member.folder.name}.txt").open("wb")
        member.process = subprocess.Popen(
            [sys.executable, "-m", "nndist", *member.arguments, "--threads", str(member.threads)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=member.log,
            stderr=subprocess.STDOUT,
            **machine.own_group(),  # only this process gets Ctrl-C, and passes it on once
        )
        self.running.append(member)

    def _look_after(self) -> None:
        for member in [m for m in self.running if m.process and m.process.poll() is not None]:
            self.running.remove(member)
            assert member.process is not None and member.log is not None
            member.log.close()
            if self.signal is not None:
                continue
            self.num_finished += 1
            seconds = time.monotonic() - member.began
            own = machine.children_seconds() - member.before[1]
            if self.jobs == 1 and member.is_new:  # otherwise it includes other trainings, or only a part of this one
                member.usage = {"cpu_seconds": round(own, 2)}
                if all_busy := machine.busy_seconds() - member.before[0]:
                    member.usage["others"] = round(max(0.0, all_busy - own) / seconds, 2)
            if member.process.returncode:
                member.failure = last_words(self.logs / f"{member.folder.name}.txt", member.process.returncode)
                self.say(f"failed   {member.text}: {member.failure}")
            else:
                self.say(f"trained  {member.text} ({seconds:.1f} s), {self.num_finished} of {len(self.members)}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Context manager: SIGINT and SIGTERM end the comparison after a save; a second SIGINT ends it at once."""

        def ask(number: int, frame: Any) -> None:
            if self.signal == signal.SIGINT == number:
                for member in self.running:
                    if member.process:
                        member.process.kill()
                os._exit(128 + number)
            self.signal = number

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number_, handler in before.items():
                signal.signal(number_, handler)

    def _stop_all(self) -> None:
        """Tells the running trainings to save and stop, and waits for them."""
        for member in self.running:
            if member.process and member.process.poll() is None:
                member.process.terminate()
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        for member in self.running:
            if member.process:
                try:
                    member.process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    member.process.kill()
                    member.process.wait()

    def groups(self) -> list[Group]:
        """The table's rows, in the order of the values; raises UserError if a run can't be read."""
        groups: dict[str, Group] = {}
        for member in self.members:
            group = groups.setdefault(member.label, Group(member.label))
            if not member.failure:
                group.runs.append(read_run(member.folder))
            else:
                group.failures.append(f"{member.text}: {member.failure}")
        return list(groups.values())


class Stopped(Exception):
    """A signal stopped a comparison."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}; the trainings are saved, and the same command resumes them")
        self.signal = number


def last_words(log: Path, code: int) -> str:
    """Why a training failed: its error line, else its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    error = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
    if error is None and code < 0:
        return f"killed by signal {-code} ({log})"
    return error or (lines[-1][:200] if lines else f"exit code {code} ({log})")

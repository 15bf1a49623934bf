"""Trains members, each in a process of its own, some at a time, resumable together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import machine
from ..runs.reading import mapping, number, read_run
from .comparison import Group
from .members import Member

LAST_WORDS_SECONDS = 60.0  # for the last save of trainings that were told to stop


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
        processes: int = 1,
    ):
        self.logs, self.gpus, self.say = logs, gpus, say
        self.members: list[Member] = []
        self.waiting: list[Member] = []
        self.running: list[Member] = []
        self.num_finished = self.total = 0  # total: where more will be added
        self.jobs, self.processes = jobs, processes
        self.threads = threads or max(1, machine.cores() // (jobs * processes))
        self.signal: int | None = None
        self.add(members)

    def add(self, members: list[Member]) -> None:
        """Adds trainings; those that are finished are not trained again."""
        waiting = [member for member in members if not member.is_finished()]
        self.members += members
        self.waiting += waiting
        self.num_finished += len(members) - len(waiting)
        for member in members:  # a resumed one keeps its number of threads: a different one would change bits
            before = number(mapping(member.about().get("settings")).get("threads"))
            member.threads = int(before) if before else self.threads

    def train(self, show: Callable[[float], None]) -> None:
        """Runs all waiting trainings; `show` is called with the progress, in trainings."""
        self.logs.mkdir(parents=True, exist_ok=True)
        with self._signals():
            try:
                while (self._more() or self.waiting or self.running) and self.signal is None:
                    self._start_some()
                    time.sleep(0.1)
                    self._look_after()
                    show(self.num_finished + sum(member.share_done() for member in self.running))
            finally:
                self._stop_all()
        if self.signal is not None:
            raise Stopped(self.signal)

    def _more(self) -> bool:
        """Whether more trainings will come; adds those that can be trained now."""
        return False

    def _start_some(self) -> None:
        while self.waiting and len(self.running) < self.jobs:
            if self.running and not self.num_finished and not any(m.about() for m in self.running):
                return  # the first one may have to download the data for all
            used = {member.slot for member in self.running}
            self._start(self.waiting.pop(0), next(n for n in range(self.jobs) if n not in used))

    def _start(self, member: Member, slot: int) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "NNDIST_COMPARISON": str(os.getpid())}
        if self.gpus:
            mine = (self.gpus[(slot * self.processes + rank) % len(self.gpus)] for rank in range(self.processes))
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(mine))
        member.slot, member.began = slot, time.monotonic()
        member.before = (machine.busy_seconds(), machine.children_seconds())
        member.is_new = not member.about()
        member.log = (self.logs / f"{member.folder.name}.txt").open("wb")
        member.process = subprocess.Popen(
            [*self._launcher(), "-m", "nndist", *member.arguments, "--threads", str(member.threads)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=member.log,
            stderr=subprocess.STDOUT,
            **machine.own_group(),  # only this process gets Ctrl-C, and passes it on once
        )
        self.running.append(member)

    def _launcher(self) -> list[str]:
        if self.processes == 1:
            return [sys.executable]
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        return [sys.executable, *start]

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
            if member.process.returncode and not member.pruned:
                member.failure = last_words(self.logs / f"{member.folder.name}.txt", member.process.returncode)
                self.say(f"failed   {member.text}: {member.failure}")
            else:
                word = "pruned " if member.pruned else "trained"
                total = self.total or len(self.members)
                self.say(f"{word}  {member.text} ({seconds:.1f} s), {self.num_finished} of {total}")

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
                machine.ask_to_stop(member.process)
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

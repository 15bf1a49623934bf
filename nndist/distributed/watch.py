"""Who waits for whom: where each process is, told to the others, so that a hang has a name."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import platform
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..torch_internals import recorded_collectives
from .timing import DOING, Timing

TELL_SECONDS = 5.0  # between two reports of a process to the others
EXPLAIN_SECONDS = 5.0  # to ask where the others are
FOLDER = "hang"


class Watch:
    """Reports this process's place to the others through their store, from a thread; reads theirs when one is lost.

    A process in the same place for most of the timeout writes its Python stacks to RUN/hang/, before the others give
    up; so do those that gave up. With one process there is nobody to tell.
    """

    def __init__(self, timing: Timing, rank: int, world_size: int, store: dist.Store | None, timeout_seconds: float):
        self.timing, self.rank, self.world_size, self.store = timing, rank, world_size, store
        self.timeout_seconds = timeout_seconds
        self.folder: Path | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._written: tuple[int, str] | None = None  # the place of the last stacks

    def begin(self, folder: Path) -> None:
        """Starts to report; stacks are written below `folder`, the run's."""
        self.folder = folder / FOLDER
        if self.store is None or self.world_size == 1 or self._thread is not None:
            return
        self._thread = threading.Thread(target=self._tell, name="watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stops reporting."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(TELL_SECONDS)

    def _tell(self) -> None:
        every = min(TELL_SECONDS, self.timeout_seconds / 8)
        while not self._ended.wait(every):
            if self.tell() > 0.75 * self.timeout_seconds:
                place = (self.timing.step, self.timing.phase)
                if self._written != place:
                    self._written = place
                    self.write_stacks()

    def tell(self) -> float:
        """Reports this process's place; returns the seconds since it came there."""
        timing = self.timing
        step, phase, since = timing.step, timing.phase, time.perf_counter() - timing.since
        place = {"step": step, "phase": phase, "since": since, "host": platform.node(), "at": time.time()}
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # the store's process has ended
                self.store.set(f"place/{self.rank}", json.dumps(place))
        return since

    def write_stacks(self, error: BaseException | None = None) -> None:
        """Writes the Python stacks of all threads, or of an error, to RUN/hang/rank-R.txt.

        Beside it, to rank-R.collectives.json, torch's flight recorder: which collectives this process has begun and
        ended. A disk that fails costs the files only.
        """
        if self.folder is None:
            return
        timing = self.timing
        since = time.perf_counter() - timing.since
        where = f"after step {timing.step}: for {since:.0f} s in {DOING[timing.phase]}"
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            with (self.folder / f"rank-{self.rank}.txt").open("w", encoding="utf-8") as file:
                print(f"process {self.rank} on {platform.node()}, {where}\n", file=file, flush=True)
                if error is None:
                    faulthandler.dump_traceback(file, all_threads=True)
                else:
                    traceback.print_exception(error, file=file)
            if collectives := recorded_collectives():
                text = json.dumps(collectives)
                (self.folder / f"rank-{self.rank}.collectives.json").write_text(text, encoding="utf-8")

    def explain(self, error: BaseException) -> str:
        """Where the processes are, for the line of an error: who is behind, what the others wait for; "" if unknown.

        Called when another process was lost or did not come. It takes at most EXPLAIN_SECONDS: the store's own process
        may be the one that hangs.
        """
        if self._written != (self.timing.step, self.timing.phase):
            self.write_stacks(error)
        found: list[str] = []

        def ask() -> None:
            self.tell()
            places = self._places()
            if len(places) > 1:
                found.append(told(places, self.world_size))

        thread = threading.Thread(target=ask, name="places", daemon=True)
        thread.start()
        thread.join(EXPLAIN_SECONDS)
        if not found:
            return ""
        return f"{found[0]}; stacks are in {self.folder}" if self.folder else found[0]

    def _places(self) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        if self.store is None:
            return found
        for rank in range(self.world_size):
            with contextlib.suppress(RuntimeError, ValueError, TypeError):
                if self.store.check([f"place/{rank}"]):
                    place = json.loads(self.store.get(f"place/{rank}"))
                    place["since"] = float(place["since"]) + max(0.0, time.time() - float(place["at"]))
                    found[rank] = place
        return found


ORDER = ("other", "evaluation", "saving", "data", "passes", "sum", "update")
"""The phases of a step in their order; the first three come before its data."""


def told(places: dict[int, dict[str, Any]], world_size: int) -> str:
    """The line about the processes' places: those that are furthest behind, and what the others wait in."""

    def position(place: dict[str, Any]) -> tuple[int, int]:
        order = ORDER.index(place["phase"]) if place["phase"] in ORDER else 0
        return place["step"], max(2, order)

    last = min(map(position, places.values()))
    behind = {rank: place for rank, place in places.items() if position(place) == last}
    others = sorted(places.keys() - behind.keys())
    parts = []
    if others:
        for rank, place in sorted(behind.items(), key=lambda pair: -pair[1]["since"])[:3]:
            parts.append(
                f"process {rank} ({place['host']}) was in {DOING.get(place['phase'], place['phase'])} of step "
                f"{place['step'] + 1:,} for {place['since']:.0f} s"
            )
        if len(behind) > 3:
            parts.append(f"{len(behind) - 3} more likewise")
        where = DOING.get(places[others[0]]["phase"], "")
        parts.append(f"{'the others wait' if len(others) > 1 else f'process {others[0]} waits'} in {where}")
    else:
        one = next(iter(behind.values()))
        parts.append(f"all were in {DOING.get(one['phase'], one['phase'])} of step {one['step'] + 1:,}")
    if missing := [rank for rank in range(world_size) if rank not in places]:
        parts.append(f"nothing was heard from process {', '.join(map(str, missing[:5]))}")
    return "; ".join(parts)

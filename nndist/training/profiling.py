"""torch's trace of some steps, for `--profile 10:20`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError

FOLDER = "profile"


def steps_of(text: str) -> tuple[int, int]:
    """The first step and the one after the last of "10:20", counted from 1; raises UserError."""
    match = re.fullmatch(r"(?:steps?\s+)?(\d+):(\d+)", text.strip())
    first, after = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= first < after:
        raise UserError(f"--profile {text!r}: give the first step and the one after the last, such as 10:20")
    return first, after


def ranks_of(text: str) -> set[int] | None:
    """The ranks of "0" or "0,3"; None for "all"; raises UserError."""
    if text.strip() == "all":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise UserError(f"--profile-ranks {text!r}: give ranks, such as 0 or 0,3, or all")
    return {int(part) for part in parts}


class Profile:
    """Writes RUN/profile/rank-R-steps-A-B.json.gz, which ui.perfetto.dev and chrome://tracing show.

    Recording slows these steps down; it changes none of their bits.
    """

    def __init__(self, text: str, ranks: str, rank: int):
        self.first, self.after = steps_of(text) if text else (0, 0)
        wanted = ranks_of(ranks)
        self.rank = rank
        self.wanted = bool(text) and (wanted is None or rank in wanted)
        self._profiler: Any = None

    def before_step(self, number: int) -> None:
        """Starts to record if this is the first of the steps; `number` counts from 1."""
        if self.wanted and self._profiler is None and number == self.first:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports on stderr that there is no GPU
            from torch.profiler import ProfilerActivity, profile

            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = profile(activities=kinds)
            self._profiler.start()

    def after_step(self, number: int, folder: Path, *, last: bool = False) -> Path | None:
        """Writes the trace after the last of the steps, or of the run; returns its path then."""
        if self._profiler is None or not (number + 1 >= self.after or last):
            return None
        profiler, self._profiler, self.wanted = self._profiler, None, False
        profiler.stop()
        place = folder / FOLDER
        place.mkdir(exist_ok=True)
        path = place / f"rank-{self.rank}-steps-{self.first}-{number}.json.gz"
        profiler.export_chrome_trace(str(path))
        return path

"""Which examples each process trains on, written down step by step: for verify, as it is no setting of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..data.feed import GlobalBatch
    from ..training.trainer import Trainer


def write_down(folder: Path) -> None:
    """Has this process append the numbers of its examples to a file of its own in `folder`, after each step."""
    from ..training.trainer import Trainer

    take_step, rank = Trainer.take_step, int(os.environ.get("RANK", 0))
    folder.mkdir(parents=True, exist_ok=True)

    def taking(self: Trainer, batch: GlobalBatch) -> bool:
        taken = take_step(self, batch)
        if taken:
            numbers = [number for micro in batch.micro_batches if micro.size for number in micro.numbers.tolist()]
            line: dict[str, Any] = {"step": self.step, "of": self.runtime.world_size, "examples": numbers}
            with (folder / f"rank-{rank}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return taken

    Trainer.take_step = taking  # type: ignore[method-assign]


def read(folder: Path) -> dict[int, list[int]]:
    """The examples of each step of a launch, in the order of the global batch; without steps that a process lacks."""
    shares: dict[int, dict[int, list[int]]] = {}
    world_size = 1
    for path in folder.glob("rank-*.jsonl"):
        rank = int(path.stem.removeprefix("rank-"))
        for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if text.endswith("\n"):  # else a kill cut it short
                line = json.loads(text)
                world_size = line["of"]
                shares.setdefault(line["step"], {})[rank] = line["examples"]
    whole = {step: share for step, share in shares.items() if len(share) == world_size}
    return {step: [number for rank in sorted(share) for number in share[rank]] for step, share in sorted(whole.items())}


def compared(alone: dict[int, list[int]], launches: list[dict[int, list[int]]]) -> tuple[str, bool]:
    """Whether every step of the launches has the examples of the run on one process, and none is missing."""
    for launch in launches:
        for step, numbers in launch.items():
            if numbers != alone.get(step):
                among = "in a different order" if sorted(numbers) == sorted(alone.get(step, [])) else "different"
                return f"the examples of step {step} are {among}", False
    missing = alone.keys() - {step for launch in launches for step in launch}
    if missing or not alone:
        return f"the examples of step {min(missing, default=1)} are not known", False
    return f"the examples of all {len(alone)} steps are the same, in the same order", True

"""Runs that are killed and started again, and whether they ended with the bits of one that never was."""

import json
from pathlib import Path

import pytest
from launching import ROOT, Processes

from nndist.runs.records import without_times

RECIPE = ROOT / "tests/workers/resumable.py"


STEPS = 33


class Run:
    """A run in a folder of its own, launched as often as it takes."""

    def __init__(self, folder: Path, *flags, world_size=1):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.world_size = folder, world_size
        self.flags = ["--runs-dir", folder, "--run", "it", "--no-progress", "--no-figures", "--threads", 1, *flags]
        self.flags += ["--log-every", 4, "--timeout-seconds", 20]

    @property
    def place(self) -> Path:
        return self.folder / "resumable/it"

    def launch(self, *flags, fault=None, world_size=None, patch=None, env=None) -> Processes:
        env = {**({"FAULT": fault} if fault else {}), **(env or {})}
        arguments = [RECIPE, *self.flags, *flags]
        return Processes(world_size or self.world_size, arguments, env=env, folder=self.folder, patch=patch)

    def finish(self, *flags, **named) -> "Run":
        launched = self.launch(*flags, **named)
        codes = launched.wait()
        assert not any(codes), f"{codes}\n{launched.said()}"
        return self

    def die(self, fault, *flags, **named) -> "Run":
        launched = self.launch(*flags, fault=fault, **named)
        assert any(launched.wait()), launched.said()
        return self

    def newest(self) -> Path:
        return max((self.place / "checkpoints").glob("step-*"))

    def records(self) -> list[dict]:
        lines = [json.loads(line) for line in (self.place / "metrics.jsonl").read_text().splitlines()]
        return [without_times(line) for line in lines]


def assert_same(run: Run, other: Run) -> None:
    """Networks, average, optimizers, random states, scores, records and snapshots: every bit."""
    assert run.newest().name == other.newest().name
    for name in ("model", "ema", "optimizer", "random"):
        file = f"{name}.safetensors"
        assert (run.newest() / file).read_bytes() == (other.newest() / file).read_bytes(), file
    assert run.records() == other.records()
    states = [json.loads((r.newest() / "manifest.json").read_text())["state"] for r in (run, other)]
    for state in states:
        for name in ("metrics_bytes", "metrics_chain", "saved"):
            state.pop(name)
    assert states[0] == states[1]
    for snapshot in (other.place / "snapshots").iterdir():
        assert (run.place / "snapshots" / snapshot.name).read_bytes() == snapshot.read_bytes()
    assert json.loads((run.place / "run.json").read_text())["status"] == "finished"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One uninterrupted run per kind, made on first use."""
    made: dict = {}

    def get(world_size=1, *flags) -> Run:
        key = (world_size, *flags)
        if key not in made:
            made[key] = Run(tmp_path_factory.mktemp("uninterrupted"), *flags, world_size=world_size).finish()
        return made[key]

    return get


SAVES = ("--save-every", "5 steps")


def over_the_network(rank):
    """Processes of one machine add up as those of several do."""
    import nndist.distributed.shared_memory

    nndist.distributed.shared_memory.MOST_PROCESSES = 0


def slow_steps(seconds: float, rank: int) -> None:
    """A patch for `Run.launch`, by functools.partial: each step takes so much longer."""
    import time

    from nndist.training.trainer import Trainer

    take_step = Trainer.take_step

    def slow(trainer, batch):
        time.sleep(seconds)
        return take_step(trainer, batch)

    Trainer.take_step = slow

"""Nodes that are killed and that join while a run trains, under torchrun's agents: as many as there are."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from cluster import end
from differences import relative_difference
from launching import ROOT, Processes, children_of, free_port
from safetensors.torch import load_file

from nndist.runs.records import without_times

SEEN = ROOT / "tests/workers/seen.py"
SAVES = 20  # steps between two checkpoints
STEPS = 320


class Nodes:
    """Agents of one elastic launch, each with one process; they come and go."""

    def __init__(self, folder: Path, arguments):
        self.folder, self.port = folder, free_port()
        self.agents: list[subprocess.Popen] = []
        self.command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:4", "--nproc-per-node", "1"]
        self.command += ["--max-restarts", "9", "--rdzv-backend", "c10d", "--rdzv-id", "it"]
        self.command += ["--rdzv-endpoint", f"localhost:{self.port}", "--local-addr", "localhost"]
        # how long to wait for more nodes; a node that is silent for 3 s is gone
        self.command += ["--rdzv-conf", "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"]
        self.command += [ROOT / "launch/train.py", SEEN, *arguments]
        # torch 2.14.1 tells a node that joins later nothing of the shared store, and it waits in vain
        self.env = {**os.environ, "SEEN": str(folder / "seen.jsonl"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def start(self) -> None:
        """One more node; the first one hosts the rendezvous, and is there before the next."""
        output = (self.folder / f"node{len(self.agents)}.txt").open("w")
        command = [str(part) for part in self.command]
        self.agents.append(
            subprocess.Popen(command, env=self.env, stdout=output, stderr=output, start_new_session=True)
        )
        deadline = time.monotonic() + 120
        while len(self.agents) == 1 and time.monotonic() < deadline:
            try:
                socket.create_connection(("localhost", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.2)

    def kill(self, number: int) -> None:
        """A machine is gone: agent and process at once, without a word."""
        agent = self.agents[number].pid
        for pid in [*children_of(agent), agent]:  # the process first: without its agent it would save and stop
            os.kill(pid, signal.SIGKILL)

    def seen(self) -> list[dict]:
        path = self.folder / "seen.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_until(self, processes: int, steps: int) -> int:
        """Waits until so many processes have taken that many steps together; returns the last step."""
        deadline = time.monotonic() + 120
        while True:
            since = list(itertools.takewhile(lambda line: line["processes"] == processes, reversed(self.seen())))
            if len(since) >= steps * processes:
                return since[0]["step"]
            assert time.monotonic() < deadline, f"no {steps} steps by {processes} processes\n{self.said()}"
            time.sleep(0.05)

    def said(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("node*.txt")))


@pytest.fixture
def nodes(tmp_path):
    flags = ["--save-every", f"{SAVES} steps", "--log-every", 10, "--no-progress", "--no-figures", "--threads", 1]
    flags += ["--wandb", "off", "--no-report", "--timeout-seconds", 60]
    made = Nodes(tmp_path, ["--runs-dir", tmp_path / "elastic", "--run-name", "it", *flags])
    try:
        yield made, flags
    finally:
        end(*made.agents)


# What comes (so many nodes) or goes (which ones), one after the other. Node 0 hosts the rendezvous, and stays.
FEW = [2, 1, [1]]
MANY = [3, [2], 1, [1, 3]]


@pytest.mark.parametrize(
    "events", [pytest.param(FEW, marks=pytest.mark.long), pytest.param(MANY, marks=pytest.mark.nightly)], ids=str
)
def test_nodes_that_are_killed_and_that_join_cost_the_steps_since_the_last_checkpoint(tmp_path, nodes, events):
    launched, flags = nodes
    sizes, last = [0], []
    for event in events:
        if isinstance(event, int):
            for _ in range(event):
                launched.start()
            sizes.append(sizes[-1] + event)
        else:
            for number in event:
                launched.kill(number)
            sizes.append(sizes[-1] - len(event))
        if event is not events[-1]:
            last.append(launched.wait_until(sizes[-1], 25))
    assert launched.agents[0].wait(200) == 0, launched.said()

    alone = {"SEEN": str(tmp_path / "alone.jsonl")}
    arguments = [SEEN, "--runs-dir", tmp_path / "alone", "--run", "it", *flags, "--seconds", 0]
    assert Processes(1, arguments, env=alone, folder=tmp_path).wait() == [0]
    places = [tmp_path / kind / "seen/it" for kind in ("elastic", "alone")]
    described = json.loads((places[0] / "run.json").read_text())
    assert described["status"] == "finished"
    # a node that comes late joins the others, as any does
    launches = described["launches"][-len(events) :]
    assert [launch["world_size"] for launch in launches] == sizes[1:], launches
    lost = [reached - launch["from_step"] for reached, launch in zip(last, launches[1:], strict=True)]
    for event, steps in zip(events[1:], lost, strict=True):
        if isinstance(event, int):
            assert steps <= 0, "a node that joins costs no step: the others save first"
        else:  # what was reached was read a moment before the kill, and a checkpoint that is being written is lost
            assert 0 < steps <= SAVES + 5, (last, launches)

    expected = numbers_of([json.loads(line) for line in (tmp_path / "alone.jsonl").read_text().splitlines()])
    for attempt in attempts(launched.seen()):
        for step, numbers in numbers_of(attempt).items():
            assert numbers == expected[step], f"step {step}"
    assert len(expected) == STEPS
    weights = [load_file(place / f"checkpoints/step-{STEPS:08d}/model.safetensors") for place in places]
    assert relative_difference(*weights) < 1e-12
    records = [[json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()] for place in places]
    for ours, theirs in zip(*records, strict=True):
        ours, theirs = without_times(ours), without_times(theirs)
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"data"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9), name


def attempts(lines: list[dict]) -> list[list[dict]]:
    """The lines of each start of the processes: one ends where a step comes again, or the number of processes changes.

    Steps at the end of an attempt that some of its processes did not reach are left out.
    """
    found: list[list[dict]] = [[]]
    for line in lines:
        before = found[-1]
        again = any((line["step"], line["rank"]) == (other["step"], other["rank"]) for other in before)
        if before and (again or line["processes"] != before[-1]["processes"]):
            found.append([])
        found[-1].append(line)
    whole = []
    for attempt in found:
        present = defaultdict(set)
        for line in attempt:
            present[line["step"]].add(line["rank"])
        whole.append([line for line in attempt if len(present[line["step"]]) == line["processes"]])
    return whole


def numbers_of(attempt: list[dict]) -> dict[int, list[int]]:
    """The examples of each step, in the order of the global batch."""
    found: dict[int, list[int]] = defaultdict(list)
    for line in sorted(attempt, key=lambda line: (line["step"], line["rank"])):
        found[line["step"]] += line["numbers"]
    return found

"""Where a step's time goes, per process; and who is named when one does not come."""

import json
import signal
import time

import pytest
import torch
from conftest import ROOT
from resuming import SAVES, Run, over_the_network

import nndist
from nndist.distributed.timing import MOST_EVENTS, Pace, Timing
from nndist.distributed.watch import told

CPU = torch.device("cpu")


def test_a_slow_loader_shows_as_data():
    def slow():
        for number in range(3):
            time.sleep(0.02)
            yield number

    timing = Timing(CPU)
    for _ in timing.fetched(slow()):
        timing.enter("passes")
        timing.enter("update")
        timing.stepped()
        time.sleep(0.01)  # a hook of the recipe: no part of the step
    steps, seconds = timing.take()
    assert steps == 3
    assert seconds["data"] >= 0.06 and seconds["other"] >= 0.03
    assert seconds["passes"] + seconds["update"] < 0.02
    assert timing.take()[0] == 0, "each second is recorded once"


def test_it_costs_less_than_a_hundredth_of_a_step_of_a_millisecond():
    timing, pace = Timing(CPU), Pace(0, 1, CPU, lambda table: table)
    tries, steps = [], 2000
    for _ in range(7):
        began = time.process_time()
        for number, _ in enumerate(timing.fetched(iter(range(steps)))):
            for phase in ("passes", "sum", "update"):
                timing.enter(phase)
            timing.stepped()
            if number % 50 == 0:
                pace.record(timing)
        tries.append((time.process_time() - began) / steps)
    assert min(tries) < 1e-5


class FakeEvent:
    """An event of a GPU that takes a millisecond from each to the next, whatever the host does."""

    recorded = 0

    def record(self):
        FakeEvent.recorded += 1
        self.at = FakeEvent.recorded

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return float(end.at - self.at)


def test_on_a_gpu_its_own_clock_counts_and_events_do_not_pile_up():
    timing = Timing(CPU, FakeEvent)
    for _ in range(MOST_EVENTS):
        for phase in ("data", "passes", "sum", "update"):
            timing.enter(phase)
        timing.stepped()
        assert len(timing._events) <= MOST_EVENTS + 1
    steps, seconds = timing.take()
    assert seconds["passes"] / steps == pytest.approx(0.001) and seconds["data"] / steps == pytest.approx(0.001)


def test_the_slowest_process_is_named_by_its_work_and_not_by_its_waiting():
    others = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 1.0]], dtype=torch.float64)  # 0 is this one
    pace = Pace(0, 2, CPU, lambda table: table + others)
    timing = Timing(CPU)
    timing.seconds |= {"passes": 1.0, "sum": 3.0}
    timing.steps = 2
    found = pace.record(timing)
    assert found["seconds/slowest"] == pytest.approx(2.0, abs=1e-3), "4 s for two steps"
    assert found["seconds/passes"] == pytest.approx(0.75, abs=1e-3)
    first, second = pace.summary(["a", "b"])
    assert (first["slowest_in"], second["slowest_in"]) == (0, 1)
    assert second == {
        "host": "b",
        "seconds_per_step": {"data": 0.5, "passes": 1.0, "sum": 0.0, "update": 0.5},
        "slowest_in": 1,
    }


def place(step, phase, since=3.0, host="n1"):
    return {"step": step, "phase": phase, "since": since, "host": host, "at": 0.0}


def test_the_line_names_who_is_behind():
    places = {0: place(411, "sum"), 1: place(411, "sum"), 2: place(411, "data", 61.0, "n2")}
    said = told(places, 3)
    assert said == (
        "process 2 (n2) was in loading data of step 412 for 61 s; the others wait in the sum of the gradients"
    )


def test_where_all_are_in_the_same_place_nobody_is_blamed():
    said = told({rank: place(5, "passes") for rank in range(3)}, 3)
    assert said == "all were in the forward or backward pass of step 6"


def test_a_process_that_is_a_step_behind_is_named_whatever_it_does():
    said = told({0: place(6, "data"), 1: place(5, "update", 9.0)}, 2)
    assert said.startswith("process 1 (n1) was in the update of step 6 for 9 s; process 0 waits in loading data")


def test_a_process_that_never_reported_is_named():
    assert "nothing was heard from process 2" in told({0: place(0, "sum"), 1: place(0, "sum")}, 3)


def test_an_epoch_is_timed_without_its_evaluations_and_only_if_it_is_whole():
    timing = Timing(CPU)
    timing.end_epoch()  # it began before this launch
    assert timing.take_epochs() == {}
    for pause in (0.03, 0.09):
        timing.enter("evaluation")
        time.sleep(0.2)
        timing.enter("passes")
        time.sleep(pause)
        timing.enter("saving")
        time.sleep(0.2)
        timing.enter("other")
        timing.end_epoch()
    assert 0.06 <= timing.take_epochs()["seconds_per_epoch"] < 0.2, "the mean of both"
    assert timing.take_epochs() == {}


def test_the_seconds_of_an_epoch_are_recorded_once_for_each_whole_one(tmp_path):
    settings = {
        "runs_dir": tmp_path,
        "run": "a",
        "threads": 1,
        "figures": False,
        "report": False,
        "progress": False,
        "data_source": "sample",
    }
    steps = 4000 // 500
    for stop in (steps + 3, 4 * steps):  # stopped in the second epoch
        nndist.train(ROOT / "recipes/mnist_mlp.py", batch_size=500, epochs=4, max_steps=stop, log_every=1, **settings)
    records = map(json.loads, (tmp_path / "mnist_mlp/a/metrics.jsonl").read_text().splitlines())
    found = {record["step"]: record["seconds_per_epoch"] for record in records if "seconds_per_epoch" in record}
    assert list(found) == [steps, 3 * steps, 4 * steps] and min(found.values()) > 0


def test_the_records_hold_the_split_of_each_step(uninterrupted):
    run = uninterrupted(3, *SAVES)
    lines = [json.loads(line) for line in (run.place / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "examples_per_second" in line]
    names = {f"seconds/{phase}" for phase in ("data", "passes", "sum", "update", "slowest")}
    assert timed and all(names <= line.keys() for line in timed)
    described = json.loads((run.place / "run.json").read_text())
    assert [len(row["seconds_per_step"]) for row in described["processes"]] == [4, 4, 4]
    assert all(row["host"] for row in described["processes"])


def _stop_in_loading(rank):
    """The last process stops (SIGSTOP) while it loads the data of its 6th step."""
    import os

    from nndist.data.feed import Feed

    epoch = Feed.epoch

    def stopping(self, *arguments):
        for number, batch in enumerate(epoch(self, *arguments), 1):
            if number == 6 and rank == 2:
                time.sleep(1.0)  # a report of this place goes out
                os.kill(os.getpid(), signal.SIGSTOP)
            yield batch

    Feed.epoch = stopping


def _stop_in_loading_over_the_network(rank):
    over_the_network(rank)
    _stop_in_loading(rank)


@pytest.mark.parametrize("patch", [_stop_in_loading, _stop_in_loading_over_the_network])
def test_a_stopped_process_is_named_by_those_that_wait_for_it(tmp_path, patch):
    run = Run(tmp_path, world_size=3)
    launched = run.launch("--timeout-seconds", 4, patch=patch)
    deadline = time.monotonic() + 60
    while "was in loading data" not in launched.said() and time.monotonic() < deadline:
        time.sleep(0.1)
    said = launched.said()
    launched.kill(2)
    assert launched.wait()[0] == 1
    assert "process 2 (" in said and "was in loading data of step 6 for" in said, said
    assert "the others wait in the forward or backward pass; stacks are in" in said
    stacks = (run.place / "hang/rank-0.txt").read_text()
    assert "batch_norm.py" in stacks, "BatchNorm sums first"
    assert ("shared_memory.py" in stacks) == (patch is _stop_in_loading)
    assert "after step 5" in (run.place / "hang/rank-0.txt").read_text()
    if patch is _stop_in_loading:  # they wait in shared memory, of which torch knows nothing
        return
    (recorded,) = json.loads((run.place / "hang/rank-0.collectives.json").read_text()).values()
    *_, before, last = recorded["entries"]
    assert before["retired"] and not last["retired"], "the collective that it waits in is the one that has not ended"
    assert last["profiling_name"].startswith("gloo:") and last["input_sizes"]
    assert {path.suffix for path in (run.place / "hang").iterdir()} == {".txt", ".json"}, "no pickle"

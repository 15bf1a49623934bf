"""What the records say of the machine: load, memory and traffic, in their units, seldom enough to cost nothing."""

import os
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

import nndist
from nndist.machine import Usage


@pytest.fixture
def clock(monkeypatch):
    """The time, which a test moves on."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.seconds)
    return now


def test_traffic_is_in_mebibytes_per_second_since_the_last_sample(clock, monkeypatch):
    disk = SimpleNamespace(read_bytes=0, write_bytes=5)
    network = SimpleNamespace(bytes_sent=7, bytes_recv=1)
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: disk)
    monkeypatch.setattr(psutil, "net_io_counters", lambda: network)
    usage = Usage()
    clock.seconds += 9
    assert usage.figures() == {}, "it is not due"
    clock.seconds += 7
    disk.read_bytes, disk.write_bytes = 32 << 20, 5 + (16 << 20)
    network.bytes_sent, network.bytes_recv = 7 + (8 << 20), 1 + (8 << 20)
    found = usage.figures()
    traffic = {name: value for name, value in found.items() if name.startswith("traffic/")}
    assert traffic == {"traffic/disk_read": 2.0, "traffic/disk_written": 1.0, "traffic/network": 1.0}
    assert found["memory/process"] == pytest.approx(psutil.Process().memory_info().rss / 2**30, rel=0.2)
    assert found["memory/process"] < found["memory/machine"] < psutil.virtual_memory().total / 2**30
    assert 0 <= found["load/cpu"] <= 100
    assert usage.figures() == {}


def test_what_a_container_hides_is_left_out(clock, monkeypatch):
    def hidden():
        raise OSError("no such file")

    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)
    monkeypatch.setattr(psutil, "net_io_counters", hidden)
    usage = Usage()
    clock.seconds += 11
    assert usage.figures().keys() == {"load/cpu", "memory/process", "memory/machine"}


def test_a_run_records_them_beside_its_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(Usage, "SECONDS", 0.0)
    from toys import Line

    settings = {"progress": False, "figures": False, "report": False, "threads": 1, "wandb": "off", "log_every": 5}
    result = nndist.train(Line(), **settings, runs_dir=tmp_path, run="it")
    steps, load = result.history.series("load/cpu")
    assert steps == result.history.series("train/loss")[0] and all(0 <= value <= 100 for value in load)
    assert os.cpu_count() and min(result.history.series("memory/process")[1]) > 0.05


def test_a_gpus_memory_and_load_are_recorded_where_the_driver_tells_them(monkeypatch):
    """On a machine without one: what torch and pynvml would say."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "utilization", lambda: 87)
    assert Usage._of_gpu() == {"memory/gpu": 1.5, "load/gpu": 87.0}

    def missing():
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    assert Usage._of_gpu() == {"memory/gpu": 1.5}

"""Sums over the processes of one machine: the right bits on each, and an end where one of them ends or hangs."""

import platform
import time
from pathlib import Path

import pytest
from launching import Forked
from workers import host_sums

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="shares memory on Linux and x86-64 only"
)


def start(folder, world_size, what):
    """The processes."""
    return [
        Forked(host_sums.main, folder, rank, world_size, what, output=folder / f"output-{rank}")
        for rank in range(world_size)
    ]


def left_over():
    return set(Path("/dev/shm").glob("nndist-*"))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("what", ["sums", "sizes", "no room", "no room for one", "another machine"])
def test_all_processes_have_the_sum_or_none(tmp_path, world_size, what):
    before = left_over()
    for process in start(tmp_path, world_size, what):
        code, said = process.wait()
        assert code == 0, said
    assert left_over() == before


@pytest.mark.parametrize("what, words", [("killed", "Connection closed by peer"), ("stopped", "Timed out after 3 s")])
def test_a_process_that_ends_or_hangs_is_not_waited_for(tmp_path, what, words):
    before = left_over()
    processes = start(tmp_path, 3, what)
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        began = time.monotonic()
        for rank in (0, 2):
            code, said = processes[rank].wait()
            assert code == 1 and f"RuntimeError: {words}" in said and "process 1" in said
        assert time.monotonic() - began < 20
        assert left_over() == before
    finally:
        processes[1].process.kill()

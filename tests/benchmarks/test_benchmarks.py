"""Benchmarks of a GPU without one: their parts run, a part that fails or hangs costs a row, and nothing is kept."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from launching import python

GPU = ROOT / "tests/benchmarks/gpu.py"
SESSION = ROOT / "tests/benchmarks/gpu_session.py"
FAULTS = """
import os, signal, sys, time
sys.path.insert(0, {folder!r})
import gpu
def fails(bench):
    bench.add("before", milliseconds=1.5)
    raise RuntimeError("\\nthe cause\\nand more")
def hangs(bench): time.sleep(60)
def dies(bench): os.kill(os.getpid(), signal.SIGSEGV)
def fine(bench):
    def broken(): raise ValueError("no such way")
    def breaks(steps): raise ValueError("at its first turn")
    gpu.take_turns(bench, {{"first": lambda: lambda steps: 0.002, "absent": lambda: None, "broken": broken,
                            "breaks": lambda: breaks, "last": lambda: lambda steps: 0.001}}, 3)
    bench.add("not judged", bar=bench.judge(False))
    bench.on_gpu, bench.options.quick, bench.options.data_source = True, False, "mnist"
    bench.add("too slow", bar=bench.judge(False))
    bench.add("fast enough", bar=bench.judge(True))
def late(bench): bench.add("never")
parts = [("environment", 30, gpu.environment), ("a", 9, fails), ("b", 1, hangs), ("c", 9, dies), ("d", 9, fine)]
gpu.parts_of = lambda quick: [gpu.Part(*part) for part in [*parts, ("e", 10**4, late)]]
gpu.main()
"""


def rows_of(path):
    return json.loads(path.read_text())["rows"]


def quietly(*arguments, **settings):
    # a GPU of the machine that this runs on is not asked for
    return python(*arguments, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, **settings)


def test_a_part_that_fails_hangs_or_dies_costs_one_row(tmp_path):
    code = FAULTS.format(folder=str(GPU.parent))
    flags = ["--device", "cpu", "--quick", "--minutes", "1", "--to", tmp_path / "kept.json"]
    done = quietly("-c", code, *flags)
    assert done.returncode == 0, done.stderr
    at_once = (tmp_path / "kept.rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in at_once] == rows_of(tmp_path / "kept.json")
    found = {(row["part"], row["what"]): row["note"] for row in rows_of(tmp_path / "kept.json")}
    assert found["a", "fails"] == "failed: RuntimeError: the cause" and found["a", "before"] == ""
    assert found["b", "hangs"] == "stopped after 1 s"
    assert found["c", "dies"] == "failed: ended by signal 11"
    assert found["d", "absent"] == "left out: not installed"
    assert found["d", "broken"] == "failed: ValueError: no such way"
    assert found["d", "breaks"] == "failed: ValueError: at its first turn"
    assert found["e", "late"].startswith("left out: of 1 minutes ")
    last = next(row for row in rows_of(tmp_path / "kept.json") if row["what"] == "last")
    assert last["milliseconds"] == 1 and last["ratio"] == 0.5
    assert "of 2 bars 1 missed: d: too slow; " in done.stdout
    table = done.stdout.rpartition("ms a step")[2]
    assert all(what in table for _, what in found) and "7 rows without a figure" in table.splitlines()[-2]


def test_what_can_not_be_measured_is_said_in_one_line():
    done = quietly(GPU, "--data-source", "sample")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --device cuda: no GPU can be used here; --device cpu --quick rehearses without one"
    ]
    done = quietly(GPU, "--device", "cpu")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and "--quick" in done.stderr


def test_a_session_that_is_cut_off_leaves_its_rows(tmp_path):
    """Killed in the midst of its measurements, it has written those before."""
    command = [sys.executable, GPU, "--device", "cpu", "--quick", "--only", "places", "--to", tmp_path / "gpu.json"]
    process = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.DEVNULL)
    rows, deadline = tmp_path / "gpu.rows.jsonl", time.monotonic() + 120
    while not (rows.exists() and rows.read_text().count("\n") >= 2) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["part"] for row in found[:2]] == ["environment", "places"] and found[1]["note"].startswith("all ")


def rehearsed(out, part):
    """What one part of a session writes on a CPU; nothing of it is kept as a result."""
    results = GPU.parent / "results"
    before = sorted(results.glob("*"))
    limits = ["--minutes", 20, "--test-minutes", 10]
    done = quietly(SESSION, "--rehearse", "--out", out, "--only", part, *limits, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert sorted(results.glob("*")) == before
    session = json.loads((out / "session.json").read_text())
    assert session["ended"] == {part: 0} and session["rehearsal"] is True
    return session


@pytest.mark.nightly
def test_the_gpus_tests_are_rehearsed(tmp_path):
    session = rehearsed(tmp_path, "tests")
    assert session["counts"]["failed"] == 0 and session["counts"]["passed"] >= 14
    assert session["tests"] == [json.loads(line) for line in (tmp_path / "tests.jsonl").read_text().splitlines()]


@pytest.mark.nightly
def test_the_whole_protocol_runs_on_a_cpu(tmp_path):
    """Each part, with a few steps."""
    session = rehearsed(tmp_path, "measurements")
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert session["rows"] == kept["rows"]
    assert kept["is_gpu"] is False and kept["device"] == "cpu, not a GPU" and not any(r["bar"] for r in kept["rows"])
    notes = {row["what"]: row["note"] for row in kept["rows"]}
    absent = [note for what, note in notes.items() if note.startswith(("failed", "stopped", "left out"))]
    assert absent in ([], ["left out: not installed"]), absent  # Lightning is not among the tests' packages
    for ways in (
        "document 004's script, as written",
        "its loop on tensors on the device",
        "Accelerate's own loop",
        "nndist",
        "nndist --compile",
        "mnist_cnn --tf32",
        "mnist_cnn --channels-last off",
        "mnist_cnn --no-cudnn-benchmark",
        "decoded by workers, copied beside the step",
        "decoded on the device",
    ):
        assert ways in notes
    for recipe in ("mnist_cnn", "mnist_rnn", "mnist_gan", "char_gpt"):
        assert notes[f"{recipe}: resumed"] == "all equal, after 6 steps"
        assert recipe in notes and f"{recipe} --compile" in notes
    for recipe in ("mnist_cnn", "mnist_gan"):
        assert notes[f"{recipe}: on the device"].startswith("all ")
    assert notes["mnist_cnn, bf16"].endswith("% after 11 steps")

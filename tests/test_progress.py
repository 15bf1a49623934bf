"""What is drawn while something goes on: bars for a terminal, lines for a pipe or a log file."""

import contextlib
import fcntl
import os
import struct
import subprocess
import sys
import termios
import threading

import pytest
from conftest import ROOT
from toys import Line

import nndist
from nndist import progress

QUIET = {"figures": False, "report": False, "threads": 1, "wandb": "off"}


def test_a_pipe_gets_lines_and_no_carriage_return(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    nndist.train(Line(), **QUIET, runs_dir=tmp_path)
    said = capfd.readouterr()
    assert "\r" not in said.out + said.err and "\x1b" not in said.out + said.err
    lines = said.err.splitlines()
    assert len(lines) > 2 and all(line.startswith("toys [generated") and "/21 " in line for line in lines), lines[:5]
    assert any("% " in line and ", loss=" in line for line in lines), lines[:5]
    assert not set(said.err) & set("▏▎▍▌▋▊▉█"), "after an evaluation there is no bar either"


def test_a_short_run_says_nothing_of_its_progress_in_a_pipe(tmp_path, capfd):
    nndist.train(Line(), **QUIET, runs_dir=tmp_path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("columns", [80, 120])
def test_the_plan_comes_before_the_bar_in_a_terminal(tmp_path, columns):
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    flags = ["--no-figures", "--no-report", "--wandb", "off", "--threads", "1", "--runs-dir", str(tmp_path)]
    flags += ["--epochs", "30", "--run", "a", "--hold-out", "0.1"]
    command = [sys.executable, "-m", "nndist", str(ROOT / "recipes/two_clusters.py"), *flags]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    running = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=environment)
    os.close(slave)
    said = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the process has ended
            break
        said += part
    os.close(master)
    assert running.wait() == 0
    text = said.decode().replace("\r\n", "\n")
    plan, _, rest = text.partition("\r")
    assert plan.startswith("recipe   two_clusters:")
    names = [line.split(" ")[0] for line in plan.splitlines() if not line.startswith(" " * 9)]
    assert names == ["recipe", "data", "network", "device", "batch", "steps", "run", "note"]
    assert all(len(line) <= columns or str(tmp_path) in line for line in plan.splitlines())
    assert f"run      {tmp_path}" in plan  # a path can be copied
    lines = [line for line in text.split("\n") if line.startswith(("epoch", "test", "result", "(", " "))]
    assert lines and all(len(line.rpartition("\r")[2]) <= columns for line in lines)
    bars = [part for part in rest.split("\r") if "%" in part and "\n" not in part]
    title = "two_clusters [generated points]" if columns > 100 else "two_clusters"
    strange = [part for part in bars if not part.startswith((f"{title}:", f"{title},", f"{title} 0%"))]
    assert not strange, strange
    assert all("ex/s=" in part and "ex/s= " not in part for part in bars if "loss=" in part)
    assert bars and all(len(part) <= columns for part in bars)
    assert any("30/30" in part for part in bars) and any(", evaluating" in part for part in bars)
    assert all("\n" not in part.partition(", evaluating")[0] for part in bars)


def test_a_bar_and_a_pipe_to_tee_do_not_meet_on_a_line(tmp_path):
    master, slave = os.openpty()  # stderr is a terminal, stdout a pipe
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    flags = ["--no-figures", "--no-report", "--wandb", "off", "--threads", "1", "--runs-dir", str(tmp_path)]
    command = [sys.executable, "-m", "nndist", str(ROOT / "recipes/two_clusters.py"), *flags, "--run", "a"]
    drawn = b""

    def read():
        nonlocal drawn
        with contextlib.suppress(OSError):  # the process has ended
            while part := os.read(master, 65536):
                drawn += part

    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, cwd=ROOT)
    os.close(slave)
    reader = threading.Thread(target=read)
    reader.start()
    said = running.communicate(timeout=120)[0].decode()
    reader.join(timeout=20)
    os.close(master)
    assert running.returncode == 0 and "\nresult   test/loss" in said and "\r" not in said
    assert b"%|" not in drawn and drawn.count(b"\r") == drawn.count(b"\r\n"), drawn

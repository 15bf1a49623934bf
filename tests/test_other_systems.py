"""What other systems do with files, processes and streams: refused moves, other encodings, other signals."""

import errno
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import python, succeeded
from toys import Line

import nndist
from nndist import errors, figures, files, machine
from nndist.config import RunConfig
from nndist.data import sets
from nndist.data.shards import _read_at
from nndist.distributed import runtime
from nndist.errors import UserError
from nndist.figures import Table
from nndist.runs import checkpoint_writer
from nndist.runs.records import rebuild
from nndist.stores import Store, file_url
from nndist.training.stopping import notify

QUIET = {"progress": False, "figures": False, "threads": 1, "wandb": "off"}


@pytest.fixture
def windows(monkeypatch):
    """Files that are open elsewhere are waited for, half a second."""
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files, "BUSY_SECONDS", 0.5)


def refused(monkeypatch, name, times, of=""):
    """Has os refuse a call so often, as Windows does where a file is open; the list holds what was refused.

    of: what the name of the file holds.
    """
    real, calls = getattr(os, name), []

    def call(*arguments, **named):
        if len(calls) < times and of in str(arguments[0]):
            calls.append(arguments)
            raise PermissionError(errno.EACCES, "is being used by another process", str(arguments[0]))
        return real(*arguments, **named)

    monkeypatch.setattr(os, name, call)
    return calls


def test_what_is_open_elsewhere_is_replaced_a_little_later(tmp_path, monkeypatch, windows):
    path = tmp_path / "run.json"
    files.write_json(path, {"step": 1})
    calls = refused(monkeypatch, "replace", 3)
    files.write_json(path, {"step": 2})
    assert files.read_json(path) == {"step": 2} and len(calls) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_what_is_being_replaced_is_read_a_little_later(tmp_path, monkeypatch, windows):
    files.write_json(tmp_path / "run.json", {"step": 1})
    calls = refused(monkeypatch, "open", 3)
    assert files.read_json(tmp_path / "run.json") == {"step": 1} and len(calls) == 3


def test_what_stays_refused_is_refused_in_the_end_and_a_folder_at_once(tmp_path, monkeypatch, windows):
    refused(monkeypatch, "replace", 10**6)
    with pytest.raises(PermissionError):
        files.write_json(tmp_path / "run.json", {})
    assert not list(tmp_path.iterdir())
    refused(monkeypatch, "open", 10**6)
    began = time.monotonic()
    with pytest.raises(PermissionError):
        files.read_bytes(tmp_path)
    assert time.monotonic() - began < 0.4


def test_elsewhere_nothing_is_tried_again(tmp_path, monkeypatch):
    calls = refused(monkeypatch, "replace", 1)
    with pytest.raises(PermissionError):
        files.write_json(tmp_path / "run.json", {})
    assert len(calls) == 1


def test_a_checkpoint_is_published_though_a_scanner_looks_at_its_files(tmp_path, monkeypatch, windows):
    calls = refused(monkeypatch, "replace", 2, of="step-00000007.part")
    result = nndist.train(Line(), runs_dir=tmp_path, max_steps=7, **QUIET)
    assert (result.folder / "checkpoints/step-00000007/manifest.json").is_file() and len(calls) == 2


def test_a_checkpoint_that_is_open_stays_whole_and_is_removed_later(tmp_path, monkeypatch):
    real = os.rename

    def rename(source, target, **named):
        if Path(source).name == "step-00000002" and not (tmp_path / "closed").exists():
            raise PermissionError(errno.EACCES, "is being used by another process", str(source))
        return real(source, target, **named)

    monkeypatch.setattr(os, "rename", rename)
    seen = []
    remove = files.remove_folder

    def watched(path):
        gone = remove(path)
        seen.append((path.name, gone, (path / "manifest.json").exists()))
        if len(seen) == 3:
            (tmp_path / "closed").touch()
        return gone

    monkeypatch.setattr("nndist.training.saving.remove_folder", watched)
    result = nndist.train(Line(), runs_dir=tmp_path, save_every="2 steps", keep=1, max_steps=12, **QUIET)
    assert seen[0] == ("step-00000002", False, True), "all of its files are there"
    assert ("step-00000002", True, False) in seen
    assert [path.name for path in (result.folder / "checkpoints").iterdir()] == ["step-00000012"]


def test_a_description_or_page_that_can_not_be_written_now_is_written_later(tmp_path, monkeypatch, capsys):
    """And the training goes on, to the same weights; each is said once."""
    write = files.write_whole
    busy = {"run.json": 2, "report.html": 2}

    def written(path, data):
        # the first run.json comes before the first step
        if busy.get(path.name, 0) and (path.parent / "metrics.jsonl").stat().st_size:
            busy[path.name] -= 1
            raise PermissionError(errno.EACCES, "is being used by another process", str(path))
        write(path, data)

    monkeypatch.setattr(files, "write_whole", written)
    monkeypatch.setattr("time.perf_counter", iter(range(10**9)).__next__)  # each evaluation may write
    result = nndist.train(Line(), runs_dir=tmp_path, **QUIET)
    said = capsys.readouterr().out
    assert files.read_json(result.folder / "run.json")["status"] == "finished" and busy["run.json"] == 0
    assert said.count("run.json can't be written (is being used by another process)") == 1
    assert said.count("report.html can't be written") == 1 and (result.folder / "report.html").is_file()


def test_a_table_that_is_open_in_another_program_costs_one_line(tmp_path, monkeypatch):
    lines = []
    refused(monkeypatch, "replace", 1)
    tables = {"a": Table(("x",), [(1,)]), "b": Table(("x",), [(2,)])}
    assert figures.save(tables, tmp_path / "figures", lines.append) == [tmp_path / "figures/b.csv"]
    assert len(lines) == 1 and "a.csv: can't be written (is being used by another process)" in lines[0]


def test_records_are_rebuilt_a_second_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for text in (b"first\n", b"second\n"):
        path.write_bytes(text)
        rebuild(path, 100)
        assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == text


def test_a_shard_is_read_without_pread(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "pread")
    (tmp_path / "file").write_bytes(b"0123456789")
    with (tmp_path / "file").open("rb") as file:
        assert [_read_at(file, 3, place) for place in (7, 0, 4)] == [b"789", b"012", b"456"]


def test_a_store_of_this_machine_may_have_spaces_in_its_name(tmp_path):
    folder = tmp_path / "my runs, Müller"
    folder.mkdir()
    Store(file_url(folder)).write("a", b"1")
    assert (folder / "a").read_bytes() == b"1"


# Processes.


def test_a_program_that_is_started_has_no_share_in_a_kept_standard_input():
    code = "import subprocess, sys; from nndist import machine; machine.keep_stdin(); "
    code += "child = [sys.executable, '-c', 'import sys; print(repr(sys.stdin.read()))']; "
    code += "print(subprocess.run(child, capture_output=True, text=True).stdout, sys.stdin.read())"
    done = subprocess.run([sys.executable, "-c", code], input="é", capture_output=True, encoding="utf-8")
    assert done.stdout.split() == ["''", "é"], done.stderr


@pytest.mark.parametrize("has_console", [True, False])
def test_a_training_is_asked_to_stop_and_not_ended(monkeypatch, has_console):
    asked = []

    class Process:
        def send_signal(self, number):
            if not has_console:
                raise OSError
            asked.append(number)

        def terminate(self):
            asked.append("terminate")

    monkeypatch.setattr(machine.signal, "CTRL_BREAK_EVENT", 1, raising=False)
    machine.ask_to_stop(Process())
    assert asked == [1 if has_console else "terminate"]


def test_the_python_of_an_environment_is_no_launcher(monkeypatch):
    """On Windows it starts the real one, with the same arguments."""

    class Process:
        def __init__(self, pid, words):
            self.pid, self.words = pid, words

        def cmdline(self):
            return self.words

        def parents(self):
            return [Process(2, ["venv/python", "train.py"]), Process(3, ["python", "-m", "accelerate"])]

    monkeypatch.setattr(machine.psutil, "Process", lambda: Process(1, ["python", "train.py"]))
    monkeypatch.setattr(machine, "environment_of", lambda pid: {"pid": str(pid)})
    assert machine.parents_environment() == {"pid": "2"}
    monkeypatch.setattr(machine, "WINDOWS", True)
    assert machine.parents_environment() == {"pid": "3"}


def test_a_command_that_leaves_a_program_behind_is_not_waited_for():
    lines = []
    began = time.monotonic()
    notify("sleep 20 & echo gone wrong >&2; exit 3", lines.append)
    assert time.monotonic() - began < 10 and lines == ["--notify: the command failed (code 3: gone wrong)"]


@pytest.mark.parametrize("system, workers", [("linux", 2), ("darwin", 0)])
def test_loaders_fork_on_linux_alone(monkeypatch, system, workers):
    started = []

    class Loader:
        def __init__(self, *arguments, num_workers, **named):
            started.append(num_workers)

        def __iter__(self):
            return iter(())

    monkeypatch.setattr(sets.sys, "platform", system)
    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    streamed = sets.Streamed([1, 2, 3], num_workers=2)
    list(streamed.batches([torch.tensor([0, 1])]))
    assert started == [workers]


# Apple's GPUs.


def test_several_processes_of_a_mac_are_on_its_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.chosen_device("auto") == "mps"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert runtime.chosen_device("auto") == "cpu" and runtime.chosen_device("mps") == "mps"


def test_a_mac_without_memory_is_out_of_memory():
    said = "MPS backend out of memory (MPS allocated: 5.1 GB, max allowed: 6.8 GB). Tried to allocate 4.0 GB."
    assert errors.out_of_memory(RuntimeError(said))


def test_what_is_written_on_a_mac_reaches_the_disk(tmp_path, monkeypatch):
    import fcntl

    asked = []
    monkeypatch.setattr(files.sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda descriptor, what: asked.append(what))
    checkpoint_writer.write_file(tmp_path / "a", b"1")
    assert asked == [51]


# Texts and names.


def test_streams_of_another_encoding_escape_what_they_lack(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    machine.speak_utf8()
    print("é年", flush=True)
    assert out.buffer.getvalue() == b"\xe9\\u5e74\n"
    monkeypatch.setattr(machine, "WINDOWS", True)
    machine.speak_utf8()
    print("é年", flush=True)
    assert out.buffer.getvalue().endswith("é年\n".encode())


def test_the_command_speaks_to_a_pipe_of_another_encoding():
    words = ["-m", "nndist", "predict", "nowhere-2024年3月5日"]
    done = python(*words, env={"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere-2024\\u5e743\\u67085\\u65e5")
    assert "Traceback" not in succeeded(python("-m", "nndist", "recipes", env={"PYTHONIOENCODING": "ascii"})).stderr


@pytest.mark.parametrize("name", ["a/b", "a\\b", "C:", ".hidden", "first.", "first ", ""])
def test_a_name_that_is_no_folder_everywhere_is_one_line(name):
    with pytest.raises(UserError, match=r"^--run .*: give a plain name"):
        RunConfig(run=name).validate()


@pytest.mark.parametrize("name", ["a", "lr=0.1-seed0", "2026-12-01_01-54-12", "v1.2", "Übung 7", "a..b"])
def test_a_plain_name_is_the_runs_folder(name, tmp_path):
    result = nndist.train(Line(), runs_dir=tmp_path, run=name, max_steps=1, report=False, **QUIET)
    assert result.folder.name == name and (result.folder / "run.json").is_file()

"""Starts real processes: the command as a user types it, and several gloo processes through accelerate's launcher."""

import itertools
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python(*arguments, env=None, cwd=None, timeout=300) -> subprocess.CompletedProcess:
    """Runs this Python with the arguments and gives what it printed and its exit code."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def accelerate(world_size: int, *arguments, env=None, cwd=None, timeout=300) -> subprocess.CompletedProcess:
    """`accelerate launch` with so many CPU processes; the arguments are the script and its own."""
    config = ROOT / "launch/accelerate" / ("cpu.yaml" if world_size == 1 else "cpu_ddp.yaml")
    return python(
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        config,
        "--num_processes",
        world_size,
        *arguments,
        env=env,
        cwd=cwd,
        timeout=timeout,
    )


def succeeded(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """The same, after asserting exit code 0 with the output in the message."""
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done


# Processes that are forked from one which has imported everything: a launch takes a fraction of a second.

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["preloaded"])


@cache
def start_server() -> None:
    """Starts the process that others are forked from, which finds `preloaded`."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


class Processes:
    """A training by the command `launch/train.py`, one process for each rank, without a launcher above them.

    With `call`, a function of a module, that is called with the arguments instead; on the CPU.
    """

    def __init__(self, world_size: int, arguments, *, env=None, folder: Path, patch=None, call=None):
        port = free_port()
        self.folder = folder
        self.outputs = [
            folder / f"output-{number}-{rank}.txt" for number in [next(_numbers)] for rank in range(world_size)
        ]
        self.processes = []
        start_server()
        for rank in range(world_size):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            given = {} if world_size == 1 else {name: str(value) for name, value in names.items()}
            given |= {"ACCELERATE_USE_CPU": "true"} if call else {}
            given |= env or {}
            target = (given, [str(a) for a in arguments], str(self.outputs[rank]), patch, rank, call)
            process = _context.Process(target=_train, args=target)
            process.start()
            self.processes.append(process)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.processes[rank].pid, number)

    def wait(self, timeout: float = 120) -> list[int]:
        """The exit codes; whoever outlives a killed process for long is killed too, as a launcher would."""
        deadline = time.monotonic() + timeout
        while any(p.is_alive() for p in self.processes):
            if any(p.exitcode not in (None, 0) for p in self.processes):
                for p in self.processes:
                    p.join(0.5)
                    if p.is_alive():
                        p.kill()
            if time.monotonic() >= deadline:
                for p in self.processes:
                    p.kill()  # else it would take a core from all later tests
                raise AssertionError(f"still running after {timeout} s\n{self.said()}")
            time.sleep(0.01)
        return [p.exitcode for p in self.processes]

    def said(self) -> str:
        return "\n".join(path.read_text() for path in self.outputs if path.exists())


class Forked:
    """A function of an importable module in a process of its own, which has torch from the start."""

    def __init__(self, function, *arguments, output: Path):
        self.output = output
        start_server()
        self.process = _context.Process(target=_call, args=(function, arguments, str(output)))
        self.process.start()

    def wait(self, timeout: float = 120) -> tuple[int | None, str]:
        """The exit code, and what was printed; None where it still runs."""
        self.process.join(timeout)
        return self.process.exitcode, self.output.read_text()


def _call(function, arguments, output):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    function(*arguments)


def command(script, *arguments, env=None, alone=False, cwd=None, timeout=300) -> subprocess.CompletedProcess:
    """What `python` gives for one of launch/'s scripts, in a process that is forked and so need import nothing.

    alone: `env` is its whole environment.
    """
    folder = Path(tempfile.mkdtemp(prefix="nndist-command-"))
    start_server()
    given = {**({} if alone else os.environ), **(env or {})}
    target = (str(script), [*map(str, arguments)], given, str(cwd or Path.cwd()), str(folder))
    process = _context.Process(target=_run_script, args=target)
    try:
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([script, *arguments], timeout)
        printed = [(folder / name).read_text() for name in ("stdout", "stderr")]
    finally:
        shutil.rmtree(folder)
    return subprocess.CompletedProcess([script, *arguments], process.exitcode, *printed)


def _run_script(script, arguments, env, cwd, folder):
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


_numbers = itertools.count()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def _train(env, arguments, output, patch, rank, call):
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from nndist.cli.train import leave, train_command

    os.fsync = lambda file: None  # it is processes that die here, no machine loses its power
    if patch is not None:
        patch(rank)
    try:
        if call is None:
            train_command(arguments)
        call(*arguments)
        leave()
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(stop.code or 0))


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [child for number in found for child in (int(number), *children_of(int(number)))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

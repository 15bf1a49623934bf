"""Starts real processes: the command as a user types it, and several gloo processes through accelerate's launcher."""

import os
import subprocess
import sys
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

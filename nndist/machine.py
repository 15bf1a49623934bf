"""The operating system, on Linux, macOS and Windows: locks, memory, cores, other processes.

A run's lock is implemented here because libraries lock with flock(2), which forked loader processes inherit: a killed
run would stay locked until the last of them has ended. (Downloads are locked by filelock, which also separates
threads.) Everything else comes from psutil and, on Linux only, from /proc.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import psutil

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

WINDOWS = os.name == "nt"
SAVE_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name))
"""The signals that always ask a run to save and stop; SIGBREAK is Ctrl-Break of Windows."""


# Locks.


def lock(file: BinaryIO, *, wait: bool = True) -> None:
    """Lock an open file for this process, until the file is closed or the process ends.

    Raises OSError if it is locked and `wait` is false. The lock belongs to the process: it does not exclude threads.
    """
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    _lock_on_windows(file, wait)


def _lock_on_windows(file: BinaryIO, wait: bool) -> None:
    import msvcrt

    windows: Any = msvcrt
    place = file.tell()
    file.seek(1 << 30)  # a byte beyond the end: others can't read locked bytes
    try:
        while True:
            try:
                windows.locking(file.fileno(), windows.LK_NBLCK, 1)
                return
            except OSError:
                if not wait:
                    raise
                time.sleep(0.1)
    finally:
        file.seek(place)


# Cores and memory.


def cores() -> int:
    """CPU cores that this process may use."""
    try:
        return len(psutil.Process().cpu_affinity())
    except (AttributeError, psutil.Error):  # macOS has no affinity
        return os.cpu_count() or 1


def memory() -> int:
    """Bytes of the machine's memory."""
    return int(psutil.virtual_memory().total)


def free_memory() -> int:
    """Bytes still available to processes without swapping."""
    return int(psutil.virtual_memory().available)


def used_memory() -> int:
    """Bytes of resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def reset_peak_memory() -> None:
    """Make `peak_memory` count from now on, on Linux; elsewhere it counts from the start of the process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak bytes of resident memory of this process."""
    with contextlib.suppress(OSError, IndexError):
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    found = psutil.Process().memory_info()
    if hasattr(found, "peak_wset"):  # Windows
        return int(found.peak_wset)
    try:
        import resource
    except ImportError:
        return int(found.rss)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def keep_freed_memory() -> None:
    """Makes glibc, if used, keep large freed blocks instead of returning each to the system.

    Otherwise every large activation is faulted in again page by page: measured, an evaluation takes several times as
    long and a step of a CNN a fifth more.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Makes glibc, if used, return large freed blocks at once: the opposite of `keep_freed_memory`.

    Blocks that are gathered and dropped leave gaps in the heap that the next ones, of different sizes, do not fill.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 1 << 20)
        libc.mallopt(m_trim_threshold, 1 << 20)


def give_back_memory() -> None:
    """Makes glibc, if used, return freed memory to the system once."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


# CPU time.


def children_seconds() -> float:
    """CPU seconds of ended child processes; 0 on Windows, which does not keep them."""
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)


def busy_seconds() -> float:
    """CPU seconds for which the machine's cores have been busy, summed."""
    times = psutil.cpu_times()
    not_work = ("idle", "iowait", "guest", "guest_nice")  # Linux counts guests among user and nice, too
    return float(sum(times) - sum(getattr(times, name, 0.0) for name in not_work))


# Load.


class Usage:
    """How busy this machine and its devices are, for the records; sampled at most once every SECONDS."""

    SECONDS = 10.0

    def __init__(self) -> None:
        self._then = time.monotonic()
        self._before = self._counters()
        psutil.cpu_percent()

    def figures(self) -> dict[str, float]:
        """load in %, memory in GiB, traffic in MiB per second since the last sample; {} if it is not due."""
        now = time.monotonic()
        if now - self._then < self.SECONDS:
            return {}
        seconds, self._then = now - self._then, now
        counters = self._counters()
        before, self._before = self._before, counters
        found = {
            "load/cpu": psutil.cpu_percent(),
            "memory/process": round(used_memory() / 2**30, 3),
            "memory/machine": round((memory() - free_memory()) / 2**30, 3),
        }
        for name in before.keys() & counters.keys():
            found[f"traffic/{name}"] = round((counters[name] - before[name]) / seconds / 2**20, 3)
        return found | self._of_gpu()

    @staticmethod
    def _counters() -> dict[str, int]:
        """Bytes read, written, sent and received by the machine so far; without those that it hides."""
        found: dict[str, int] = {}
        with contextlib.suppress(psutil.Error, OSError, AttributeError, RuntimeError):
            disk: Any = psutil.disk_io_counters()
            found |= {"disk_read": disk.read_bytes, "disk_written": disk.write_bytes}
        with contextlib.suppress(psutil.Error, OSError, AttributeError, RuntimeError):
            network: Any = psutil.net_io_counters()
            found |= {"network": network.bytes_sent + network.bytes_recv}
        return found

    @staticmethod
    def _of_gpu() -> dict[str, float]:
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return {}
        found = {"memory/gpu": round(torch.cuda.max_memory_reserved() / 2**30, 3)}
        with contextlib.suppress(Exception):  # pynvml is missing, or the driver does not tell
            found["load/gpu"] = float(torch.cuda.utilization())
        return found


# Standard streams.


def keep_stdin() -> None:
    """Keeps standard input for this process's `sys.stdin`: a program that it starts gets an empty one.

    On Windows a program hangs at its start if its input is a pipe that another thread is reading.
    """
    own, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdin = os.fdopen(own, encoding="utf-8")


def speak_utf8() -> None:
    """Makes standard streams that are no terminals UTF-8 on Windows; elsewhere they are what the locale says.

    On any system what is written has characters that its encoding lacks escaped.
    """
    encoding = "utf-8" if WINDOWS else None
    for stream, errors in ((sys.stdin, None), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and not stream.closed and not stream.isatty() and (encoding or errors):
            stream.reconfigure(encoding=encoding, errors=errors)


# Processes.


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty if unknown."""
    try:
        return dict(psutil.Process(pid).environ())
    except (psutil.Error, OSError):
        return {}


def parents_environment() -> dict[str, str]:
    """The environment of the process that started this one; empty if unknown.

    On Windows the Python of a virtual environment only starts the real one, with the same arguments: its parent counts.
    """
    with contextlib.suppress(psutil.Error, OSError, ValueError):
        this = psutil.Process()
        parent, *others = this.parents()
        if WINDOWS and others and parent.cmdline()[1:] == this.cmdline()[1:]:
            parent = others[0]
        return environment_of(parent.pid)
    return {}


def descendants(pid: int) -> list[int]:
    """The pids of a process's children, and of theirs."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def kill(pid: int) -> None:
    """Kill a process, as `kill -9` does; one that has already ended is not an error."""
    with contextlib.suppress(psutil.Error):
        psutil.Process(pid).kill()


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants."""
    for number in [pid, *descendants(pid)]:
        kill(number)


def end_with_parent(number: int = getattr(signal, "SIGKILL", signal.SIGTERM)) -> None:
    """The system sends this process a signal when its parent dies, on Linux; elsewhere it does nothing."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(pr_set_pdeathsig, int(number))


def ask_to_stop(process: subprocess.Popen[Any]) -> None:
    """Asks a training to save and stop, as SIGTERM does; it was started with `own_group`."""
    ctrl_break = getattr(signal, "CTRL_BREAK_EVENT", None)  # of Windows, where `terminate` is a kill
    if ctrl_break is not None:
        with contextlib.suppress(OSError):  # it has no console
            process.send_signal(ctrl_break)
            return
    process.terminate()


def command_line(words: Sequence[str]) -> str:
    """A command as it is typed in this system's shell."""
    return subprocess.list2cmdline(words) if WINDOWS else shlex.join(words)


def own_group() -> dict[str, Any]:
    """Arguments of subprocess.Popen for a process that Ctrl-C in the terminal does not reach."""
    if WINDOWS:
        return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    return {"start_new_session": True}


def lower_priority() -> None:
    """Lower this process's priority."""
    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process()
        process.nice(psutil.BELOW_NORMAL_PRIORITY_CLASS if WINDOWS else 10)


def allow_open_files(wanted: int = 65_536) -> None:
    """Raises this process's limit of open files as far as it may: 1,024 are usual, and fewer than a batch may need."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has none
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

"""Python as it is on Windows, as far as Linux can play it: what only POSIX has is hidden from every process.

Put this folder on PYTHONPATH and set NO_POSIX=1. Modules can't be imported, functions, flags and signals are gone,
processes are spawned and not forked, /proc and /dev/shm are not there; see also windows_files. What it can't show:
paths with drives, a different console, file names without case.
"""

import builtins
import importlib.abc
import io
import multiprocessing
import os
import signal
import sys

MODULES = ("fcntl", "resource", "termios", "pwd", "grp", "pty", "syslog", "readline", "_posixshmem")
FUNCTIONS = (
    *("fork", "forkpty", "killpg", "setsid", "setpgid", "getpgid", "nice", "uname"),
    *("sched_getaffinity", "sched_setaffinity", "sysconf", "posix_fallocate", "mkfifo", "getloadavg", "wait", "pread"),
    *("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY", "register_at_fork"),
)
SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGQUIT", "SIGCHLD")
HIDDEN = ("/proc", "/dev/shm")


class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def hide() -> None:
    # what Python and torch themselves need of POSIX to run at all here is loaded before, and then out of reach
    import shutil  # noqa: F401
    import subprocess  # noqa: F401
    import tempfile  # noqa: F401

    import psutil
    import torch
    import windows_files
    import windows_locks

    import nndist.files
    import nndist.machine

    psutil.BELOW_NORMAL_PRIORITY_CLASS = 10
    nndist.files.WINDOWS = nndist.machine.WINDOWS = True
    windows_files.play()
    sys.modules["msvcrt"] = windows_locks
    sys.meta_path.insert(0, Hidden())
    for name in MODULES:
        sys.modules.pop(name, None)
    for name in FUNCTIONS:
        if hasattr(os, name):
            delattr(os, name)
    for name in SIGNALS:
        if hasattr(signal, name):
            delattr(signal, name)
    methods = multiprocessing.get_all_start_methods
    multiprocessing.get_all_start_methods = lambda: [method for method in methods() if "fork" not in method]
    torch.multiprocessing.get_all_start_methods = multiprocessing.get_all_start_methods
    multiprocessing.set_start_method("spawn", force=True)
    os.environ["USE_LIBUV"] = "0"

    def guarded(function):
        def call(path, *arguments, **named):
            # psutil asks Windows in another way
            asks = sys._getframe(1).f_globals.get("__name__", "")
            if isinstance(path, str | os.PathLike) and str(path).startswith(HIDDEN) and not asks.startswith("psutil"):
                raise FileNotFoundError(2, "No such file or directory", str(path))
            return function(path, *arguments, **named)

        return call

    builtins.open = io.open = guarded(builtins.open)
    os.open = guarded(os.open)


if os.environ.get("NO_POSIX") == "1":
    hide()

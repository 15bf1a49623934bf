"""Files as they are on Windows: an open one can't be renamed, replaced or removed, and text is not UTF-8.

Whether a file is open is asked of all processes that play Windows, by /proc, before `sitecustomize` hides it.
"""

import builtins
import errno
import fcntl
import io
import os
import shutil
import stat
import subprocess
import sys

MARK = b"NO_POSIX=1"
_listdir, _readlink, _open, _fsync = os.listdir, os.readlink, os.open, os.fsync
_rename, _replace, _unlink, _open_text = os.rename, os.replace, os.unlink, io.open
_plays: dict[str, bool] = {}


def _plays_windows(pid: str) -> bool:
    if pid not in _plays:
        try:
            descriptor = _open(f"/proc/{pid}/environ", os.O_RDONLY)
            with os.fdopen(descriptor, "rb") as file:
                _plays[pid] = MARK in file.read()
        except OSError:
            return False
    return _plays[pid]


def check_closed(path) -> None:
    """Raises PermissionError if a process has the file, or one in the folder, open."""
    real = os.path.realpath(os.fspath(path))
    if real.startswith(("/proc", "/dev")) or not os.path.lexists(real):
        return
    for pid in filter(str.isdecimal, _listdir("/proc")):
        if not _plays_windows(pid):
            continue
        try:
            for descriptor in _listdir(f"/proc/{pid}/fd"):
                place = _readlink(f"/proc/{pid}/fd/{descriptor}")
                if place == real or place.startswith(real + "/"):
                    raise PermissionError(errno.EACCES, "is being used by another process", str(path))
        except (FileNotFoundError, ProcessLookupError):
            continue


def rename(source, target, **named):
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "a file of that name exists", str(source))
    check_closed(source)
    return _rename(source, target, **named)


def replace(source, target, **named):
    check_closed(source)
    check_closed(target)
    return _replace(source, target, **named)


def unlink(path, *, dir_fd=None):
    check_closed(path if dir_fd is None else f"{_readlink(f'/proc/self/fd/{dir_fd}')}/{path}")
    return _unlink(path, dir_fd=dir_fd)


def fsync(file):
    descriptor = file if isinstance(file, int) else file.fileno()
    if stat.S_ISDIR(os.fstat(descriptor).st_mode) or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == 0:
        raise OSError(errno.EBADF, "a folder, or a file that is only read, can't be flushed")
    return _fsync(descriptor)


def open_text(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *more, **named):
    """`open`, by which text of nndist's own modules is cp1252 with CRLF unless they say otherwise."""
    caller = sys._getframe(1).f_globals.get("__name__", "")
    if "b" not in mode and caller.partition(".")[0] in ("nndist", "pathlib", "recipe"):
        encoding = "cp1252" if encoding in (None, "locale") else encoding
        newline = "\r\n" if newline is None and set("wax+") & set(mode) else newline
    return _open_text(file, mode, buffering, encoding, errors, newline, *more, **named)


def play() -> None:
    shutil._use_fd_functions = False  # of rmtree
    os.rename, os.replace, os.fsync, os.unlink, os.remove = rename, replace, fsync, unlink, unlink
    builtins.open = io.open = open_text
    subprocess.Popen.terminate = subprocess.Popen.kill
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is not None and not stream.isatty():
            stream.reconfigure(encoding="cp1252", errors="strict")

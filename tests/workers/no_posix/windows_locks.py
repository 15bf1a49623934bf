"""The locks of Windows, played by those of POSIX: a byte at the file's position, of the process."""

import os

LK_NBLCK = 2


def locking(descriptor: int, mode: int, size: int) -> None:
    assert mode == LK_NBLCK
    os.lockf(descriptor, os.F_TLOCK, size)

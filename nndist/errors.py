"""The errors that are the user's to mend, and what an error of others means."""

from __future__ import annotations

import contextlib
import errno
import traceback
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """Bad input: one line that names the flag or file, the value, and the remedy.

    Commands print it once and exit with code 2, without a traceback unless `--traceback` is given.
    """


class Preempted(Exception):
    """A signal asked the run to stop; it has been saved and the same command continues it.

    signal: the signal's number. Commands exit with 128 + that.
    """

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.signal = signal


class TrainingError(Exception):
    """Training can't go on, such as a loss that is not finite: one line with the step, the cause and the remedy.

    Commands print it once and exit with code 1.
    """


class ExampleError(UserError):
    """A dataset, or what decodes or collates its examples, raised an error: its class, example, message and place."""


class LoaderTraceback(Exception):
    """The traceback of an error in a loader process, as the text that it says."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def place_of(error: BaseException) -> str:
    """Such as " (my_recipe.py, line 12, in loss)": where an error came from in the user's own code, or else in any."""
    frames = traceback.extract_tb(error.__traceback__)
    library = str(Path(__file__).parent)
    own = [f for f in frames if not f.filename.startswith(library) and "site-packages" not in f.filename]
    frame = next((f for f in reversed(own) if f.name != "<module>"), frames[-1] if frames else None)
    return f" ({frame.filename}, line {frame.lineno}, in {frame.name})" if frame else ""


def lost_a_process(error: BaseException) -> bool:
    """Whether an error says that another process went away or did not answer in time."""
    words = ("Connection closed by peer", "Connection reset", "Timed out", "timed out", "Broken pipe", "NCCL", "gloo")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


class ShortOfMemory(RuntimeError):
    """A forward or backward pass did not find the memory for it; its gradients are dropped.

    final: whether the step can't be taken again, because a network was updated in it before, or because the other
    processes are still waiting in their passes. rank: of the process that is short.
    """

    def __init__(self, message: str, final: bool, rank: int):
        super().__init__(message)
        self.final, self.rank = final, rank


def of_the_disk(error: BaseException) -> str:
    """What to say of an error of a disk that fails, is full, or can't be written; else ""."""
    kinds = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ENODEV)
    if not isinstance(error, OSError) or error.errno not in kinds:
        return ""
    remedy = "see to the disk (df -h, df -i for its number of files) and start the same command again"
    return f"{error.filename or 'a file'}: {error.strerror}; {remedy}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, of a GPU or of the system."""
    if isinstance(error, MemoryError | ShortOfMemory) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    words = (
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",  # Windows, macOS
        "Cannot allocate memory",
        "std::bad_alloc",
        "CUDA out of memory",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextlib.contextmanager
def remedy_for_memory(rank: int, where: str, remedy: str) -> Iterator[None]:
    """Within it a lack of memory raises TrainingError: a line with the process's rank, where, and the flag to give."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        line = f"process {rank}: out of memory in {where} ({first_line(error)}); {remedy} to the same command"
        raise TrainingError(line) from error


def first_line(error: BaseException) -> str:
    """What an error says, in a line of moderate length."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    return said[0] if len(said[0]) <= 200 else f"{said[0][:200]}..."


def timed_out(error: BaseException) -> bool:
    """Whether another process did not answer in time, so that it will not say why either."""
    return lost_a_process(error) and any(word in str(error) for word in ("Timed out", "timed out", "timeout"))

"""The errors that the user can fix, and how to recognise those of libraries."""

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
    """A signal asked the run to stop; it is saved and the same command resumes it.

    signal: its number. Commands exit with 128 + that.
    """

    def __init__(self, signal: int, message: str):
        super().__init__(message)
        self.signal = signal


class TrainingError(Exception):
    """Training can't continue, such as for a loss that is not finite: one line with the step, cause and remedy.

    Commands print it once and exit with code 1.
    """


class NotFiniteLoss(TrainingError):
    """A loss is not finite. step: the first such, counted from 1."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class ExampleError(UserError):
    """A dataset, or what decodes or collates its examples, raised an error: its class, example, message and place."""


class LoaderTraceback(Exception):
    """The traceback of an error in a worker process, as text."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def place_of(error: BaseException) -> str:
    """Where an error came from: the user's code if possible, else this library's, rather than torch's.

    Such as " (my_recipe.py, line 12, in loss)".
    """
    frames = traceback.extract_tb(error.__traceback__)
    library = str(Path(__file__).parent)
    own = [f for f in frames if not f.filename.startswith(library) and "site-packages" not in f.filename]
    ours = [f for f in frames if f.filename.startswith(library)]
    frame = next((f for f in reversed(own) if f.name != "<module>"), next(iter([*ours[-1:], *frames[-1:]]), None))
    return f" ({frame.filename}, line {frame.lineno}, in {frame.name})" if frame else ""


def lost_a_process(error: BaseException) -> bool:
    """Whether an error says that another process ended or did not answer in time."""
    words = ("Connection closed by peer", "Connection reset", "Timed out", "timed out", "Broken pipe", "NCCL", "gloo")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def lost_a_worker(error: BaseException) -> str:
    """The line for an error of torch's DataLoader that says that a worker process ended; "" for any other error."""
    if not isinstance(error, RuntimeError) or "DataLoader worker (pid" not in str(error):
        return ""
    said = first_line(error.__cause__ or error).rstrip(". ")  # of the two the first names the signal
    if "Segmentation fault" in said:
        return f"a worker process crashed in a library that reads examples ({said}); --num-workers 0 shows where"
    remedy = "most likely for lack of memory; give a smaller --num-workers or smaller batches"
    return f"a worker process that reads examples was ended from outside ({said}), {remedy}"


class ShortOfMemory(RuntimeError):
    """A forward or backward pass ran out of memory; its gradients are dropped.

    final: whether the step can't be retried, because it has already updated a network, or because the other processes
    are still waiting in their passes. rank: of the process that ran out.
    """

    def __init__(self, message: str, final: bool, rank: int):
        super().__init__(message)
        self.final, self.rank = final, rank


def of_the_disk(error: BaseException) -> str:
    """The line for an error of a disk that fails, is full, or can't be written; "" for any other error."""
    kinds = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ENODEV)
    if not isinstance(error, OSError) or error.errno not in kinds:
        return ""
    remedy = "check the disk (df -h, df -i for its number of files) and start the same command again"
    return f"{error.filename or 'a file'}: {error.strerror}; {remedy}"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the system is out of memory."""
    if isinstance(error, MemoryError | ShortOfMemory) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    words = (
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",  # Windows, macOS
        "Cannot allocate memory",
        "std::bad_alloc",
        "CUDA out of memory",
        "MPS backend out of memory",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextlib.contextmanager
def remedy_for_memory(rank: int, where: str, remedy: str) -> Iterator[None]:
    """Context manager: a lack of memory raises TrainingError with the process's rank, where, and the flag to give."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        line = f"process {rank}: out of memory in {where} ({first_line(error)}); {remedy} with the same command"
        raise TrainingError(line) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, of moderate length."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    return said[0] if len(said[0]) <= 200 else f"{said[0][:200]}..."


def timed_out(error: BaseException) -> bool:
    """Whether another process did not answer in time, so it will not report the cause either."""
    return lost_a_process(error) and any(word in str(error) for word in ("Timed out", "timed out", "timeout"))

"""The training command: parses, trains, and turns every error into one line and an exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from .. import machine
from ..errors import (
    Preempted,
    ShortOfMemory,
    TrainingError,
    UserError,
    first_line,
    lost_a_process,
    lost_a_worker,
    of_the_disk,
    out_of_memory,
    place_of,
    timed_out,
)
from ..flags.parse import parse
from .table import COMMANDS


def train_command(arguments: list[str]) -> None:
    """`nndist train`: parses, trains, and exits with 0, 1 (training failed), 2 (bad input) or 128 + a signal."""
    rank = int(os.environ.get("RANK", 0))
    die_with_launcher()
    if not arguments or arguments[0] in ("-h", "--help", "--help-all"):  # of no recipe
        if rank == 0:
            print(COMMANDS["train"].text)
        if arguments:
            return
    try:
        recipe, config = parse(arguments, quiet=rank != 0)
        if config.find_lr:
            from ..experiments.lr_finder import find_lr

            find_lr(recipe, config)
        elif config.find_batch:
            from ..experiments.batch_finder import find_batch

            find_batch(recipe, config)
        else:
            from ..training.run import run

            run(recipe, config)
    except Preempted as stopped:
        if rank == 0:
            print(f"stopped  {str(stopped).removeprefix('stopped ')}", file=sys.stderr, flush=True)
        leave(128 + stopped.signal)
    except KeyboardInterrupt:
        fail("interrupted before the training began", rank, 130, title="stopped ")
    except Exception as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        if isinstance(error, UserError | TrainingError):
            fail(str(error), rank, 2 if isinstance(error, UserError) else 1)
        message = of_the_disk(error) or lost_a_worker(error) or where_from(error, rank)
        if lost_a_process(error):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if not timed_out(error):
                time.sleep(10.0)  # the lost process reports why, and the launcher then ends this one
            rank = int(os.environ.get("LOCAL_RANK", rank))  # machines can't ask each other: each reports it once
        fail(message, rank, 1)
    leave()


def die_with_launcher() -> None:
    """Asks the system to send this process SIGTERM when its launcher dies (Linux only).

    `accelerate launch` with one process does not pass SIGTERM on, and no launcher can pass on its own SIGKILL.
    """
    if any(name in os.environ for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "NNDIST_COMPARISON")):
        machine.end_with_parent(signal.SIGTERM)


def where_from(error: BaseException, rank: int) -> str:
    """One line for an unexpected error: the process, the error, and the line of the user's code that raised it."""
    place = place_of(error)
    lines = str(error).strip().splitlines()
    if out_of_memory(error):
        remedy = "use a smaller batch or network, or a device with more memory"
        if isinstance(error, ShortOfMemory):
            remedy = "a larger --accumulate uses smaller micro-batches"
        return f"process {rank}: out of memory ({first_line(error)}){place}; {remedy}; --traceback shows more"
    if lost_a_process(error):
        return f"process {rank}: lost another process: {lines[0]}; the same command resumes it"
    return f"process {rank}: {type(error).__name__}: {lines[0] if lines else ''}{place}; --traceback shows more"


def fail(message: str, rank: int, code: int, title: str = "error:") -> NoReturn:
    """Prints one line, once for all processes, and leaves."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from now on the launcher's SIGTERM is final
    if rank != 0:
        # All processes raise the same error and the first reports it; the launcher then ends the others. A process that
        # outlives this wait has a different error.
        time.sleep(5.0)
    print(f"{title} {message}", file=sys.stderr, flush=True)
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:  # torch's launcher ends its report with this file
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    leave(code)


def leave(code: int = 0) -> NoReturn:
    """Ends the process.

    With several processes by os._exit: gloo drops a work object while the interpreter finalises, which aborts about 1
    of 15 exits after everything is written (pytorch/pytorch, ProcessGroupGloo).
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        if code == 0:
            dist.barrier()  # the first process to leave closes the rendezvous' store
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

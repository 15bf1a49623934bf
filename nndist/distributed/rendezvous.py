"""How the processes of a run find each other, and agree on which attempt of a restarted launch this is."""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import UserError
from ..torch_internals import record_collectives


def join_processes(cpu: bool, timeout: timedelta) -> dist.Store | None:
    """Creates the process group that a launcher's environment describes, if any, unless it exists already.

    Returns a store that all its processes see; None if the group existed, or there is one process.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    store, rank, world_size = meet(timeout)
    if not cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    record_collectives()
    own = dist.PrefixStore(agreed_attempt(store, rank, world_size, timeout), store)
    dist.init_process_group(
        "gloo" if cpu else "nccl",
        store=own,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    return dist.PrefixStore("nndist", own)


MEETING_GRACE_SECONDS = 5.0


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The rendezvous store, rank and world size from a launcher's environment; raises UserError.

    A thread bounds the wait: torch's timeout is for the connection only, so a program at the port that never answers
    would be waited for without end (measured on torch 2.14).
    """
    place = f"MASTER_ADDR:MASTER_PORT {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    found: list[Any] = []

    if sys.platform == "win32":
        os.environ.setdefault("USE_LIBUV", "0")  # torch is built without libuv there, and asks for it all the same

    def ask() -> None:
        try:
            found.append(next(dist.rendezvous("env://", timeout=timeout)))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=ask, name="rendezvous", daemon=True)
    thread.start()
    thread.join(timeout.total_seconds() + MEETING_GRACE_SECONDS)
    if not found:
        raise UserError(
            f"{place}: no answer within {timeout.total_seconds():g} s (--timeout-seconds); another program may use "
            "the port: give a different one, the same to all processes"
        )
    if isinstance(found[0], BaseException):
        if "EADDRINUSE" in str(found[0]):
            raise UserError(f"{place}: another program uses the port; give a different one, the same to all processes")
        raise found[0]
    return found[0]


def agreed_attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name for this start of all processes, new for each start and identical on all.

    After an elastic restart the launcher's store still holds the addresses of the processes that died, and the new ones
    would mostly connect to those: each start needs its own part of the store. The launcher's restart count can't name
    it: with several nodes each counts only the failures that it saw, and keeps its count if another node restarts it.
    Raises RuntimeError if the others do not come within `timeout`.
    """
    deadline = time.monotonic() + timeout.total_seconds()

    def wait(done: Callable[[], bool]) -> None:
        pause = 0.001
        while not done():
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"Timed out after {timeout.total_seconds():g} s: some of {world_size} processes did not come"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    if rank == 0:
        attempt = uuid.uuid4().hex
        store.set("attempt", attempt)
        wait(lambda: store.add(f"{attempt}/arrived", 0) == world_size - 1)  # adding 0 reads the counter
        store.set(f"{attempt}/begun", "yes")
        return attempt
    arrived_at = ""

    def begun() -> bool:
        nonlocal arrived_at
        attempt = store.get("attempt").decode()
        if attempt == arrived_at:
            return store.check([f"{attempt}/begun"])
        if not store.check([f"{attempt}/begun"]):  # an attempt that began without this process is an earlier one
            arrived_at = attempt
            store.add(f"{attempt}/arrived", 1)
        return False

    wait(begun)
    return arrived_at

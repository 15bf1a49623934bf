"""Where a run takes place: processes, device, precision, random seeds. Accelerate does the work."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import hashlib
import json
import math
import multiprocessing
import os
import random
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import machine
from ..errors import UserError, of_the_disk
from .batch_norm import with_global_batch_norm
from .shared_memory import HostSum


class Runtime:
    """The processes of a run, as this one sees them. With one process every collective does nothing."""

    def __init__(
        self,
        *,
        precision: str = "fp32",
        cpu: bool = False,
        timeout_seconds: float = 600.0,
        threads: int | None = None,
        deterministic: bool = False,
        gradient_compression: str = "none",
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a notebook without ipywidgets; its bars are then of characters
            import tqdm.auto  # noqa: F401  (Accelerate imports it)
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
        from accelerate.state import AcceleratorState

        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)  # measured: it loads the compiler, 2 s
        torch.backends.cudnn.benchmark = False
        cpu = cpu or not torch.cuda.is_available()  # without it every process of a plain torchrun believes it is alone
        if precision == "fp16" and cpu:
            # Accelerate would train in fp32 and not say so
            raise UserError("--precision fp16: needs a GPU; on a CPU use --precision bf16 or fp32")
        if AcceleratorState._shared_state:
            # a second training in one process, perhaps with another precision or on another device
            AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
        join_processes(cpu, timedelta(seconds=timeout_seconds))
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=[
                # every process has the same buffers: BatchNorm takes its statistics over the global batch
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds)),
            ],
        )
        self.precision = precision
        self.gradient_compression = gradient_compression
        self.timeout_seconds = timeout_seconds
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main = self.rank == 0
        self.is_local_main: bool = self.accelerator.is_local_main_process
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.threads = threads or threads_asked_for() or max(1, machine.cores() // local_world_size)
        if type(multiprocessing.current_process()).__name__ == "ForkProcess":  # of a notebook, by notebook_launcher
            self.threads = 1  # OpenMP's threads do not outlive a fork: a second one would be waited for in vain
        torch.set_num_threads(self.threads)
        self._host_sum: HostSum | None = None
        if self.device.type == "cpu":
            keep_freed_memory()
            if self.world_size > 1:
                self._host_sum = HostSum(self.rank, self.world_size, self.gather_objects, timeout_seconds)

    @property
    def scaler(self) -> Any:
        """The gradient scaler of fp16, else None."""
        return self.accelerator.scaler

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision policy of a forward pass."""
        return contextlib.nullcontext() if self.precision == "fp32" else self.accelerator.autocast()

    def place(self, network: nn.Module, *, whole: bool = True, channels_last: bool = False) -> nn.Module:
        """The network on the device, its batch statistics taken over all processes.

        One that is about to be split is not to lie `whole` on the device. channels_last: convolutions in that layout.
        """
        if whole and channels_last:
            network = network.to(memory_format=torch.channels_last)
        if self.world_size > 1:
            with_global_batch_norm(network)
        if whole and self.device.type != "cpu":  # "cpu:0" would copy, and so change strides
            network = network.to(self.device)
        if self.precision == "bf16" and self.device.type == "cpu":
            self._check_recurrent_bf16(network)
        return network

    @torch.no_grad()
    def broadcast_network(self, network: nn.Module) -> None:
        """Makes parameters and buffers those of the main process: another machine may have drawn others."""
        if self.world_size == 1:
            return
        for tensor in (*network.parameters(), *network.buffers()):
            held = tensor.detach().clone(memory_format=torch.contiguous_format)
            self.broadcast(held)
            if not torch.equal(held, tensor):
                tensor.copy_(held)

    def _check_recurrent_bf16(self, network: nn.Module) -> None:
        """Raises UserError where this CPU can't train a recurrent layer in bf16: oneDNN lacks it on many."""
        for module in network.modules():
            if isinstance(module, nn.RNNBase):
                try:
                    with self.autocast():
                        module(torch.zeros(1, 1, module.input_size))
                except RuntimeError as error:
                    what = type(module).__name__
                    why = str(error).split(". ")[0]
                    raise UserError(f"--precision bf16: this CPU has no {what} in bf16 ({why}); use fp32") from error

    @property
    def _stays_plain(self) -> bool:
        """Whether Accelerate would do nothing to a network: it imports the compiler to find out, 2 s."""
        return self.world_size == 1 and self.precision == "fp32"

    def wrap(self, network: nn.Module, *, ddp: bool = True) -> nn.Module:
        """A placed network as the backward pass needs it: under DDP with several processes, unless told otherwise."""
        if self._stays_plain:
            return network
        with warnings.catch_warnings():
            # torch 2.14 renames broadcast_buffers; torch 2.11 knows the old name only
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            wrapped = self.accelerator.prepare_model(network, evaluation_mode=not ddp)  # then it leaves DDP out
        if self.gradient_compression == "bf16" and self.world_size > 1 and ddp:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def unwrap(self, network: nn.Module) -> nn.Module:
        """The plain network again."""
        if self._stays_plain:
            return network
        return self.accelerator.unwrap_model(network, keep_fp32_wrapper=False)

    @property
    def sums(self) -> str:
        """By what processes add up: the order of the additions, and so the last bits, depend on it."""
        if self.world_size == 1:
            return "none"
        return "shared memory" if self._host_sum is not None and self._host_sum.usable else "network"

    # Collectives: they do nothing alone.

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world_size == 1:
            return tensor
        if self._host_sum is None or not self._host_sum.sum(tensor):
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> None:
        """Makes a tensor that of the main process, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0)

    def gather_objects(self, value: Any) -> list[Any]:
        """The (small, JSON-like) values of all processes, by rank."""
        if self.world_size == 1:
            return [value]
        # torch's own object collectives are pickles
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(text)], device=self.device))
        longest = int(max(sizes))
        texts = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(texts, nn.functional.pad(text, (0, longest - len(text))))
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, sizes, strict=True)]

    def from_main(self, value: Any) -> Any:
        """The main process's (small, JSON-like) value."""
        return self.gather_objects(value if self.is_main else None)[0]

    def gather_bytes(self, data: Tensor) -> list[Tensor]:
        """A uint8 tensor of each process, all of the same length, by rank, on the CPU."""
        if self.world_size == 1:
            return [data]
        data = data.to(self.device)
        everyones = [torch.empty_like(data) for _ in range(self.world_size)]
        dist.all_gather(everyones, data)
        return [tensor.cpu() for tensor in everyones]

    def gather_tensors(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of all processes by name, on the CPU; they may have others each."""
        if self.world_size == 1:
            return [{name: tensor.detach().cpu() for name, tensor in tensors.items()}]
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        kinds = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in plain.items()]
        everyones = self.gather_objects(kinds)
        if not any(everyones):
            return [{} for _ in everyones]
        data = [t.view(-1).view(torch.uint8) for t in plain.values()]
        found = self.gather_rows(torch.cat([*data, torch.empty(0, dtype=torch.uint8)]).to(self.device))
        result: list[dict[str, Tensor]] = []
        for of_process in everyones:
            result.append({})
            for name, dtype, shape in of_process:
                kind = getattr(torch, dtype)
                size = math.prod(shape) * kind.itemsize
                own, found = found[:size], found[size:]
                result[-1][name] = own.clone().view(kind).reshape(shape)
        return result

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows, [k, ...], of all processes in the order of their ranks; on the CPU. k may differ."""
        if self.world_size == 1:
            return rows.cpu()
        counts = self.gather_objects(len(rows))
        room = rows.new_zeros((max(counts), *rows.shape[1:]))
        room[: len(rows)] = rows
        everyones = [torch.empty_like(room) for _ in counts]
        dist.all_gather(everyones, room)
        return torch.cat([found[:count] for found, count in zip(everyones, counts, strict=True)]).cpu()

    def max(self, values: list[float]) -> list[float]:
        """The largest of each value over all processes."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def alive(self) -> None:
        """Says that this process makes progress.

        Where several take part and one does not say so for well over the time-out, its stacks are printed and it ends,
        so that a process which hangs in something other than a collective can't keep the others for ever.
        """
        if self.world_size > 1:
            # a notebook's sys.stderr is no file
            faulthandler.dump_traceback_later(1.5 * self.timeout_seconds + 30, exit=True, file=sys.__stderr__ or 2)

    def done(self) -> None:
        """Nothing more is to be watched."""
        faulthandler.cancel_dump_traceback_later()

    def describe(self) -> str:
        """Device x processes, for the plan."""
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        threads = "" if self.device.type == "cuda" else f" x {self.threads} thread{'s' * (self.threads > 1)}"
        return f"{kind} x {processes}{threads}"

    def seed(self, seed: int, *, step: int = 0, rank: int | None = None) -> None:
        """Seeds Python, NumPy and torch: equally on all processes, or for one rank (dropout differs by rank)."""
        digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
        Runtime.seed_all(int.from_bytes(digest, "big") >> 1)

    @staticmethod
    def seed_all(number: int) -> None:
        """Seeds Python, NumPy and torch with a number."""
        random.seed(number)
        torch.manual_seed(number)
        with contextlib.suppress(ImportError):
            import numpy

            numpy.random.seed(number % 2**32)


def join_processes(cpu: bool, timeout: timedelta) -> None:
    """Makes the process group that a launcher's environment describes, where there is one and it is not made yet."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    store, rank, world_size = meet(timeout)
    if not cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(
        "gloo" if cpu else "nccl",
        store=dist.PrefixStore(agreed_attempt(store, rank, world_size, timeout), store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


MEETING_GRACE_SECONDS = 5.0


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Where the processes meet, this one's rank and their number, from a launcher's environment; raises UserError.

    Whoever listens at the port and says nothing would be waited for without end: torch's time-out is for the connection
    only (measured on torch 2.14).
    """
    place = f"MASTER_ADDR:MASTER_PORT {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    found: list[Any] = []

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
            f"{place}: no answer within {timeout.total_seconds():g} s (--timeout-seconds); another program may have "
            "the port: give another one, the same to all processes"
        )
    if isinstance(found[0], BaseException):
        if "EADDRINUSE" in str(found[0]):
            raise UserError(f"{place}: another program has the port; give another one, the same to all processes")
        raise found[0]
    return found[0]


def agreed_attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name for this start of all processes, which none of their earlier starts had; the same on all of them.

    After an elastic restart the launcher's store still holds the addresses of the processes that died, and the new ones
    would connect to those in most cases: each start needs its own part of the store. The launcher's count of restarts
    does not name it: with several nodes each counts the failures that it saw itself, and goes on with the same count
    where another node restarts it. Raises RuntimeError where the others do not come within `timeout`.
    """
    deadline = time.monotonic() + timeout.total_seconds()

    def wait(done: Callable[[], bool]) -> None:
        pause = 0.001
        while not done():
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"Timed out after {timeout.total_seconds():g} s: of {world_size} processes some did not come"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    if rank == 0:
        attempt = uuid.uuid4().hex
        store.set("attempt", attempt)
        wait(lambda: store.add(f"{attempt}/arrived", 0) == world_size - 1)
        store.set(f"{attempt}/begun", "yes")
        return attempt
    arrived_at = ""

    def begun() -> bool:
        nonlocal arrived_at
        attempt = store.get("attempt").decode()
        if attempt == arrived_at:
            return store.check([f"{attempt}/begun"])
        if not store.check([f"{attempt}/begun"]):  # one that has begun without this process is an earlier one
            arrived_at = attempt
            store.add(f"{attempt}/arrived", 1)
        return False

    wait(begun)
    return arrived_at


def forget_devices() -> None:
    """Lets go of what Accelerate keeps of a training that has ended: its notebook_launcher would refuse to start."""
    from accelerate.state import AcceleratorState

    if not dist.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)


def threads_asked_for() -> int | None:
    """What the user's $OMP_NUM_THREADS says; None where it says nothing.

    accelerate and torchrun set it for the processes that they start, so that of these the launcher's own counts.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        asked = machine.environment_of(os.getppid()).get("OMP_NUM_THREADS", "")
    first = asked.partition(",")[0].strip()  # one for each level of nested regions
    return int(first) if first.isascii() and first.isdecimal() and int(first) > 0 else None


def launched_alone() -> str:
    """What to say where `accelerate launch` was asked for several processes and started one; else nothing.

    Its launcher of a single process sets an address to meet at for several processes only, and never a rank.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if not launched or "RANK" in os.environ or dist.is_initialized():
        return ""
    return (
        "accelerate was asked for several processes and started 1 (--cpu and MULTI_CPU do so): for several CPU "
        "processes give --config_file launch/accelerate/cpu_ddp.yaml --num_processes N"
    )


def keep_freed_memory() -> None:
    """Has glibc keep large freed blocks instead of giving each back to the system, where there is glibc.

    Without it every large activation is faulted in again page by page: measured, an evaluation takes several times as
    long and a step of a CNN a fifth more.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Has glibc give large freed blocks back at once, where there is glibc: the opposite of `keep_freed_memory`.

    Blocks that are gathered and dropped again leave gaps in the heap that the next ones, of other sizes, do not fill.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 1 << 20)
        libc.mallopt(m_trim_threshold, 1 << 20)


def give_back_memory() -> None:
    """Has glibc give what is freed back to the system for once, where there is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


T = TypeVar("T")


def on_main(runtime: Runtime, action: Callable[[], T]) -> T:
    """What `action` (JSON-like) gives on the main process, on all; a UserError there is raised on all."""
    answer: list[Any] = [None, None]
    if runtime.is_main:
        try:
            answer[0] = action()
        except UserError as error:
            answer[1] = str(error)
        except OSError as error:
            answer[1] = of_the_disk(error)
            if not answer[1]:
                raise
    value, reason = runtime.from_main(answer)
    if reason is not None:
        raise UserError(reason)
    return value

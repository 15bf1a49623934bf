"""The environment of a run: processes, device, precision, random seeds. Accelerate does the work."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import math
import multiprocessing
import os
import random
import sys
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import machine
from ..errors import UserError, of_the_disk
from ..files import LAUNCH, near
from .aside import gathered_objects
from .batch_norm import with_global_batch_norm
from .rendezvous import join_processes
from .shared_memory import HostSum


class Runtime:
    """The processes of a run, as this one sees them. With one process collectives do nothing."""

    def __init__(
        self,
        *,
        precision: str = "fp32",
        cpu: bool = False,
        device: str = "auto",
        tf32: bool = False,
        timeout_seconds: float = 600.0,
        threads: int | None = None,
        deterministic: bool = False,
        cudnn_benchmark: bool = False,
        gradient_compression: str = "none",
        weight_compression: str = "none",
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in a notebook without ipywidgets; its bars are then plain text
            import tqdm.auto  # noqa: F401  (Accelerate imports it)
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
        from accelerate.state import AcceleratorState

        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)  # measured: it loads the compiler, 2 s
        self.deterministic = deterministic
        self.tf32 = tf32
        # timing picks an algorithm, and so the last bits: a resumed run may pick another
        self.cudnn_benchmark = torch.backends.cudnn.benchmark = cudnn_benchmark and not deterministic
        kind = chosen_device("cpu" if cpu else device)
        cpu = kind == "cpu"  # otherwise each process of a plain torchrun would train alone
        if precision == "fp16" and cpu:
            # Accelerate would silently train in fp32
            raise UserError("--precision fp16: needs a GPU; on a CPU use --precision bf16 or fp32")
        if kind == "mps":
            check_mps(precision)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        if AcceleratorState._shared_state:
            # a second training in one process, perhaps with a different precision or device
            AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
        self.store = join_processes(cpu, timedelta(seconds=timeout_seconds))
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=[
                # buffers are identical on all processes: BatchNorm takes its statistics over the global batch
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_seconds)),
            ],
        )
        self.precision = precision
        self.gradient_compression, self.weight_compression = gradient_compression, weight_compression
        self.timeout_seconds = timeout_seconds
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main = self.rank == 0
        self.is_local_main: bool = self.accelerator.is_local_main_process
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.threads = threads or threads_asked_for() or max(1, machine.cores() // local_world_size)
        if type(multiprocessing.current_process()).__name__ == "ForkProcess":  # of a notebook, by notebook_launcher
            self.threads = 1  # OpenMP's threads do not survive a fork: waiting for a second one would hang
        torch.set_num_threads(self.threads)
        self._host_sum: HostSum | None = None
        if self.device.type == "cpu":
            machine.keep_freed_memory()
            if self.world_size > 1:
                self._host_sum = HostSum(self.rank, self.world_size, self.gather_objects, timeout_seconds)

    @property
    def scaler(self) -> Any:
        """The gradient scaler for fp16's loss scaling, else None."""
        return self.accelerator.scaler

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context manager: the mixed precision of a forward pass."""
        return contextlib.nullcontext() if self.precision == "fp32" else self.accelerator.autocast()

    def place(self, network: nn.Module, *, whole: bool = True, channels_last: bool = False) -> nn.Module:
        """The network on the device, with BatchNorm statistics over all processes.

        whole: False for a network about to be sharded, which stays on the CPU. channels_last: for convolutions.
        """
        if whole and channels_last:
            network = network.to(memory_format=torch.channels_last)
        if self.world_size > 1:
            with_global_batch_norm(network, self.sum, on_cpu=self.device.type == "cpu")
        if whole and self.device.type != "cpu":  # "cpu:0" would copy and so change strides
            network = network.to(self.device)
        if self.precision == "bf16" and self.device.type == "cpu":
            self._check_recurrent_bf16(network)
        return network

    @torch.no_grad()
    def broadcast_network(self, network: nn.Module) -> None:
        """Broadcasts the main process's parameters and buffers: other machines may have drawn different ones."""
        if self.world_size == 1:
            return
        for tensor in (*network.parameters(), *network.buffers()):
            held = tensor.detach().clone(memory_format=torch.contiguous_format)
            self.broadcast(held)
            if not torch.equal(held, tensor):
                tensor.copy_(held)

    def _check_recurrent_bf16(self, network: nn.Module) -> None:
        """Raises UserError if this CPU can't train a recurrent layer in bf16: on many, oneDNN lacks it."""
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
        """Whether Accelerate would leave a network as it is: finding out by itself, it imports the compiler (2 s)."""
        return self.world_size == 1 and self.precision == "fp32"

    def wrap(self, network: nn.Module, *, ddp: bool = True) -> nn.Module:
        """A placed network as the backward pass needs it: in DDP with several processes, unless `ddp` is False."""
        if self._stays_plain:
            return network
        with warnings.catch_warnings():
            # torch 2.14 renames broadcast_buffers; torch 2.11 has only the old name
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            wrapped = self.accelerator.prepare_model(network, evaluation_mode=not ddp)  # which skips DDP
        if self.gradient_compression == "bf16" and self.world_size > 1 and ddp:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def unwrap(self, network: nn.Module) -> nn.Module:
        """The plain network."""
        if self._stays_plain:
            return network
        return self.accelerator.unwrap_model(network, keep_fp32_wrapper=False)

    @property
    def sums(self) -> str:
        """What all-reduces tensors: the order of the additions, and so the last bits, depend on it."""
        if self.world_size == 1:
            return "none"
        return "shared memory" if self._host_sum is not None and self._host_sum.usable else "network"

    @property
    def kernels(self) -> dict[str, str]:
        """What decides which of its kernels a GPU computes with, and so the last bits; on a CPU nothing."""
        if self.device.type == "cpu":
            return {"device": "cpu"}
        settings = {"deterministic": self.deterministic, "tf32": self.tf32, "cudnn-benchmark": self.cudnn_benchmark}
        return {"device": self.device.type, **{name: on_or_off(value) for name, value in settings.items()}}

    # Collectives: with one process they do nothing.

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduces a tensor by sum, in place."""
        if self.world_size == 1:
            return tensor
        if self._host_sum is None or not self._host_sum.sum(tensor):
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> None:
        """Broadcasts the main process's tensor, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0)

    def gather_objects(self, value: Any) -> list[Any]:
        """The (small, JSON-like) values of all processes, by rank."""
        if self.world_size == 1:
            return [value]
        return gathered_objects(value, self.world_size, self.device)

    def from_main(self, value: Any) -> Any:
        """The main process's (small, JSON-like) value."""
        return self.gather_objects(value if self.is_main else None)[0]

    def gather_bytes(self, data: Tensor) -> list[Tensor]:
        """The uint8 tensors of all processes, by rank, on the CPU; all must have the same length."""
        if self.world_size == 1:
            return [data]
        data = data.to(self.device)
        everyones = [torch.empty_like(data) for _ in range(self.world_size)]
        dist.all_gather(everyones, data)
        return [tensor.cpu() for tensor in everyones]

    def gather_tensors(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of all processes by name, by rank, on the CPU; names and shapes may differ."""
        if self.world_size == 1:
            return [{name: tensor.detach().cpu() for name, tensor in tensors.items()}]
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        kinds = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in plain.items()]
        everyones = self.gather_objects(kinds)
        if not any(everyones):
            return [{} for _ in everyones]
        data = [t.view(-1).view(torch.uint8) for t in plain.values()]
        rest = self.gather_rows(torch.cat([*data, torch.empty(0, dtype=torch.uint8)]).to(self.device))
        result: list[dict[str, Tensor]] = []
        for of_process in everyones:
            result.append({})
            for name, dtype, shape in of_process:
                kind = getattr(torch, dtype)
                size = math.prod(shape) * kind.itemsize
                own, rest = rest[:size], rest[size:]
                result[-1][name] = own.clone().view(kind).reshape(shape)
        return result

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows, [k, ...], of all processes in order of rank, on the CPU; k may differ."""
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
        """Reports that this process makes progress.

        If one of several processes does not report for well over the timeout, it prints its stacks and exits, so that
        a process hanging outside a collective can't block the others for ever.
        """
        if self.world_size > 1:
            # a notebook's sys.stderr is not a file
            faulthandler.dump_traceback_later(1.5 * self.timeout_seconds + 30, exit=True, file=sys.__stderr__ or 2)

    def done(self) -> None:
        """Stops watching for progress."""
        faulthandler.cancel_dump_traceback_later()

    def describe(self) -> str:
        """Device x processes x threads, for the plan."""
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        kind += " (TF32)" if self.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else ""
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        threads = "" if self.device.type == "cuda" else f" x {self.threads} thread{'s' * (self.threads > 1)}"
        return f"{kind} x {processes}{threads}"

    def seed(self, seed: int, *, step: int = 0, rank: int | None = None) -> None:
        """Seeds Python, NumPy and torch: identically on all processes, or by `rank` (dropout differs by rank)."""
        Runtime.seed_all(seed_of(seed, step=step, rank=rank))

    @staticmethod
    def seed_all(number: int) -> None:
        """Seeds Python, NumPy and torch with a number."""
        random.seed(number)
        # without a device of another kind, 3 ms less: torch notes each time where it would have to seed one later
        (torch.manual_seed if _has_accelerator() else torch.default_generator.manual_seed)(number)
        with contextlib.suppress(ImportError):
            import numpy

            numpy.random.seed(number % 2**32)


def seed_of(seed: int, *, step: int = 0, rank: int | None = None) -> int:
    """The number with which `Runtime.seed` seeds the generators."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


def forget_devices() -> None:
    """Drops Accelerate's state after a training: else its notebook_launcher would refuse to start."""
    from accelerate.state import AcceleratorState

    if not dist.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)


def on_or_off(value: bool) -> str:
    """A setting as notes show it."""
    return "on" if value else "off"


def chosen_device(asked: str) -> str:
    """The type of device for `--device`: "cpu", "cuda" or "mps"; raises UserError if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            available.pop("mps")  # a Mac's GPU serves one process
        return next(kind for kind, there in available.items() if there)
    if not available[asked]:
        what = {"cuda": "no CUDA GPU is available", "mps": "no Apple GPU is available"}[asked]
        build = "" if torch.version.cuda or asked != "cuda" else " (this torch is a build without CUDA)"
        raise UserError(f"--device {asked}: {what}{build}; leave it out, or use --device cpu")
    return asked


def check_mps(precision: str) -> None:
    """Raises UserError for what is not supported here on Apple's GPUs."""
    if precision != "fp32":
        raise UserError(f"--precision {precision}: not supported on Apple's GPUs; use fp32, or --device cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--device mps: a Mac's GPU serves one process; start one, or use --device cpu")


def threads_asked_for() -> int | None:
    """The user's $OMP_NUM_THREADS; None if it is not set.

    accelerate and torchrun set it for the processes that they start, so for these the launcher's own value counts.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        asked = machine.parents_environment().get("OMP_NUM_THREADS", "")
    first = asked.partition(",")[0].strip()  # one for each level of nested regions
    return int(first) if first.isascii() and first.isdecimal() and int(first) > 0 else None


def launched_alone() -> str:
    """A note if `accelerate launch` was asked for several processes and started one; else "".

    Its launcher of a single process sets a master address only if several were requested, and never a rank.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if not launched or "RANK" in os.environ or dist.is_initialized():
        return ""
    return (
        "accelerate was asked for several processes and started 1 (--cpu and MULTI_CPU do so): for several CPU "
        f"processes give --config_file {near(LAUNCH / 'accelerate/cpu_ddp.yaml')} --num_processes N"
    )


T = TypeVar("T")


def on_main(runtime: Runtime, action: Callable[[], T]) -> T:
    """Runs `action` on the main process; returns its (JSON-like) result, or raises its UserError, on all."""
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

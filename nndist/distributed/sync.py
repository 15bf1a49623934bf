"""What is all-reduced in each step: the gradients, and buffers that training changes."""

from __future__ import annotations

import dis
import types
import zlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import UserError
from .batch_norm import is_global
from .runtime import Runtime

SHAPES = 1 << 16  # numbers of shapes that are told apart
SMALL = 10_000  # elements of a buffer whose values are compared after each step
BUCKET_BYTES = 1 << 26  # reduced at once: more would only take memory


class GradientSync:
    """Sums the gradients of a network over the processes, once per step, after the last backward pass.

    The network is neither wrapped nor hooked: its parts may be called separately; parameters may be frozen, unfrozen or
    unused, also on some processes only. A parameter that no process uses keeps no gradient, as with one process.
    Calling it returns whether any process ran out of memory in its passes (on CPUs; elsewhere finding out would take a
    wait in each step). All processes must train the same parameters.
    """

    def __init__(self, network: nn.Module, runtime: Runtime):
        self.network, self.runtime = network, runtime
        self.trusted = False  # whether something else has averaged them
        self.on_cpu = runtime.device.type == "cpu"
        sparse = (m.weight for m in network.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse)
        self.sparse = {id(weight) for weight in sparse}

    def __call__(self, *, short: bool = False) -> bool:
        if self.runtime.world_size == 1 or self.trusted:
            return False
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        dense = [parameter for parameter in trained if id(parameter) not in self.sparse]
        for parameter in dense:
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise UserError(
                    "a parameter has a sparse gradient that nn.Embedding(sparse=True) does not explain; several "
                    "processes can't sum it: make it dense"
                )
        used = [parameter.grad is not None for parameter in trained]
        # reading what the others use waits for the device: only a process that lacks a gradient has to know
        flags = torch.tensor([float(short), *map(float, used)], device=self.runtime.device)
        flags = self.runtime.sum(flags)
        if (self.on_cpu or not all(used)) and not short:
            anyone_short, *by_anyone = flags.tolist()
        else:
            anyone_short, by_anyone = float(short), [1.0] * len(trained)
        if anyone_short or short:
            return True
        wanted = {id(p) for p, count in zip(trained, by_anyone, strict=True) if count}
        for bucket in _buckets(dense):
            self._add_up(bucket, wanted)
        for parameter in trained:
            if id(parameter) in self.sparse and id(parameter) in wanted:
                parameter.grad = self._sparse_sum(parameter)
        return False

    def _add_up(self, parameters: list[nn.Parameter], wanted: set[int]) -> None:
        flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else _flat(p.grad) for p in parameters])
        compressed = self.runtime.gradient_compression == "bf16" and flat.is_floating_point()
        total = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
        total = self.runtime.sum(total.to(torch.bfloat16) if compressed else total).to(total.dtype)
        total = torch.view_as_complex(total.view(-1, 2)) if flat.is_complex() else total
        for parameter, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            if id(parameter) not in wanted:
                continue
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(part.view(parameter.shape))

    def _sparse_sum(self, parameter: nn.Parameter) -> Tensor:
        """The rows that any process has a gradient for, summed over the processes in the same order on each.

        Dense if that of any process is, as a penalty on all weights makes it.
        """
        own = parameter.grad
        is_dense = torch.tensor(float(own is not None and own.layout == torch.strided), device=self.runtime.device)
        if self.runtime.sum(is_dense):
            return self.runtime.sum(torch.zeros_like(parameter) if own is None else own.to_dense().contiguous())
        if own is None:
            empty = torch.zeros((1, 0), dtype=torch.int64, device=parameter.device)
            own = torch.sparse_coo_tensor(empty, parameter.new_zeros((0, *parameter.shape[1:])), parameter.shape)
        own = own.coalesce()
        rows = self.runtime.gather_rows(own.indices()[0]).to(parameter.device)
        values = self.runtime.gather_rows(own.values()).to(parameter.device)
        return torch.sparse_coo_tensor(rows.unsqueeze(0), values, parameter.shape).coalesce()


def _flat(gradient: Tensor) -> Tensor:
    return gradient.reshape(-1)


def _methods_of(kind: type[nn.Module]) -> Iterator[types.CodeType]:
    """The code of a module class's methods, except nn.Module's and constructors."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            if name not in ("__init__", "reset_parameters", "reset_running_stats") and hasattr(method, "__code__"):
                yield method.__code__


def _writes(code: types.CodeType, attribute: str) -> bool:
    """Whether the code assigns the attribute or an element of it, or calls an in-place method of it (`add_`)."""
    instructions = list(dis.get_instructions(code))
    for place, instruction in enumerate(instructions):
        if instruction.argval != attribute:
            continue
        if instruction.opname == "STORE_ATTR":
            return True
        # self.mean.mul_(...), self.mean.data.mul_(...)
        after = [str(i.argval) for i in instructions[place + 1 : place + 3] if i.opname in ("LOAD_ATTR", "LOAD_METHOD")]
        if any(name.endswith("_") and not name.endswith("__") for name in after):
            return True
        if _is_stored_into(instructions[place + 1 : place + 12]):
            return True
    return False


def _same_with_nan(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a shape are equal where a NaN equals a NaN."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _is_stored_into(following: list[dis.Instruction]) -> bool:
    """Whether the value just pushed on the stack is the container of an element assignment (`self.mean[0] = x`).

    The instructions between push the index above it: one value, or a slice's two ends.
    """
    above = 0
    for instruction in following:
        if instruction.opname in ("STORE_SUBSCR", "STORE_SLICE"):
            return above == (1 if instruction.opname == "STORE_SUBSCR" else 2)
        above += dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
        if above < 0:
            return False
    return False


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """The parameters in order, by type, in buckets of at most BUCKET_BYTES."""
    by_type: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_type.setdefault(parameter.dtype, []).append(parameter)
    for of_type in by_type.values():
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in of_type:
            if bucket and size + parameter.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.nbytes
        yield bucket


class BufferSync:
    """Averages buffers that training changes, such as a custom running mean, over the processes.

    With k of a step's n examples on a process, a buffer becomes the sum of k / n times each process's: what is linear
    in a mean over the batch comes out as with one process, and what is identical on all stays so, to the bit. Integers
    are the first process's. BatchNorm's buffers are left out: they are global already.

    changed: names of the buffers seen to change, for a note. expected: those that will, as the networks' code shows.
    """

    def __init__(self, networks: Mapping[str, nn.Module], runtime: Runtime):
        self.networks, self.runtime = networks, runtime
        self.changed: list[str] = []
        self._known: dict[str, tuple[Tensor, int, Tensor | None]] = {}
        self._steps = 0
        self._everywhere = {
            f"{name}.{prefix}.{key}".replace("..", ".")
            for name, network in networks.items()
            for prefix, module in network.named_modules()
            if is_global(module) or isinstance(module, nn.SyncBatchNorm)
            for key in module._buffers
        }
        self.expected = self._written_by_code() if runtime.world_size > 1 else []
        self.begin()

    def _written_by_code(self) -> list[str]:
        """Buffers that a method of their module, except its constructor, assigns or changes in-place."""
        found = []
        for name, network in self.networks.items():
            for prefix, module in network.named_modules():
                for key, buffer in module._buffers.items():
                    full = ".".join(filter(None, (name, prefix, key)))
                    by_kernel = isinstance(module, nn.modules.batchnorm._NormBase)  # InstanceNorm's running statistics
                    if by_kernel and buffer is None:
                        continue  # there are none
                    written = by_kernel or any(_writes(code, key) for code in _methods_of(type(module)))
                    if written and full not in self._everywhere:
                        found.append(full)
        return found

    def begin(self, changed: Iterable[str] = ()) -> None:
        """Treats every change from here on as training's; `changed`: buffers that an earlier launch saw change."""
        self.changed = [*self.changed, *(name for name in changed if name not in self.changed)]
        self._steps, self._known = 0, {}
        self._remember(self._buffers() if self.runtime.world_size > 1 else [])

    def _remember(self, buffers: list[tuple[str, Tensor]]) -> None:
        """Remembers buffers by value, large ones only in the first steps: torch's versions miss changes by `.data`."""
        known = {}
        for name, buffer in buffers:
            if name in self.changed:
                continue
            by_value = self._steps < 2 or buffer.numel() <= SMALL
            if name in self._known and by_value:  # unchanged
                known[name] = self._known[name]
            else:
                known[name] = (buffer, buffer._version, buffer.clone() if by_value else None)
        self._known = known

    def _has_changed(self, name: str, buffer: Tensor) -> bool:
        if name not in self._known:
            return True
        tensor, version, value = self._known[name]
        if value is not None:
            return value.shape != buffer.shape or not (torch.equal(value, buffer) or _same_with_nan(value, buffer))
        return tensor is not buffer or version != buffer._version

    def constant(self) -> list[Tensor]:
        """Large buffers that seem unchanged, by torch's versions, which miss what writes to `.data`."""
        return [
            buffer
            for name, buffer in self._buffers()
            if name not in self.changed and buffer.numel() > SMALL and not self._has_changed(name, buffer)
        ]

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """The current buffers, except BatchNorm's: a network may replace a buffer's tensor."""
        return [
            (f"{name}.{key}", buffer)
            for name, network in self.networks.items()
            for key, buffer in network.named_buffers()
            if f"{name}.{key}" not in self._everywhere
        ]

    def _check_shapes(self, names: list[str], sums: list[float]) -> None:
        """Raises UserError, on all processes, for a buffer whose shapes differ; sums: of their numbers and squares.

        They are whole and exact in float64; equal numbers are those with n * (sum of squares) = (sum)^2.
        """
        for name, total, squares in zip(names, sums, sums[len(names) :], strict=False):
            if self.runtime.world_size * squares != total * total:
                raise UserError(
                    f"{name}: this buffer has another shape on each process, as it grows with their examples; give it "
                    "its full length in __init__, or keep it as a plain attribute"
                )

    @torch.no_grad()
    def __call__(self, num_own: int, num_all: int) -> None:
        if self.runtime.world_size == 1:
            return
        buffers = self._buffers()
        candidates = [(name, buffer) for name, buffer in buffers if name not in self.changed]
        if buffers:  # one process's examples may change a buffer that another's do not: all must agree
            news = [float(self._has_changed(name, buffer)) for name, buffer in candidates]
            shapes = [float(zlib.crc32(repr(tuple(buffer.shape)).encode()) % SHAPES) for _, buffer in buffers]
            told = [*news, *shapes, *(shape * shape for shape in shapes)]
            flags = self.runtime.sum(torch.tensor(told, dtype=torch.float64, device=self.runtime.device)).tolist()
            self._check_shapes([name for name, _ in buffers], flags[len(news) :])
            self.changed += [name for (name, _), flag in zip(candidates, flags, strict=False) if flag]
        taken = [(name, buffer) for name, buffer in buffers if name in self.changed]
        if taken:
            weights = {True: float(num_own), False: float(self.runtime.is_main)}
            parts = []
            for _, buffer in taken:
                real = torch.view_as_real(buffer) if buffer.is_complex() else buffer
                weight = weights[real.is_floating_point()]
                parts.append(real.reshape(-1).double() * weight if weight else real.new_zeros(real.numel()).double())
            totals = self.runtime.sum(torch.cat(parts)).split([len(part) for part in parts])
            for (_, buffer), total in zip(taken, totals, strict=True):
                real = torch.view_as_real(buffer) if buffer.is_complex() else buffer
                real.copy_((total / num_all if real.is_floating_point() else total).view(real.shape))
        self._steps += 1
        self._remember(buffers)

"""A function of tensors, written down operation by operation as it runs, and run again from that.

For small networks most of a step's time goes into what stands around the kernels: modules, the autograd graph, views,
checks. A tape calls the same kernels in the same order on the same values, so that its results are the same bits; what
it saves is everything else. It knows nothing of Python's own state: see `NotReplayable`, and `same_bits` for the proof
that a tape does what the function does.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[..., Sequence[Tensor | None]]


class NotReplayable(Exception):
    """The function depends on something that a tape can't hold, such as a value that Python has looked at."""


class Tape:
    """Runs `function(*inputs)` once, recorded; `outputs` are its results. Called, it runs the recorded operations.

    function: gives tensors (or None); it may read and change other tensors (weights, running statistics) in place, and
    draw from torch's generators. inputs: tensors whose shapes and types all later ones have. quick: call operations
    through torch's Python bindings where it has such; else all are torch.ops, which torch.compile knows.
    Raises NotReplayable, after the function has run: `outputs` of the exception's second argument are its results.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor], *, quick: bool = True):
        recorder, watch = _Recorder(), _Watch()
        with watch, recorder:
            self.outputs = tuple(function(*inputs))
        if reason := recorder.reason or watch.reason:
            raise NotReplayable(reason, self.outputs)
        try:
            self.source, self.run = _written(recorder.calls, inputs, self.outputs, quick)
        except NotReplayable as error:
            raise NotReplayable(*error.args, self.outputs) from None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        below_autograd = torch._C._AutoDispatchBelowAutograd()
        try:
            return self.run(*inputs)
        finally:
            del below_autograd


Call = tuple[Any, tuple[Any, ...], dict[str, Any], Any]
"""An operation (torch._ops.OpOverload), its arguments, and what it gave."""


class _Recorder(TorchDispatchMode):
    """Notes every operation below autograd, forward and backward alike."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, 2 s, to keep it away from this class

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.reason = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        self.reason = self.reason or _reason_against(func, args, result)
        return result


class _Watch(TorchFunctionMode):
    """Sees what takes a tensor's values to Python without an operation that a recorder would note."""

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("tolist", "numpy", "__array__", "__dlpack__"):
            self.reason = "Python looks at a tensor's values"
        return func(*args, **(kwargs or {}))


def _reason_against(func: Any, args: Any, result: Any) -> str:
    """Why an operation can't be on a tape, or ""."""
    indexes = func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
    if indexes and not any(t.dtype in (torch.bool, torch.uint8) for t in args[1] if t is not None):
        return ""
    if func.namespace == "c10d":
        return "processes exchange something within a step"
    if torch.Tag.data_dependent_output in func.tags:
        return "Python looks at a tensor's value"
    if indexes or torch.Tag.dynamic_output_shape in func.tags:
        return f"{func} gives a shape that depends on values"
    if any(type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided for t in _tensors((args, result))):
        return f"{func} works on tensors of another kind"
    return ""


def _tensors(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _written(
    calls: Sequence[Call], inputs: Sequence[Tensor], outputs: Sequence[Tensor | None], quick: bool
) -> tuple[str, Callable[..., Any]]:
    """The calls as the source of one Python function of the inputs, and that function."""
    fresh = (f"v{number}" for number in itertools.count())
    known: dict[int, str] = {id(tensor): f"i{number}" for number, tensor in enumerate(inputs)}
    constants: dict[str, Any] = {}  # by name: tensors that are there before, and arguments that are no numbers
    transposed: dict[str, str] = {}  # the transpose of a matrix that is one itself is the matrix
    lines: list[tuple[str, list[str], list[str], bool]] = []  # text, names read, names made, may be left out

    def constant(value: Any) -> str:
        name = f"c{len(constants)}"
        constants[name] = value
        return name

    def text(value: Any) -> str:
        if isinstance(value, Tensor):
            if id(value) not in known:
                known[id(value)] = constant(value)
            return known[id(value)]
        if isinstance(value, list | tuple):
            return "[" + ", ".join(map(text, value)) + "]"
        if isinstance(value, bool | int | None) or (isinstance(value, float) and math.isfinite(value)):
            return repr(value)
        return constant(value)

    def names_in(value: Any) -> list[str]:
        return [known[id(tensor)] for tensor in _tensors(value)]

    for func, args, kwargs, result in calls:
        said = [text(value) for value in args] + [f"{name}={text(value)}" for name, value in kwargs.items()]
        read = names_in([*args, *kwargs.values()])
        if func._schema.name in ("aten::detach", "aten::alias", "aten::lift_fresh"):
            known[id(result)] = known[id(args[0])]
            continue
        if func._schema.name == "aten::t" and read[0] in transposed:
            known[id(result)] = transposed[read[0]]
            continue
        made = []
        for tensor in _tensors(result):
            if not any(tensor is given for given in _tensors([*args, *kwargs.values()])):  # not changed in place
                known[id(tensor)] = next(fresh)
                made.append(known[id(tensor)])
        if read and all(name in constants for name in read) and _is_view(func) and isinstance(result, Tensor):
            # a view of a weight follows it: one is enough for ever
            with torch.no_grad():
                constants[made[0]] = func(*args, **kwargs)
            continue
        if func._schema.name == "aten::t":
            transposed[made[0]] = read[0]
        if isinstance(result, Tensor):
            target = f"{made[0]} = " if made else ""
        elif made:
            if any(isinstance(part, list | tuple) for part in result):
                raise NotReplayable(f"{func} gives lists of lists")
            target = ", ".join(known[id(part)] if isinstance(part, Tensor) else "_" for part in result) + ", = "
        else:
            target = ""
        optional = not func._schema.is_mutable and torch.Tag.nondeterministic_seeded not in func.tags
        lines.append((f"{target}{constant(_quick(func) if quick else func)}({', '.join(said)})", read, made, optional))
    returned = [text(output) for output in outputs]

    # From the end: what nothing reads is left out, and what is read for the last time is freed there
    needed = set(returned)
    body: list[str] = []
    for line, read, made, optional in reversed(lines):
        if optional and not needed.intersection(made):
            continue
        last = [name for name in dict.fromkeys([*read, *made]) if name not in needed and name not in constants]
        last = [name for name in last if not name.startswith("i")]
        needed.update(read)
        body += [f"del {', '.join(last)}"] if last else []
        body.append(line)
    arguments = ", ".join(f"i{number}" for number in range(len(inputs)))
    source = (
        "\n    ".join(
            [f"def run({arguments}):", *reversed(body), f"return ({''.join(f'{name}, ' for name in returned)})"]
        )
        + "\n"
    )
    namespace = dict(constants)
    exec(compile(source, "<tape>", "exec"), namespace)
    return source, namespace["run"]


def _is_view(func: Any) -> bool:
    """Whether an operation only gives another view of its first argument."""
    returns, first = func._schema.returns, func._schema.arguments[0]
    return (
        len(returns) == 1
        and not func._schema.is_mutable
        and first.alias_info is not None
        and returns[0].alias_info is not None
    )


def _quick(func: Any) -> Callable[..., Any]:
    """The same operation through torch's own Python binding, whose arguments are parsed in half the time."""
    namespace, name = func._schema.name.split("::")
    if namespace != "aten":
        return func
    if name.endswith("_") or name in ("view", "expand"):
        return getattr(torch._C.TensorBase, name, func)
    for place in (torch._C._VariableFunctions, torch._C._nn):
        if hasattr(place, name):
            return getattr(place, name)
    return func


def same_bits(ours: Iterable[Tensor | None], theirs: Iterable[Tensor | None]) -> bool:
    """Whether two results agree in every bit; what is not a number equals itself."""
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            if a is not b:
                return False
        elif a.shape != b.shape or a.dtype != b.dtype or not bool(((a == b) | ((a != a) & (b != b))).all()):
            return False
    return True


def relative_difference(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> float:
    """The largest difference of any element, relative to its tensor's largest and 0.01 of the largest of all.

    The latter, because a gradient that is nothing but rounding (of a bias before a BatchNorm) agrees with no other.
    Infinite where something is not a number.
    """
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None and b.numel()]
    largest = [float(b.abs().max()) for _, b in pairs]
    differences = [
        float((a - b).abs().max()) / max(own + 0.01 * max(largest), 1e-30)
        for (a, b), own in zip(pairs, largest, strict=True)
    ]
    return max((d if math.isfinite(d) else math.inf for d in differences), default=0.0)


class PythonState:
    """What of Python's own state a step might change: a tape would not change it again."""

    def __init__(self, *objects: Any):
        self.objects = objects
        self.before = self._read()

    def changed(self) -> str:
        """What has changed since, or ""."""
        for name, value in self._read().items():
            if self.before.get(name, value) != value:
                return name
        return ""

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = {"Python's random numbers": hash(random.getstate())}
        if numpy := sys.modules.get("numpy"):
            kind, keys, *rest = numpy.random.get_state()
            found["NumPy's random numbers"] = (kind, keys.tobytes(), *rest)
        for number, thing in enumerate(self.objects):
            own_class = {} if type(thing).__module__.startswith("torch.") else vars(type(thing))
            for name, value in [*own_class.items(), *vars(thing).items()]:
                self._read_value(f"{type(thing).__name__}.{name}", number, value, found)
                plain = not isinstance(value, Tensor | nn.Module | type) and not callable(value)
                for inner, held in (getattr(value, "__dict__", {}) if plain else {}).items():  # such as a schedule's
                    self._read_value(f"{type(thing).__name__}.{name}.{inner}", number, held, found)
        return found

    @staticmethod
    def _read_value(name: str, number: int, value: Any, found: dict[str, Any]) -> None:
        """`number` tells apart modules of one class, of which `found` keeps the values by name."""
        if isinstance(value, bool | int | float | str | None):
            found.setdefault(name, {})[number] = value
        elif isinstance(value, list | dict | set | tuple):
            found.setdefault(name, {})[number] = (id(value), len(value))

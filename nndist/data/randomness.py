"""Random numbers per example: drawn from counters, or from generators that are seeded for each example.

What an example becomes is then a function of (seed, epoch, example), on any number of processes and worker processes,
and after a resume.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import random
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import PACKAGE

MOST_OBJECTS = 20_000  # searched for generators, the nearest first
MOST_ITEMS = 1000  # searched in one list or dict, which may be a folder's files
MANY_ITEMS = 100  # more are searched last: they are rather the examples than what changes them
MOST_PLAIN = 10_000_000  # parts of plain data that are told from others


class ExampleRandom:
    """Random numbers that are a pure function of (seed, epoch, example).

    An example is augmented identically on any number of processes, in any micro-batch, and after a resume. Numbers for
    a different `purpose` are independent. times: how often the epoch's order has had each example before, int64 [k],
    so that one that it repeats gets other numbers each time; None for never.
    """

    def __init__(self, seed: int, epoch: int, numbers: Tensor, purpose: str = "augment", times: Tensor | None = None):
        self.key = key_of(seed, epoch, purpose)
        self.numbers, self.times = numbers, times
        self.drawn = 0

    def uniform(self, count: int = 1) -> Tensor:
        """Uniform numbers in [0, 1), float32 [k, count], new at each call; on the device of the example numbers."""
        columns = torch.arange(self.drawn, self.drawn + count, device=self.numbers.device)
        self.drawn += count
        # splitmix64 (Steele, Lea and Flood 2014) of a counter; int64 arithmetic wraps as it needs
        x = self.numbers.unsqueeze(1) * 0x2545F4914F6CDD1D + columns * -0x61C8864680B583EB + self.key
        if self.times is not None:
            x = x + self.times.unsqueeze(1) * -0x3B314601E57A13AD
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            x = (x ^ _shift_right(x, shift)) * factor
        x = x ^ _shift_right(x, 31)
        return _shift_right(x, 40).to(torch.float32) * 2**-24

    def normal(self, count: int = 1) -> Tensor:
        """Normal numbers, mean 0 and standard deviation 1, float32 [k, count] (Box and Muller 1958)."""
        radius = (-2 * torch.log1p(-self.uniform(count))).sqrt()  # 1 - u lies in (0, 1]
        return radius * torch.cos(2 * math.pi * self.uniform(count))


def key_of(seed: int, epoch: int, purpose: str = "augment") -> int:
    """The key of an ExampleRandom for an epoch and purpose, a signed 64-bit integer."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def times_before(order: Tensor) -> Tensor | None:
    """How often an order has had each of its examples before, int64 of its length; None if it repeats none."""
    ordered, places = order.sort(stable=True)
    before = torch.arange(len(order)) - torch.searchsorted(ordered, ordered)  # from the first of the same
    return torch.empty_like(order).scatter_(0, places, before) if before.any() else None


def with_times(numbers: Tensor, times: Tensor | None) -> Tensor:
    """Example numbers that carry `times` (see ExampleRandom) to what reads them; sets of one's own see numbers."""
    if times is not None:
        numbers = numbers.view_as(numbers)  # of its own: the attribute is not the caller's tensor's
        numbers.times = times  # type: ignore[attr-defined]
    return numbers


def times_of(numbers: Tensor) -> Tensor | None:
    """The `times` that example numbers carry."""
    return getattr(numbers, "times", None)


class Repeat(int):
    """The number of an example that the epoch's order has had before. times: how often."""

    times: int

    def __repr__(self) -> str:
        return f"{int(self)}/{self.times}"


def drawn_of(numbers: Tensor, times: Tensor | None) -> list[int]:
    """Example numbers as a list, with a Repeat for each that was there before; as text they seed generators."""
    drawn: list[int] = numbers.tolist()
    for place, count in enumerate([] if times is None else times.tolist()):
        if count:
            drawn[place] = Repeat(drawn[place])
            drawn[place].times = count  # type: ignore[attr-defined]
    return drawn


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """A logical (unsigned) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Generators:
    """The generators that code may draw from: the global ones of Python, NumPy and torch (CPU), and its own.

    Its own are searched for in the attributes, containers, closures and modules of the named objects, such as a
    dataset. Other sources (the system's entropy, a library's generator in C) can't be seeded. Raises UserError for a
    generator found that can't be seeded, such as random.SystemRandom, and for objects that hold too many others.

    Measured on one core, NumPy 2.4 and torch 2.14: 15 us to seed the three global ones, 2 to 25 us for each custom one;
    0.2 ms to save and restore them.
    """

    def __init__(self, **holders: Any):
        found: dict[int, tuple[str, Any]] = {}  # by identity, with the first path that leads to it
        for name, generator in (*_of_the_process(), *_held(holders)):
            found.setdefault(id(generator), (name, generator))
        self._found = list(found.values())
        # salted by their paths: generators of one type would otherwise draw the same numbers
        self._seeders = [(_salt(name), _seeder(name, generator)) for name, generator in self._found]

    def same_as(self, other: Generators) -> bool:
        """Whether both hold the same generator objects."""
        return {id(generator) for _, generator in self._found} == {id(generator) for _, generator in other._found}

    def seed(self, what: str) -> None:
        """Seeds each generator by a text, independently of the others."""
        number = _salt(what)
        for salt, seed in self._seeders:
            seed(number ^ salt)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Context manager: restores the generators' states afterwards."""
        before = [_restorer(generator) for _, generator in self._found]
        try:
            yield
        finally:
            for restore in before:
                restore()


def _salt(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _of_the_process() -> Iterator[tuple[str, Any]]:
    yield "random", random.seed.__self__  # type: ignore[attr-defined]
    yield "torch", torch.default_generator
    if "numpy" in sys.modules:  # otherwise nothing draws from it
        import numpy.random  # it loads on first use, which must not be while an example is read

        yield "numpy", numpy.random.mtrand._rand


def _kinds() -> tuple[type, ...]:
    """The types of generators."""
    numpy_random = sys.modules.get("numpy.random")
    numpys = (numpy_random.RandomState, numpy_random.Generator, numpy_random.BitGenerator) if numpy_random else ()
    return (random.Random, torch.Generator, *numpys)


def _seeder(name: str, generator: Any) -> Callable[[int], None]:
    """A function that seeds a generator with an unsigned 64-bit integer."""
    if isinstance(generator, random.SystemRandom):
        raise UserError(
            f"{name}: a random.SystemRandom can't be seeded, so no run could be repeated or resumed; use a "
            "random.Random"
        )
    if isinstance(generator, random.Random):
        return generator.seed
    if isinstance(generator, torch.Generator):

        def seed_torch(number: int) -> None:
            generator.manual_seed(number)

        return seed_torch
    bits = _bit_generator(generator)
    if hasattr(generator, "seed") and type(bits).__name__ == "MT19937":  # a RandomState; 4x as fast as below
        return lambda number: generator.seed(number % 2**32)

    if _has_seed_sequence(bits):
        return lambda number: bits.__setstate__(type(bits)(number).__getstate__())

    def seed_bits(number: int) -> None:
        bits.state = type(bits)(number).state

    return seed_bits


def _restorer(generator: Any) -> Callable[[], None]:
    """A function that restores a generator's current state."""
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if hasattr(generator, "set_state"):  # torch's, and a RandomState
        return functools.partial(generator.set_state, generator.get_state())
    bits = _bit_generator(generator)
    if _has_seed_sequence(bits):
        return functools.partial(bits.__setstate__, bits.__getstate__())
    return functools.partial(setattr, bits, "state", bits.state)


def _has_seed_sequence(bits: Any) -> bool:
    """Whether a BitGenerator's pickled state has its SeedSequence, from which `spawn` takes children (NumPy 2)."""
    return isinstance(bits.__getstate__(), tuple)


def _bit_generator(generator: Any) -> Any:
    """The NumPy BitGenerator of a Generator, a RandomState or itself."""
    return getattr(generator, "bit_generator", getattr(generator, "_bit_generator", generator))


# The search for generators.

_CPU = torch.device("cpu")
_PLAIN = (str, bytes, bytearray, int, float, complex, type(None), Tensor, PurePath)
_CONTAINERS = {dict, list, tuple, set, frozenset, deque}


def _held(holders: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (path, generator) for every generator that the objects hold, the nearest first.

    Raises UserError if they hold more than MOST_OBJECTS, apart from those in long containers.
    """
    from torch.utils.data import get_worker_info

    kinds, in_loader = _kinds(), get_worker_info() is not None
    near, far = deque(holders.items()), deque[tuple[str, Any]]()
    plain = _Plain()
    seen: dict[int, Any] = {}  # keeps the objects alive: a new one could reuse the id of a freed one
    modules: set[str] = set()
    while near or far:
        waiting = near or far
        path, thing = waiting.popleft()
        if id(thing) in seen or plain(thing):
            continue
        if len(seen) >= MOST_OBJECTS:
            if waiting is far:
                return
            who = " and ".join(name for name, value in holders.items() if value is not None)
            raise UserError(
                f"{who}: holds more than {MOST_OBJECTS:,} objects, such as {path[:100]}, too many to search for random "
                "generators; keep its data in tensors, arrays, or lists and dicts of numbers and texts"
            )
        seen[id(thing)] = thing
        if isinstance(thing, kinds):
            if not (in_loader and getattr(thing, "device", _CPU).type != "cpu"):  # no forked process can use a GPU
                yield path, thing
            continue
        is_long = isinstance(thing, dict | list | tuple | set | frozenset | deque) and len(thing) > MANY_ITEMS
        (far if is_long else waiting).extend(_parts(path, thing))
        for kind in () if isinstance(thing, type) else type(thing).__mro__:
            if kind.__module__ in modules or kind.__module__.partition(".")[0] in ("builtins", "random", "torch"):
                continue
            modules.add(kind.__module__)
            for name, value in list(vars(sys.modules.get(kind.__module__, object)).items()):
                if isinstance(value, kinds) and not isinstance(value, random.SystemRandom):
                    yield f"{kind.__module__}.{name}", value


class _Plain:
    """Tells values that hold no generator: numbers, texts, tensors, and containers of nothing else, as annotations are.

    Of each container the same first items count as in the search. One that is not told from others is searched.
    """

    def __init__(self) -> None:
        numpy = sys.modules.get("numpy")
        self.types = {numpy.ndarray} if numpy else set[type]()  # those met so far; memmap, a subclass, has attributes
        self.bases = (*_PLAIN, numpy.generic) if numpy else _PLAIN
        self.left = MOST_PLAIN
        self.known: dict[int, Any] = {}  # kept alive, as what the search has seen

    def __call__(self, thing: Any) -> bool:
        if self.is_plain_type(type(thing)):
            return True
        waiting, met = [thing], dict[int, Any]()
        while waiting:
            container = waiting.pop()
            if type(container) not in _CONTAINERS:
                return False
            if id(container) in met or id(container) in self.known:
                continue
            met[id(container)] = container
            items = _items(container)
            self.left -= 1 + len(items)
            if self.left < 0:
                return False
            if others := {kind for kind in set(map(type, items)) if not self.is_plain_type(kind)}:
                if not others <= _CONTAINERS:
                    return False
                waiting.extend(item for item in items if type(item) in others)
        self.known.update(met)
        return True

    def is_plain_type(self, kind: type) -> bool:
        """Whether values of a type, which is no container, hold no generator."""
        if kind in self.types:
            return True
        if issubclass(kind, self.bases):
            self.types.add(kind)
            return True
        return False


def _items(container: Any) -> list[Any]:
    """The items of a container that are searched, of a dict its values."""
    return list(islice(container.values() if isinstance(container, dict) else container, MOST_ITEMS))


def _parts(path: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """Yields (path, part) for the parts of an object that the code it runs may draw from."""
    if isinstance(thing, dict):
        for key in list(thing)[:MOST_ITEMS]:
            yield f"{path}[{key!r}]", thing[key]
    if isinstance(thing, list | tuple | deque):
        for number, value in enumerate(_items(thing)):
            yield f"{path}[{number}]", value
    if isinstance(thing, set | frozenset):  # its order differs from process to process, so a number would be no name
        for value in _items(thing):
            yield f"{path}{{{type(value).__name__}}}", value
    if isinstance(thing, types.GeneratorType):
        if (frame := thing.gi_frame) is not None:  # else it has ended
            yield from ((f"{path}.{name}", value) for name, value in frame.f_locals.items())
            yield from _named(str(frame.f_globals.get("__name__")), thing.gi_code, frame.f_globals)
        return
    if isinstance(thing, types.ModuleType):
        yield from _parts_of_module(thing, {})
        return
    if isinstance(thing, functools.partial):
        yield from ((f"{path}.func", thing.func), (f"{path}.args", thing.args), (f"{path}.keywords", thing.keywords))
    if isinstance(thing, types.MethodType):
        yield from ((f"{path}.__self__", thing.__self__), (f"{path}.__func__", thing.__func__))
    if isinstance(thing, types.FunctionType):
        yield from _parts_of_function(path, thing)
        return
    if isinstance(thing, type):
        module = sys.modules.get(thing.__module__)
        if thing.__module__ == "__main__" or _is_users(getattr(module, "__file__", None)):
            for name, value in list(vars(thing).items()):
                value = getattr(value, "__func__", getattr(value, "fget", value))  # static and class methods, property
                yield f"{path}.{name}", value
        return
    for name, value in list(getattr(thing, "__dict__", {}).items()):
        yield f"{path}.{name}", value
    for kind in type(thing).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(thing, name):
                yield f"{path}.{name}", getattr(thing, name)
        yield f"{path}.__class__", kind


def _parts_of_function(path: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # still empty
            yield f"{path}.{name}", cell.cell_contents
    yield from ((f"{path}.__defaults__", function.__defaults__), (f"{path}.__kwdefaults__", function.__kwdefaults__))
    yield from _named(function.__module__, function.__code__, function.__globals__)


def _named(module: str, code: types.CodeType, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The global values that the user's code names; a library's code would lead to the entire library."""
    if not _is_users(code.co_filename):
        return
    names = dict.fromkeys(_names_in(code))
    for name in names:
        value = values.get(name, sys.modules.get(name))  # a module may be imported by the function itself
        if isinstance(value, types.ModuleType):
            yield from _parts_of_module(value, names)
        elif name in values:
            yield f"{module}.{name}", value


def _parts_of_module(module: types.ModuleType, names: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The generators of a module of the user's, and what else of it, or of modules in it, has one of the names."""
    kinds, modules, seen = _kinds(), [module], set[str]()
    while modules:
        module = modules.pop()
        if module.__name__ in seen or not _is_users(getattr(module, "__file__", None)):
            continue
        seen.add(module.__name__)
        for name, value in list(vars(module).items()):
            if name in names and isinstance(value, types.ModuleType):
                modules.append(value)
            elif name in names or (isinstance(value, kinds) and not isinstance(value, random.SystemRandom)):
                yield f"{module.__name__}.{name}", value


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


@functools.lru_cache(maxsize=1024)
def _is_users(file: str | None) -> bool:
    """Whether a source file is the user's and not a library's; a notebook's cells are the user's."""
    if not file or file.startswith("<frozen ") or {"site-packages", "dist-packages"} & set(PurePath(file).parts):
        return False
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return not file.startswith(tuple(path + os.sep for path in (*paths, str(PACKAGE))))

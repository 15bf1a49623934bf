"""A network layer by layer: what run.json and the report list, and what `--summary` prints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

MAX_LAYERS = 500  # of a network, that are listed
COLUMNS = 80  # of the summary, if names and shapes allow
SHORTEST, LONGEST = 16, 60  # characters of a layer's description

Outputs = dict[nn.Module, str]
"""The shape of each module's first output, such as "k x 16 x 14 x 14": k is the number of examples."""


def layers_of(networks: Mapping[str, nn.Module]) -> dict[str, list[list[Any]]]:
    """By network, for each module that has parameters of its own or no modules: name, description, parameters.

    Parameters are counted where they are first named, so that the counts add up for shared weights, too.
    """
    return {
        name: [[place, text, count] for place, text, count, _ in _rows(network)[:MAX_LAYERS]]
        for name, network in networks.items()
    }


def _rows(network: nn.Module) -> list[tuple[str, str, int, nn.Module]]:
    counted: set[int] = set()
    rows = []
    for name, module in network.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in counted]
        counted.update(map(id, own))
        is_leaf = next(module.children(), None) is None
        if own or is_leaf:
            rows.append((name or "(itself)", described(module, is_leaf), sum(map(Tensor.numel, own)), module))
    return rows


def described(module: nn.Module, is_leaf: bool) -> str:
    """A module on one line, such as "Conv2d(1, 16, kernel_size=(5, 5))"."""
    kind = type(module).__name__.removeprefix("FSDP")
    text = " ".join(f"{kind}({module.extra_repr()})".split()) if is_leaf else kind
    return shortened(text, LONGEST)


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


@contextlib.contextmanager
def noting_outputs(networks: Mapping[str, nn.Module], found: Outputs) -> Iterator[None]:
    """Context manager: records in `found` the shape of each module's first output.

    Not for a training: a hook keeps torch from its fused inference kernels, which round differently.
    """

    def note(module: nn.Module, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor) and module not in found:
            found[module] = " x ".join(["k", *map(str, first.shape[1:])]) if first.dim() else "1"

    handles = [module.register_forward_hook(note) for network in networks.values() for *_, module in _rows(network)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def summary(networks: Mapping[str, nn.Module], outputs: Outputs) -> str:
    """A table of each network, in lines: layer, output's shape, parameters; k is the number of examples."""
    parts = []
    for name, network in networks.items():
        rows = [(place, text, outputs.get(module, ""), f"{count:,}") for place, text, count, module in _rows(network)]
        total = f"{sum(parameter.numel() for parameter in network.parameters()):,}"
        table = [(name, "", "output", "parameters"), *rows, ("", "", "", total)]
        place_width, text_width, shape_width, count_width = (
            max(map(len, column)) for column in zip(*table, strict=True)
        )
        room = COLUMNS - place_width - shape_width - count_width - 6
        text_width = min(text_width, max(room, SHORTEST))
        parts += [
            f"{place:<{place_width}}  {shortened(text, text_width):<{text_width}}  {shape:<{shape_width}}  "
            f"{count:>{count_width}}"
            for place, text, shape, count in table
        ]
        parts.append("")
    return "\n".join(parts)

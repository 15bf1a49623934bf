"""Converts a file of torch.save to safetensors, in a process of its own: `python torch_weights.py IN OUT BYTES`.

The only place where a pickle is read. torch's `weights_only` builds nothing but tensors and plain containers; the
process may use at most BYTES of memory beyond what torch takes, and its parent ends it after a while. It prints one
line and exits with 3 if the file is refused. It imports nothing of nndist.
"""

import sys
from collections.abc import Iterator
from typing import Any

STATES = ("model", "state_dict", "model_state_dict", "net", "network", "module", "weights")
"""Where training programs keep a network's state in their checkpoints, the likeliest first."""


def main(source: str, target: str, most_bytes: int) -> None:
    """Writes the network's tensors of a file."""
    import torch
    from safetensors.torch import save_file

    limit_memory(most_bytes)
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            refuse("holds more than tensors and plain containers, which could run code as it is read, or is damaged")
        first = str(error).strip().splitlines() or [type(error).__name__]
        refuse(f"is not a file of torch.save, or is damaged ({first[0][:100]})")
    states = dict(states_of(found))
    if not states:
        refuse("holds no state_dict: a dict of tensors")
    place = next((name for name in STATES if name in states), max(states, key=lambda name: len(states[name])))
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in states[place].items()}
    try:
        save_file(tensors, target, metadata={"place": place})
    except Exception as error:
        refuse(f"its tensors can't be written as safetensors ({str(error)[:100]})")


def states_of(found: Any, place: str = "", depth: int = 2) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, tensors) of each dict of tensors; the file's own has the place ""."""
    import torch

    if isinstance(found, torch.Tensor) or not hasattr(found, "items"):
        return
    tensors = {
        str(name): value
        for name, value in found.items()
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized
    }
    if tensors:
        yield place, tensors
    for name, value in found.items() if depth else ():
        yield from states_of(value, str(name) if not place else f"{place}.{name}", depth - 1)


def limit_memory(most_bytes: int) -> None:
    """Lets this process have so much memory beyond what it has, on Linux; elsewhere it does nothing."""
    try:
        import resource
        from pathlib import Path

        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + most_bytes, now + most_bytes))
    except (ImportError, OSError, ValueError):
        pass


def refuse(reason: str) -> None:
    """Prints why the file is not converted, and exits."""
    print(reason, flush=True)
    sys.exit(3)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

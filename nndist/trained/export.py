"""Export a trained network to a file for other programs, kept only if its outputs there match."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.batches import tensors_of
from ..data.sets import Data
from ..errors import TrainingError, UserError
from ..files import replacing
from ..runs.checkpoint_writer import publish_file
from ..runs.reading import mapping
from ..training.evaluation import evaluating
from ..training.network_inputs import made_up
from .loaded_run import LoadedRun, WeightsName

Format = Literal["onnx", "torch-export", "safetensors"]
TRACED_WITH = 5  # examples: a batch of 1 would be traced as a constant size
COMPARED_ON = (1, 16)  # batch sizes

Answer = Callable[[tuple[Tensor, ...]], list[Tensor]]


def export(
    run: LoadedRun,
    to: Format,
    output: Path,
    *,
    network: str | None = None,
    weights: WeightsName = "auto",
    data_dir: Path | None = None,
    tolerance: float = 1e-4,
) -> list[str]:
    """Write a network of a run to a file; returns lines that say what was written and how its outputs compare.

    They are compared on real inputs in two batch sizes, neither of which it was traced with. `tolerance`: the largest
    difference, relative to the largest output. Raises TrainingError, leaving no file, if they differ by more, and
    UserError if the network can't be exported in this format.
    """
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    need(to)
    loaded = run.weights(weights)
    name = network or next(iter(loaded.networks))
    if name not in loaded.networks or (network is None and len(loaded.networks) > 1):
        which = f"--network {network}: no such network" if network else "--network: name one"
        raise UserError(f"{which}; {run.name} has {', '.join(loaded.networks)}")
    model = loaded.networks[name]
    given = given_to(run, loaded.networks, name, data_dir)
    with evaluating(loaded.networks):
        inputs = {size: given(size) for size in (TRACED_WITH, *COMPARED_ON)}
        expected = {size: answers(model(*inputs[size])) for size in COMPARED_ON}
        try:
            with replacing(output) as part:
                with quiet():
                    answer = write(run, name, model, to, part, inputs[TRACED_WITH])
                lines, worst = compared(expected, {size: answer(inputs[size]) for size in COMPARED_ON})
                if not worst <= tolerance:
                    raise TrainingError(
                        f"{output}: not written, its outputs differ by {worst:.1e} of the largest, more than "
                        f"--tolerance {tolerance:g}"
                    )
        except OSError as error:
            raise UserError(f"--output {output}: can't be written ({error.strerror or error})") from error
    shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} [batch{_sizes(t)}]" for t in inputs[TRACED_WITH])
    about = [
        f"run      {run.name}: {loaded.text}",
        *(f"note     {note}" for note in dict.fromkeys(run.notes)),
        f"network  {name}: {shapes} -> {', '.join(f'[batch{_sizes(t)}]' for t in expected[COMPARED_ON[0]])}",
    ]
    return [*about, *lines, f"file     {output} ({output.stat().st_size:,} bytes, {to})"]


def need(to: Format) -> None:
    """Raises UserError if the packages that a format needs are not installed."""
    missing = []
    for package in ("onnx", "onnxscript", "onnxruntime") if to == "onnx" else ():
        try:
            __import__(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise UserError(f"--to onnx: needs {', '.join(missing)}; pip install onnx onnxscript onnxruntime")


def given_to(
    run: LoadedRun, networks: dict[str, nn.Module], name: str, data_dir: Path | None
) -> Callable[[int], tuple[Tensor, ...]]:
    """A function from batch size to a network's inputs: the test set's first or, without it, made-up ones.

    Raises UserError if the data are not available and the run does not say what the network was called with.
    """
    try:
        data = run.data_at_hand(data_dir)
    except UserError as error:
        columns = run.about.get("columns")
        known = mapping(run.about.get("inputs")).get(name)
        if not known and (type(columns) is not int or len(networks) > 1):
            raise
        run.notes.append(f"the data are not available, so outputs for made-up numbers are compared ({error})")
        if known:
            return lambda size: made_up(known, size)
        return lambda size: (torch.rand((size, columns) if columns else (size,)),)
    return lambda size: inputs_of(run, networks, name, data, size)


def inputs_of(run: LoadedRun, networks: dict[str, nn.Module], name: str, data: Data, size: int) -> tuple[Tensor, ...]:
    """The network's inputs in its first call when the recipe scores the first test examples: tensors [size, ...]."""
    batch = data.inputs(data.test, 0, size)
    calls: list[tuple[Any, ...]] = []
    handle = networks[name].register_forward_pre_hook(lambda _, given: calls.append(given))
    try:
        with torch.random.fork_rng(devices=[]):
            run.recipe.score(networks, batch)
    finally:
        handle.remove()
    rows = min(size, len(data.test))
    given = calls[0] if calls else tuple(tensors_of(batch))[:1]
    if not given or not all(isinstance(value, Tensor) and value.dim() and len(value) == rows for value in given):
        raise UserError(f"network {name!r}: its inputs are not tensors of one row per example, so it can't be exported")
    return tuple(given)


def write(run: LoadedRun, name: str, model: nn.Module, to: Format, path: Path, inputs: tuple[Tensor, ...]) -> Answer:
    """Write the network; returns a function that computes its outputs from the written file."""
    if to == "safetensors":
        publish_file(path, model.state_dict())
        from safetensors.torch import load

        with torch.random.fork_rng(devices=[]):
            fresh = run.recipe.networks()[name]
        fresh.load_state_dict(load(path.read_bytes()))
        fresh.eval()
        return lambda given: answers(fresh(*given))
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in inputs)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel exists only in torch
    try:
        program = torch.export.export(model, inputs, dynamic_shapes=shapes)
        if to == "torch-export":
            torch.export.save(program, path)
        else:
            made = torch.onnx.export(program, dynamo=True, verbose=False)
            assert made is not None
            made.save(path, external_data=False)
    except OSError:
        raise
    except Exception as error:  # torch can't trace something
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if "onstraints violated" in reason:
            reason = "it treats the batch size as a constant (len(x) does; x.shape[0] does not)"
        raise UserError(f"network {name!r} can't be written as {to}: {reason[:300]}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    if to == "torch-export":
        reread = torch.export.load(path).module()
        return lambda given: answers(reread(*given))
    return onnx_answer(path)


def onnx_answer(path: Path) -> Answer:
    """A function that computes a file's outputs with onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def answer(given: tuple[Tensor, ...]) -> list[Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feeds)]

    return answer


def answers(output: Any) -> list[Tensor]:
    """The tensors in a network's output, flattened."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in answers(part)]


def compared(expected: dict[int, list[Tensor]], found: dict[int, list[Tensor]]) -> tuple[list[str], float]:
    """A line per batch size, and the largest relative difference; infinite for a wrong shape or number."""
    lines: list[str] = []
    worst = 0.0
    for size, ours in expected.items():
        theirs = found[size]
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            return lines, float("inf")
        pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True) if a.numel()]
        parts = [(float((a - b).abs().max()), float(a.abs().max().clamp_min(1e-12))) for a, b in pairs]
        gaps, scales = torch.tensor(parts or [(0.0, 1.0)], dtype=torch.float64).unbind(1)
        # torch keeps a nan that max() would pass over
        absolute, relative = float(gaps.max()), float((gaps / scales).max())
        worst = max(worst, relative) if relative == relative else float("inf")
        lines.append(
            f"parity   batch of {size}: largest difference {absolute:.1e}, {relative:.1e} of the largest output"
        )
    return lines, worst


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context manager: silences the progress output of torch's exporter; errors are raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _sizes(tensor: Tensor) -> str:
    return "".join(f", {size}" for size in tensor.shape[1:])

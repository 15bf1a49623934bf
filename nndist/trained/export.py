"""Export a trained network to a file for other programs, kept only if its outputs there match."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.batches import named_tensors, tensors_of
from ..data.sets import Data
from ..distributed.runtime import Runtime
from ..errors import TrainingError, UserError, first_line
from ..files import replacing
from ..recipe.contract import Recipe
from ..runs.checkpoint_writer import publish_file
from ..runs.random_state import repeatable
from ..runs.reading import mapping
from ..training.evaluation import evaluating
from ..training.network_inputs import made_up
from .loaded_run import LoadedRun, WeightsName

Format = Literal["onnx", "torch-export", "safetensors"]
TRACED_WITH = 5  # examples: a batch of 1 would be traced as a constant size
COMPARED_ON = (1, 16)  # batch sizes

Given = tuple[Any, ...]
"""A network's positional arguments: tensors [examples, ...], and None, numbers or strings between them."""
Answer = Callable[[Given], list[Tensor]]


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
    # before the first call: a network may change its buffers in each
    reset = repeatable({name: model}, torch.device("cpu"))
    with evaluating(loaded.networks):
        inputs = {size: given(size) for size in (TRACED_WITH, *COMPARED_ON)}
        outputs = {size: called(model, inputs[size], reset) for size in COMPARED_ON}
        example = outputs[COMPARED_ON[0]]
        if not answers(example):
            raise UserError(f"network {name!r} returns a {type(example).__name__} without tensors: not exported")
        expected = {size: answers(output) for size, output in outputs.items()}
        reset()
        try:
            with replacing(output) as part:
                with quiet():
                    answer = write(run, name, model, to, part, inputs[TRACED_WITH], example)
                lines, worst = compared(expected, {size: answer(inputs[size]) for size in COMPARED_ON})
                if not worst <= tolerance:
                    if draws_numbers(model, inputs[COMPARED_ON[-1]], reset):
                        raise TrainingError(
                            f"{output}: not written, the network draws random numbers in each call, so its outputs "
                            "can't be compared; draw none in evaluation mode (if self.training: ...)"
                        )
                    raise TrainingError(
                        f"{output}: not written, its outputs differ by {worst:.1e} of the largest, more than "
                        f"--tolerance {tolerance:g}"
                    )
        except OSError as error:
            raise UserError(f"--output {output}: can't be written ({error.strerror or error})") from error
        if draws_numbers(model, inputs[COMPARED_ON[-1]], reset):
            run.notes.append("the network draws random numbers in each call; they were the same here when compared")
    shapes = ", ".join(_text(t) for t in inputs[TRACED_WITH])
    made = [f"{'' if n[:1].isdigit() else n} [batch{_sizes(t)}]".lstrip() for n, t in named_tensors(example)]
    about = [
        f"run      {run.name}: {loaded.text}",
        *(f"note     {note}" for note in dict.fromkeys(run.notes)),
        f"network  {name}: {shapes} -> {', '.join(made)}",
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
) -> Callable[[int], Given]:
    """A function from batch size to a network's inputs: the test set's first or, without it, made-up ones.

    Raises UserError if the data are not available and the run does not say what the network was called with.
    """
    try:
        recipe, data = run.recipe_at_hand(data_dir)
    except UserError as error:
        columns = run.about.get("columns")
        known = mapping(run.about.get("inputs")).get(name)
        if not known and (type(columns) is not int or len(networks) > 1):
            raise
        run.notes.append(f"the data are not available, so outputs for made-up numbers are compared ({error})")
        if known:
            return lambda size: made_up(known, size)
        return lambda size: (torch.rand((size, columns) if columns else (size,)),)
    return lambda size: inputs_of(recipe, networks, name, data, size)


def inputs_of(recipe: Recipe, networks: dict[str, nn.Module], name: str, data: Data, size: int) -> Given:
    """The network's arguments in its first call when the recipe scores the first test examples."""
    batch = data.inputs(data.test, 0, size)
    calls: list[Given] = []

    def note(module: nn.Module, given: Given, named: dict[str, Any]) -> None:
        if not calls:
            calls.append(positional(name, module, given, named))

    handle = networks[name].register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.random.fork_rng(devices=[]):
            recipe.score(networks, batch)
    finally:
        handle.remove()
    rows = min(size, len(data.test))
    given = calls[0] if calls else tuple(tensors_of(batch))[:1]
    tensors = [value for value in given if isinstance(value, Tensor)]
    others = [value for value in given if not isinstance(value, Tensor | bool | int | float | str | None)]
    if not tensors or others or not all(value.dim() and len(value) == rows for value in tensors):
        raise UserError(f"network {name!r}: its inputs are not tensors of one row per example, so it can't be exported")
    return given


def positional(name: str, network: nn.Module, given: Given, named: Mapping[str, Any]) -> Given:
    """The arguments of a call of the network, all by position, with defaults between them.

    Raises UserError if one was given by a name and can't be given by position.
    """
    if not named:
        return given
    signature = inspect.signature(network.forward)
    bound = signature.bind(*given, **named)
    by_name = [
        key
        for key, parameter in signature.parameters.items()
        if key in bound.arguments and parameter.kind == parameter.KEYWORD_ONLY
    ]
    by_name += [
        key
        for kind, parameter in signature.parameters.items()
        if parameter.kind == parameter.VAR_KEYWORD
        for key in bound.arguments.get(kind, {})
    ]
    if by_name:
        raise UserError(
            f"network {name!r} is called with {', '.join(by_name)} by keyword only, but an exported network takes its "
            "inputs by position: let forward take them so"
        )
    last = max(place for place, key in enumerate(signature.parameters) if key in bound.arguments)
    bound.apply_defaults()
    in_order: list[Any] = []
    for key, parameter in list(signature.parameters.items())[: last + 1]:
        value = bound.arguments[key]
        in_order += value if parameter.kind == parameter.VAR_POSITIONAL else [value]
    return tuple(in_order)


def called(network: nn.Module, given: Given, reset: Callable[[], None]) -> Any:
    """The output of a call with the buffers and random numbers that `reset` sets."""
    reset()
    return network(*given)


def draws_numbers(network: nn.Module, given: Given, reset: Callable[[], None]) -> bool:
    """Whether outputs depend on random numbers: two calls of the same network differ."""
    first = called(network, given, reset)
    reset()
    Runtime.seed_all(1)
    second = network(*given)
    reset()
    pairs = zip(tensors_of(first), tensors_of(second), strict=True)
    return any(not torch.allclose(_real(a), _real(b), rtol=0, atol=0, equal_nan=True) for a, b in pairs)


class OfTensors(nn.Module):
    """A network whose outputs are a tuple of all tensors in its output: an exporter knows no classes of a recipe."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *given: Any) -> tuple[Tensor, ...]:
        return tuple(answers(self.network(*given)))


def write(run: LoadedRun, name: str, model: nn.Module, to: Format, path: Path, inputs: Given, output: Any) -> Answer:
    """Write the network; returns a function that computes its outputs from the written file.

    output: what it returned for other inputs.
    """
    if to == "safetensors":
        return write_safetensors(run, name, model, path)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel exists only in torch
    try:
        if not _is_plain(output, (list, tuple) if to == "onnx" else (list, tuple, dict)):
            model = OfTensors(model).eval()
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes(model, inputs))
        if to == "torch-export":
            torch.export.save(program, path)
        else:
            places = [place.replace(".", "_") for place, _ in named_tensors(output)]
            names = [f"output_{place}" if place[:1].isdigit() else place for place in places]
            made = torch.onnx.export(program, dynamo=True, verbose=False, output_names=names if all(names) else None)
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
        return module_answer(torch.export.load(path).module())
    return onnx_answer(path)


def dynamic_shapes(network: nn.Module, inputs: Given) -> Any:
    """The batch dimension of each input, as torch.export wants them: those of *arguments in a tuple of their own."""
    batch = torch.export.Dim("batch")
    shapes: list[Any] = [{0: batch} if isinstance(value, Tensor) else None for value in inputs]
    kinds = [parameter.kind for parameter in inspect.signature(network.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        shapes = [*shapes[:first], *([tuple(shapes[first:])] if shapes[first:] else [])]
    return tuple(shapes)


def write_safetensors(run: LoadedRun, name: str, model: nn.Module, path: Path) -> Answer:
    """Write the network's tensors; `write` for this format."""
    state = model.state_dict()
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if left_out := sorted(state.keys() - tensors.keys()):
        run.notes.append(
            f"the file holds tensors only: left out is {', '.join(left_out)}, what get_extra_state() returns"
        )
    publish_file(path, tensors)
    from safetensors.torch import load

    with torch.random.fork_rng(devices=[]):
        fresh = run.recipe.networks()[name]
    missing, unknown = fresh.load_state_dict(load(path.read_bytes()), strict=False)
    if wrong := [*({*missing} - {*left_out}), *unknown]:
        raise UserError(f"network {name!r}: networks() does not build it as it was trained: {wrong[0]} does not fit")
    return module_answer(fresh.eval())


def module_answer(network: nn.Module) -> Answer:
    """A function that computes a network's outputs, each time as in its first call."""
    reset = repeatable({"": network}, torch.device("cpu"))
    return lambda given: answers(called(network, given, reset))


def onnx_answer(path: Path) -> Answer:
    """A function that computes a file's outputs with onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own classes, for operators that it lacks
        raise UserError(f"--to onnx: onnxruntime can't read the file ({first_line(error)})") from error
    names = [entry.name for entry in session.get_inputs()]

    def answer(given: Given) -> list[Tensor]:
        tensors = [value for value in given if isinstance(value, Tensor)]
        feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        try:
            return [torch.from_numpy(array) for array in session.run(None, feeds)]
        except RuntimeError as error:  # such as for complex inputs
            raise UserError(f"--to onnx: onnxruntime can't run the file ({first_line(error)})") from error

    return answer


def answers(output: Any) -> list[Tensor]:
    """The tensors in a network's output, in order."""
    return list(tensors_of(output))


def compared(expected: dict[int, list[Tensor]], found: dict[int, list[Tensor]]) -> tuple[list[str], float]:
    """A line per batch size, and the largest relative difference; infinite for a wrong shape or number."""
    lines: list[str] = []
    worst = 0.0
    for size, ours in expected.items():
        theirs = found[size]
        if [t.shape for t in ours] != [t.shape for t in theirs]:
            return lines, float("inf")
        if any(a.is_complex() != b.is_complex() for a, b in zip(ours, theirs, strict=True)):
            return lines, float("inf")
        pairs = [(_real(a), _real(b)) for a, b in zip(ours, theirs, strict=True) if a.numel()]
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


def _is_plain(output: Any, containers: tuple[type, ...]) -> bool:
    """Whether an output consists of tensors in containers of exactly these types."""
    if type(output) not in containers:
        return isinstance(output, Tensor)
    return all(_is_plain(part, containers) for part in (output.values() if type(output) is dict else output))


def _real(tensor: Tensor) -> Tensor:
    """float64; of complex numbers both parts."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()


def _text(given: Any) -> str:
    if not isinstance(given, Tensor):
        return repr(given)
    return f"{str(given.dtype).removeprefix('torch.')} [batch{_sizes(given)}]"


def _sizes(tensor: Tensor) -> str:
    return "".join(f", {size}" for size in tensor.shape[1:])

"""All that is claimed of one GPU, measured in one call of less than 9 minutes: speed, whole trainings, and bits.

    pip install lightning && python tests/benchmarks/gpu.py --data-source mnist
    python tests/benchmarks/gpu.py --device cpu --quick        # the same code with a few steps: a rehearsal

One table is printed last, and kept with the versions as tests/benchmarks/results/<date>-<device>.json. Its parts:

- document 004's network by every way: its script as written (images scaled one by one), from whose steps
  and evaluations the 500 epochs are extrapolated; its loop on tensors that lie on the GPU, plain and with the network
  under torch.compile; Lightning; Accelerate's own loop; nndist by engine. The graph engine takes powers of two: K = 32
  stands for 26 steps a graph, and K = 128 for 234, an epoch, which it takes as 128 + 64 + 32 + 8 + 2;
- a CNN, an LSTM, a GAN and a GPT, eager against graph;
- whole trainings by nndist.train, on the wall's clock, without and with all that shows a run;
- whether two epochs by graphs give the bits of the same engine's eager steps, and how far they are from `--engine
  eager`, whose learning rate is no tensor.

Bars, on one H200: the whole of document 004 (117,500 steps, 25 evaluations of the training set, the best model kept;
the document took 71.9 minutes) in less than 10 s, better 5 s, at 97.8 to 98.1 % of the test set; mnist_cnn's 10 epochs
in less than 4 s; equal bits.

Each part is a process of its own, forked before there is a CUDA context (see parts.py). Times have the device waited
for at both ends, exclude what happens once, and are medians of rounds in which the ways take turns.

On a CPU there are no graphs: tapes stand in their place, and the figures mean nothing.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compare import Job, Way, accelerates_loop, endless, lightnings_loop, ours, plain_loop, raw_loop, sent
from parts import TROUBLES, Bench, Part, heading, line_of, run_parts
from torch.utils.data import DataLoader, Dataset

import nndist
import nndist.loop
from nndist.config import RunConfig
from nndist.datasets.mnist import load_digits
from nndist.errors import UserError
from nndist.graphs import CudaGraphs, GraphStep

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results"
EPOCHS, STEPS_PER_EPOCH, EVALUATIONS = 500, 235, 25  # of document 004
QUIET = {"progress": False, "figures": False, "report": False, "wandb": "off"}
SHOWN = {"progress": False, "figures": True, "report": True, "wandb": "offline"}


class GPUBench(Bench):
    """What the parts share: the device that is asked for, engines with settings of their own, and quiet trainings."""

    def __init__(self, part: Part, options: argparse.Namespace, rows: Path):
        super().__init__(part, options, rows)
        self.on_gpu = options.device == "cuda"
        torch.set_num_threads(1)

    def judge(self, met: bool) -> str:
        """The word for a bar; none where it isn't asked: for another device, or other digits."""
        asked = self.on_gpu and not self.options.quick and self.options.data_source == "mnist"
        return ("met" if met else "missed") if asked else ""

    def job(self, recipe: str) -> Job:
        return Job(recipe, self.options.data_source, threads=1, device=self.options.device)

    @contextlib.contextmanager
    def engines(self, **settings: int) -> Iterator[list[GraphStep]]:
        """Within it `--engine graph` has these settings, and tapes on a CPU; gives the graph engines that are made."""
        if self.on_gpu:
            graphs: Any = CudaGraphs
        else:
            sys.path.append(str(ROOT / "tests"))
            from workers.tapes import Tapes as graphs
        made: list[GraphStep] = []
        chosen = nndist.loop.engine_called

        def engine(*arguments: Any) -> GraphStep:
            step = GraphStep(*arguments, graphs=graphs)
            vars(step).update(settings)
            made.append(step)
            return step

        def called(name: Any, *given: Any, **named: Any) -> Any:
            return engine if name == "graph" else chosen(name, *given, **named)

        with mock.patch.object(nndist.loop, "engine_called", called):
            yield made

    def train(self, recipe: str, run: str, engine: str, shown: dict[str, Any], **fields: Any) -> nndist.Result:
        """nndist.train, whose output is kept back."""
        settings = {"run": run, "engine": engine, "runs_dir": self.folder, "cpu": not self.on_gpu, **shown, **fields}
        if not self.on_gpu:
            settings["threads"] = 1
        with (self.folder / "output.txt").open("a") as output, contextlib.redirect_stdout(output):
            return nndist.train(path_of(recipe), data_source=self.options.data_source, **settings)


def path_of(recipe: str) -> Path:
    return ROOT / f"recipes/{recipe}.py"


def said_of(engine: GraphStep) -> str:
    """What became of a graph engine, in a few words."""
    if engine.note or not engine._captured:
        return engine.note or "no graph was captured"
    most = max(captured.factors.numel() for captured in engine._captured.values())
    return f"{engine.num_compared} graph{'s' * (engine.num_compared > 1)}, of up to {most} step{'s' * (most > 1)}"


# The parts.


def environment(bench: GPUBench) -> None:
    """Says where all this takes place; without a device and data there is nothing to measure."""
    load_digits(RunConfig(data_source=bench.options.data_source, progress=False).data_config(download=True))
    if not bench.on_gpu:
        bench.add("cpu, not a GPU", note=f"{platform.machine()}, torch {torch.__version__}, one thread")
        return
    if not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU can be used here; --device cpu --quick rehearses without one")
    torch.ones(8, device="cuda").sum().item()
    properties = torch.cuda.get_device_properties(0)
    bench.add(
        properties.name,
        note=f"{properties.total_memory / 2**30:.0f} GiB, compute capability {properties.major}.{properties.minor}, "
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
        f"TF32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'} in matrix products",
    )


class AsWritten(Dataset):
    """Examples as torchvision's MNIST gives them with document 004's transforms: scaled one by one."""

    def __init__(self, job: Job):
        from PIL import Image
        from torchvision import transforms

        self.images, self.labels = (tensor.numpy() for tensor in job.raw_tensors[:2])
        self.to_image = Image.fromarray
        self.transform = transforms.Compose(
            [transforms.Grayscale(), transforms.ToTensor(), transforms.Normalize(mean=(0.5,), std=(0.5,))]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.to_image(self.images[number])), int(self.labels[number])


def document_004(bench: GPUBench) -> None:
    """Its script as written: some steps, some batches of an evaluation, and what the whole of it would take."""
    job = bench.job("mnist_mlp")
    size = job.recipe.batch_size
    batches = (
        [images.reshape(len(images), -1), labels]
        for images, labels in sent(job, endless(DataLoader(AsWritten(job), size, shuffle=True)))
    )
    network = job.network()
    step = plain_loop(job, network, batches, look=False)  # it looks at the loss once an epoch

    def evaluated(count: int) -> float:
        began = job.clock()
        for _ in range(count):
            images, labels = next(batches)
            predictions = network.forward(images).argmax(dim=1)
            (1.0 * torch.sum(predictions == labels.squeeze()).item()) / len(images)
        return (job.clock() - began) / count

    rounds, steps = (2, 2) if bench.options.quick else (5, 47)  # all batches but an epoch's last are whole
    step(1), evaluated(1)
    times = [(step(steps), evaluated(steps)) for _ in range(rounds)]
    taken, looked = (statistics.median(column) for column in zip(*times, strict=True))
    whole = STEPS_PER_EPOCH * (EPOCHS * taken + EVALUATIONS * looked) + 40 * looked  # the last of the test set
    bench.add(
        "document 004's script, as written",
        milliseconds=1e3 * taken,
        seconds=whole,
        note=f"extrapolated from {rounds * steps} steps and as many batches evaluated; the document: 71.9 minutes",
    )


def take_turns(
    bench: GPUBench,
    makers: dict[str, Callable[[], Way | None]],
    rounds: int,
    said: Callable[[str], str] = lambda name: "",
) -> None:
    """Times the ways, each in every round, and adds a row for each; a way that fails is left out from then on.

    said: what is to be noted of a way.
    """
    quick = bench.options.quick
    steps, rounds = (2, 1) if quick else (STEPS_PER_EPOCH, rounds)
    ways: dict[str, Way | None] = {}
    times: dict[str, list[float]] = {}

    def attempt(name: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except Exception as error:
            ways.pop(name, None)
            times.pop(name, None)
            bench.failed(name, error)
            return None

    for name, make in makers.items():
        ways[name], times[name] = None, []
        way = ways[name] = attempt(name, make)
        if way is None and times.pop(name, None) is not None:
            bench.add(name, note="left out: not installed")
        # graphs of an epoch's last batch, a smaller one, are captured after three of them
        for _ in range(0 if way is None else 1 if quick else 5 if "graph" in name else 2):
            if name in times:
                attempt(name, lambda way=way: way(5 if quick else steps))
    for _ in range(rounds):
        for name in list(times):
            found = attempt(name, lambda way=ways[name]: way(steps))
            if found is not None:
                times[name].append(found)
    first = times.get(next(iter(makers)))
    for name, taken in times.items():
        ratio = first and statistics.median(b / a for a, b in zip(first, taken, strict=True))
        bench.add(name, milliseconds=1e3 * statistics.median(taken), ratio=ratio, note=said(name))


def graph_ways(bench: GPUBench, job: Job, sizes: dict[int, str]) -> tuple[dict[str, Any], Callable[[str], str]]:
    """Makers of ours by engine, graphs of up to K steps, and a function that says what became of one."""
    made: dict[str, GraphStep] = {}

    def make(engine: str, name: str = "", most: int = 0) -> Way:
        # a record ends a graph: one an epoch for those that take all of it at once
        settings = {"log_every": STEPS_PER_EPOCH} if most > 50 else {}
        # the progress bars have their cost, and are not seen
        with bench.engines(MOST=most) as engines, contextlib.redirect_stderr(io.StringIO()):
            way = ours(job, bench.folder, engine, **settings)
        if engines:
            made[name] = engines[-1]
        return way

    makers: dict[str, Any] = {f"{job.name}, --engine eager": partial(make, "eager")}
    for most, meant in sizes.items():
        name = f"{job.name}, --engine graph, K = {most}{meant}"
        makers[name] = partial(make, "graph", name, most)
    return makers, lambda name: said_of(made[name]) if name in made else ""


def other_ways(bench: GPUBench) -> None:
    """Document 004's network by the ways that are not ours."""
    job = bench.job("mnist_mlp")
    backend = "eager" if bench.options.quick else "inductor"
    makers = {
        "its loop on tensors on the device": lambda: raw_loop(job),
        "Accelerate's own loop": lambda: accelerates_loop(job),
        "Lightning": lambda: lightnings_loop(job),
        f"its loop, torch.compile of the network ({backend})": lambda: raw_loop(
            job, lambda network: torch.compile(network, backend=backend)
        ),
    }
    take_turns(bench, makers, rounds=5)


def our_ways(bench: GPUBench) -> None:
    """Document 004's network by ours, and the raw loop once more for the ratio."""
    job = bench.job("mnist_mlp")
    makers, said = graph_ways(bench, job, {1: "", 32: " (for 26)", 128: " (for 234)"})
    if not bench.options.quick:
        makers[f"{job.name}, --engine compile"] = lambda: ours(job, bench.folder, "compile")
    take_turns(bench, {"its loop on tensors on the device": lambda: raw_loop(job), **makers}, 7, said)


def eager_and_graph(bench: GPUBench, recipe: str) -> None:
    """A recipe by both engines."""
    makers, said = graph_ways(bench, bench.job(recipe), {32: ""})
    take_turns(bench, makers, 5, said)


def whole(bench: GPUBench, recipe: str, shown: bool, bar: float, between: tuple[float, float] | None = None) -> None:
    """A whole training. bar: seconds. between: of the best model's test accuracy."""
    if bench.on_gpu:
        torch.ones(8, device="cuda").sum().item()  # the context is there; what the training needs besides is counted
    import accelerate  # noqa: F401

    fields: dict[str, Any] = {"epochs": 1, "max_steps": 11, "log_every": 8} if bench.options.quick else {}
    with bench.engines() as engines:
        began = time.perf_counter()
        result = bench.train(recipe, "whole", "graph", SHOWN if shown else QUIET, **fields)
        seconds = time.perf_counter() - began
    scores = result.best["scores"] if result.best is not None else result.scores
    accuracy = 100 * scores["test/accuracy"]
    evaluations = sum("test/accuracy" in record for record in result.history.records)
    memory = f", {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB at most" if bench.on_gpu else ""
    bench.add(
        f"{recipe}, {result.steps:,} steps, {evaluations} evaluation{'s' * (evaluations > 1)}{', with W&B' * shown}",
        milliseconds=1e3 * seconds / result.steps,
        seconds=seconds,
        note=f"test {accuracy:.2f} % ({result.data}); {said_of(engines[-1])}{memory}",
        bar=bench.judge(seconds < bar) if not shown else "",
    )
    if between is not None:
        low, high = between
        bench.add(
            f"{recipe}, best model's test accuracy",
            note=f"{accuracy:.3f} % where {low} to {high} % is right",
            bar=bench.judge(low <= accuracy <= high),
        )


def saved_tensors(result: nndist.Result) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint: weights, optimizer, random generators."""
    from safetensors.torch import load_file

    last = max((result.folder / "checkpoints").glob("step-*"))
    return {f"{file.stem}/{name}": t for file in last.glob("*.safetensors") for name, t in load_file(file).items()}


def differing(one: nndist.Result, other: nndist.Result) -> list[str]:
    """The names of what differs in any bit, records included."""
    a, b = saved_tensors(one), saved_tensors(other)
    names = [
        name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])
    ]
    for mine, others in zip(one.history.records, other.history.records, strict=True):
        names += [
            f"{key} at step {mine['step']}" for key in mine if key != "examples_per_second" and mine[key] != others[key]
        ]
    return names


def correctness(bench: GPUBench, recipe: str) -> None:
    """Two epochs by graphs against the same engine's eager steps, bit by bit, and against the eager engine."""
    fields: dict[str, Any] = {"epochs": 2, **({"max_steps": 12, "log_every": 6} if bench.options.quick else {})}

    def run(name: str, engine: str = "graph", **settings: Any) -> tuple[nndist.Result, Any]:
        own = {"WARM_UP": 10**9} if name.startswith("steps") else {}
        with bench.engines(**own) as engines:
            result = bench.train(recipe, name, engine, QUIET, **fields, **settings)
        return result, engines[-1] if engines else None

    graphs, engine = run("graphs")
    steps, _ = run("steps")
    off = differing(graphs, steps)
    how = ""
    if off and not engine.note:
        again, _ = run("steps-again")
        if not differing(steps, again):
            how = ", and eager steps do have the same bits each time"
        else:  # operations of this device don't
            graphs, engine = run("graphs-deterministic", deterministic=True)
            steps, _ = run("steps-deterministic", deterministic=True)
            off = differing(graphs, steps)
            how = ", all --deterministic: without it eager steps differ from themselves"
    replayed = not engine.note and engine.num_compared > 0
    found = f"{len(off)} differ, such as {min(off)}" if off else "all equal"
    bench.add(
        f"{recipe}: bits of the same engine's eager steps",
        note=f"{found}, after {graphs.steps:,} steps{how}; {said_of(engine)}",
        bar=bench.judge(replayed and not off),
    )
    eager, _ = run("eager", "eager")
    pairs = [
        (mine[name], other[name])
        for mine, other in zip(graphs.history.records, eager.history.records, strict=True)
        for name in mine
        if name.startswith("train/loss")
    ]
    first, *_ = apart = [abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in pairs]
    bench.add(
        f"{recipe}: losses beside --engine eager's",
        note=f"relative difference {first:.1g} in the first record (1e-3 is right), at most {max(apart):.1g} in all",
        bar=bench.judge(first <= 1e-3),
    )


def parts_of(quick: bool) -> list[Part]:
    """In the order of what matters: the last ones are left out where time is short."""
    compared = ["mnist_mlp", "mnist_cnn", "sum_mlp", "mnist_gan", "char_gpt", "mnist_rnn"]
    job = {"recipe": "mnist_mlp", "bar": 10.0, "between": (97.8, 98.1)}
    cnn = {"recipe": "mnist_cnn", "bar": 4.0}
    parts = [
        Part("environment", 60, environment),
        Part("whole", 60, whole, {**job, "shown": False}),
        Part("whole", 40, whole, {**cnn, "shown": False}),
        *(Part("bits", 90, correctness, {"recipe": recipe}) for recipe in (compared[:3:2] if quick else compared)),
        Part("004", 40, our_ways),
        Part("004", 40, document_004),
        Part("004", 90, other_ways),
        *(
            Part("networks", 45, eager_and_graph, {"recipe": recipe})
            for recipe in ("mnist_cnn", "mnist_rnn", "mnist_gan", "char_gpt")
        ),
        Part("shown", 60, whole, {**job, "shown": True}),
        Part("shown", 60, whole, {**cnn, "shown": True}),
    ]
    return parts[:-1] if quick else parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-source", default="sample", help="mnist: real MNIST, which the bars are about")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of each: shows that it runs, measures nothing"
    )
    parser.add_argument("--minutes", type=float, default=8.8, help="that it may take in all")
    parser.add_argument(
        "--only", nargs="+", choices=sorted({part.name for part in parts_of(False)}), help="these parts"
    )
    parser.add_argument("--to", type=Path, help="the file to keep the results in")
    parser.add_argument("--traceback", action="store_true", help="show Python's traceback of what fails")
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        print("error: --device cpu: gpu.py measures a GPU; give --quick too, to rehearse it", file=sys.stderr)
        sys.exit(2)
    # Read when CUDA starts. The first lets a process ask whether there is a GPU, and be forked; the second is what
    # torch takes for such GPUs anyway, and lets it compute deterministically.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    began = time.monotonic()
    rehearsal = (
        "" if options.device == "cuda" else "  [cpu, not a GPU: a rehearsal with tapes, its figures mean nothing]"
    )
    print(heading() + rehearsal, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = run_parts(parts_of(options.quick), options, Path(folder), GPUBench)
    device = rows[0].what
    if rows[0].note.startswith(TROUBLES):
        print(f"error: {rows[0].note.removeprefix('failed: ')}", file=sys.stderr)
        sys.exit(2)
    minutes = (time.monotonic() - began) / 60
    date = time.strftime("%Y-%m-%d")
    print(f"\n{heading()}\n" + "\n".join(map(line_of, rows)))
    judged = [row for row in rows if row.bar]
    missed = [f"{row.part}: {row.what}" for row in judged if row.bar == "missed"]
    troubles = [row for row in rows if row.note.startswith(TROUBLES)]
    print(
        f"\n{device}, {options.data_source}, {date}, {minutes:.1f} minutes; of {len(judged)} bars {len(missed)} missed"
        f"{': ' * bool(missed)}{'; '.join(missed)}; {len(troubles)} rows without a figure{rehearsal}"
    )
    to = options.to
    if to is None and options.device == "cuda" and not options.quick and not options.only:
        to = RESULTS / f"{date}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        about = {"device": device, "is_gpu": options.device == "cuda", "quick": options.quick, "date": date}
        about |= {"data_source": options.data_source, "torch": torch.__version__, "cuda": torch.version.cuda}
        about |= {"python": platform.python_version(), "minutes": round(minutes, 2)}
        to.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
        print(f"kept as {to}")


if __name__ == "__main__":
    main()

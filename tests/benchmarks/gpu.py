"""All that is claimed of one GPU, measured in one call of less than 9 minutes: places, bits, precision, speed.

    pip install lightning && python tests/benchmarks/gpu.py --data-source mnist
    python tests/benchmarks/gpu.py --device cpu --quick        # the same code with a few steps: a rehearsal

One table is printed last, and kept with the versions as tests/benchmarks/results/<date>-<device>.json. Each row is
printed, and with --to F.json kept in F.rows.jsonl, as soon as it is found. The parts, in the order of their worth:

- places: whether networks, optimizers, data and losses lie on the device;
- bits: whether a run that is stopped and resumed, --deterministic, ends in the bits of one that was not: a CNN, an
  LSTM, a GAN and a GPT;
- whole trainings by nndist.train, on the wall's clock;
- precision: bf16, and fp16 with its scaler, beside fp32;
- document 004's network by every way: its loop on tensors that lie on the GPU, plain and with the network under
  torch.compile; Lightning; Accelerate's own loop; nndist, and nndist --compile; and its script as written (images
  scaled one by one), from whose steps and evaluations the 500 epochs are extrapolated;
- a step of the CNN under each setting: --tf32, --channels-last, --no-cudnn-benchmark, --deterministic, bf16;
- a step of the CNN, the LSTM, the GAN and the GPT, as they are and under --compile;
- photographs from disk: batches copied beside the step or in its order, JPEG files decoded by workers or the device;
- the whole trainings again, with all that shows a run.

Bars, on one H200: the whole of document 004 (117,500 steps, 25 evaluations of the training set, the best model kept;
the document took 71.9 minutes) at 97.8 to 98.1 % of the test set; equal bits; a precision's accuracy within a point of
fp32's. Times are told and not judged.

Each part is a process of its own, forked before there is a CUDA context (see parts.py). Times have the device waited
for at both ends, exclude what happens once, and are medians of rounds in which the ways take turns.
"""

import argparse
import contextlib
import io
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compare import Job, Way, accelerates_loop, endless, lightnings_loop, ours, plain_loop, raw_loop, sent
from parts import TROUBLES, Bench, Part, heading, line_of, run_parts
from torch import nn
from torch.utils.data import DataLoader, Dataset

import nndist
from nndist.config import RunConfig
from nndist.data import sets
from nndist.data.transfer import NoStream
from nndist.datasets.mnist import load_digits
from nndist.distributed.runtime import Runtime
from nndist.errors import UserError
from nndist.recipe.loading import load_recipe
from nndist.training import compiling
from nndist.training.run import load_data
from nndist.training.trainer import Trainer

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path(__file__).parent / "results"
EPOCHS, STEPS_PER_EPOCH, EVALUATIONS = 500, 235, 25  # of document 004
FAMILIES = ("mnist_cnn", "mnist_rnn", "mnist_gan", "char_gpt")
QUIET = {"progress": False, "figures": False, "report": False, "wandb": "off"}
SHOWN = {"progress": False, "figures": True, "report": True, "wandb": "offline"}


class GPUBench(Bench):
    """What the parts share: the device that is asked for, and quiet trainings."""

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

    def compiled(self, network: nn.Module) -> nn.Module:
        """The network, to be compiled at its first call; in a rehearsal without what takes its time."""
        network.compile(backend="eager" if self.options.quick else "inductor")
        return network

    def compiling(self) -> dict[str, Any]:
        """The setting --compile; in a rehearsal without what takes its time."""
        if self.options.quick:
            mock.patch.object(compiling, "BACKEND", "eager").start()
        return {"compile": True}

    def clock(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def unevaluated(self) -> contextlib.AbstractContextManager[Any]:
        """Within it trainings only take steps."""
        return mock.patch.object(Trainer, "evaluate", lambda trainer, **_: trainer.log())

    def train(self, recipe: str, run: str, settings: Mapping[str, Any] = QUIET, **more: Any) -> nndist.Result:
        """nndist.train, whose output is kept back."""
        given: dict[str, Any] = {"run": run, "runs_dir": self.folder, "cpu": not self.on_gpu, **settings, **more}
        if not self.on_gpu:
            given["threads"] = 1
        with (self.folder / "output.txt").open("a") as output, contextlib.redirect_stdout(output):
            path = ROOT / f"recipes/{recipe}.py"
            return nndist.train(path, data_source=self.options.data_source, **given)


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


def places(bench: GPUBench, recipe: str) -> None:
    """Where everything lies after a step."""
    job = bench.job(recipe)
    trainer = Trainer(job.recipe, job.config, job.runtime, job.data)
    trainer.begin()
    (losses,) = [trainer.optimizer_step(batch) for batch, _ in zip(trainer.feed.epoch(0), range(1), strict=False)]
    found = {
        f"{name}.{key}": t for name, network in trainer.networks.items() for key, t in network.state_dict().items()
    }
    for name, optimizer in trainer.optimizers.items():
        states = enumerate(optimizer.state.values())
        # torch keeps the counter of an update that is not fused in the host's memory
        found |= {f"{name}'s {key} {n}": t for n, state in states for key, t in state.items() if t.dim()}
    found |= {f"data {n}": tensor for n, tensor in enumerate(trainer.data.train.tensors)}
    found |= {f"losses of {name}": loss for name, parts in losses.items() for loss in parts}
    away = sorted(name for name, tensor in found.items() if tensor.device.type != job.device.type)
    note = f"{len(away)} of {len(found)} elsewhere, such as {away[0]}" if away else f"all {len(found)} tensors"
    bench.add(f"{recipe}: on the device", note=note, bar=bench.judge(not away))


def saved_tensors(result: nndist.Result) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint: weights, optimizer, random generators."""
    from safetensors.torch import load_file

    last = max((result.folder / "checkpoints").glob("step-*"))
    return {f"{file.stem}/{name}": t for file in last.glob("*.safetensors") for name, t in load_file(file).items()}


def differing(one: nndist.Result, other: nndist.Result) -> list[str]:
    """The names of what differs in any bit."""
    a, b = saved_tensors(one), saved_tensors(other)
    return [n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n])]


def resumed(bench: GPUBench, recipe: str) -> None:
    """A run that is stopped in the midst of an epoch and resumed, against one that is not, bit by bit."""
    steps = 6 if bench.options.quick else 200
    with bench.unevaluated():
        whole = bench.train(recipe, "whole", max_steps=steps, deterministic=True)
        bench.train(recipe, "halves", max_steps=steps // 2 + 1, deterministic=True)
        off = differing(bench.train(recipe, "halves", max_steps=steps, deterministic=True), whole)
    found = f"{len(off)} differ, such as {min(off)}" if off else "all equal"
    bench.add(f"{recipe}: resumed", note=f"{found}, after {whole.steps:,} steps", bar=bench.judge(not off))


def precisions(bench: GPUBench) -> None:
    """Two epochs of the CNN in each number format."""
    fields: dict[str, Any] = {"epochs": 2, **({"max_steps": 11} if bench.options.quick else {})}
    right: dict[str, float] = {}
    for precision in ("fp32", "bf16", "fp16"):
        if precision == "fp16" and not bench.on_gpu:
            bench.add("mnist_cnn, fp16", note="not on a CPU")
            continue
        with contextlib.nullcontext() if not bench.options.quick else bench.unevaluated():
            result = bench.train("mnist_cnn", precision, precision=precision, **fields)
        right[precision] = 100 * result.scores.get("test/accuracy", math.nan)
        rates = [r["examples_per_second"] for r in result.history.records if "examples_per_second" in r]
        bench.add(
            f"mnist_cnn, {precision}",
            milliseconds=1e3 * bench.job("mnist_cnn").recipe.batch_size / statistics.median(rates),
            note=f"test {right[precision]:.2f} % after {result.steps:,} steps",
            bar=bench.judge(abs(right[precision] - right["fp32"]) < 1.0),
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
    steps: int = STEPS_PER_EPOCH,
) -> None:
    """Times the ways, each in every round, and adds a row for each; a way that fails is left out from then on."""
    quick = bench.options.quick
    steps, rounds = (2, 1) if quick else (steps, rounds)
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
        for _ in range(0 if way is None else 1 if quick else 2):  # to warm up
            if name in times:
                attempt(name, lambda way=way: way(steps))
    for _ in range(rounds):
        for name in list(times):
            found = attempt(name, lambda way=ways[name]: way(steps))
            if found is not None:
                times[name].append(found)
    first = times.get(next(iter(makers)))
    for name, taken in times.items():
        ratio = first and statistics.median(b / a for a, b in zip(first, taken, strict=True))
        bench.add(name, milliseconds=1e3 * statistics.median(taken), ratio=ratio)


def every_way(bench: GPUBench) -> None:
    """Document 004's network by all of them; ratios to the raw loop."""
    job = bench.job("mnist_mlp")
    take_turns(
        bench,
        {
            "its loop on tensors on the device": lambda: raw_loop(job),
            "nndist": lambda: our_way(bench, job),
            "nndist --compile": lambda: our_way(bench, job, **bench.compiling()),
            "its loop, torch.compile of the network": lambda: raw_loop(job, bench.compiled),
            "Accelerate's own loop": lambda: accelerates_loop(job),
            "Lightning": lambda: lightnings_loop(job),
        },
        rounds=5,
    )


def plain_and_compiled(bench: GPUBench, recipe: str) -> None:
    """A recipe's step, as it is and compiled."""
    makers = {recipe: {}, f"{recipe} --compile": bench.compiling()}
    take_turns(bench, {n: partial(our_way, bench, bench.job(recipe), **given) for n, given in makers.items()}, rounds=5)


def settings(bench: GPUBench) -> None:
    """A step of the CNN under each setting of a GPU's kernels, against none."""
    makers: dict[str, dict[str, Any]] = {
        "mnist_cnn": {},
        "mnist_cnn --tf32": {"tf32": True},
        "mnist_cnn --channels-last off": {"channels_last": "off"},
        "mnist_cnn --no-cudnn-benchmark": {"cudnn_benchmark": False},
        "mnist_cnn --deterministic": {"deterministic": True},
        "mnist_cnn --precision bf16": {"precision": "bf16"},
        "mnist_cnn --precision bf16 --tf32 --compile": {"precision": "bf16", "tf32": True, **bench.compiling()},
    }
    take_turns(
        bench, {n: partial(our_way, bench, bench.job("mnist_cnn"), **given) for n, given in makers.items()}, rounds=3
    )


def our_way(bench: GPUBench, job: Job, *, deterministic: bool = False, **given: Any) -> Way:
    """nndist under settings of a run; those that torch has once for all ways are set anew for each turn."""
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bars have their cost, and are not seen
        way = ours(job, bench.folder, **given)

    def turn(steps: int) -> float:
        tf32, torch.backends.cudnn.benchmark = given.get("tf32", False), given.get("cudnn_benchmark", not deterministic)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        torch.use_deterministic_algorithms(deterministic)
        try:
            return way(steps)
        finally:
            torch.use_deterministic_algorithms(False)

    return turn


def photographs(bench: GPUBench) -> None:
    """A step of imagenet_resnet on JPEG files of 500 x 375 pixels, by who decodes them and how they are copied."""
    quick = bench.options.quick
    count, size, workers = (24, 8, 1) if quick else (1024, 128, min(8, os.cpu_count() or 1))
    folder = bench.folder / "photographs"
    make_photographs(folder, count, quick)

    def way(decode_on: str, beside: bool) -> Way:
        recipe = load_recipe(ROOT / "recipes/imagenet_resnet.py")(
            images=folder, decode_on=decode_on, side=32 if quick else 224, batch_size=size
        )
        config = RunConfig(cpu=not bench.on_gpu, num_workers=workers, threads=1)
        runtime = Runtime(cpu=not bench.on_gpu, threads=1, cudnn_benchmark=True)
        trainer = Trainer(recipe, config, runtime, load_data(recipe, config, runtime))
        trainer.begin()
        trainer.last_step = trainer.evaluate_every = 10**9
        plain = NoStream(runtime.device, pinned=bench.on_gpu)

        def turn(steps: int) -> float:
            chosen = contextlib.nullcontext() if beside else mock.patch.object(sets, "copier", lambda *_: plain)
            with chosen:
                batches = (batch for epoch in range(10**9) for batch in trainer.feed.epoch(epoch))
                trainer.take_step(next(batches))  # workers are started
                began = bench.clock()
                for _ in range(steps):
                    trainer.take_step(next(batches))
                taken = (bench.clock() - began) / steps
                batches.close()
                return taken

        return turn

    take_turns(
        bench,
        {
            "decoded by workers, copied in order": lambda: way("workers", False),
            "decoded by workers, copied beside the step": lambda: way("workers", True),
            "decoded on the device": lambda: way("device", True),
        },
        rounds=2,
        steps=2 if quick else 30,
    )


def make_photographs(folder: Path, count: int, small: bool) -> None:
    """JPEG files of 8 classes, of which a fifth is to test."""
    import numpy as np
    from PIL import Image

    width, height = (50, 38) if small else (500, 375)
    draw = np.random.default_rng(0)
    kinds = [draw.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8) for _ in range(32)]
    for number in range(count + count // 4):
        place = folder / ("train" if number < count else "val") / f"class{number % 8}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(kinds[number % 32]).resize((width, height)).save(place / f"{number:05d}.JPEG", quality=90)


def whole(bench: GPUBench, recipe: str, shown: bool, between: tuple[float, float] | None = None) -> None:
    """A whole training. between: of the best model's test accuracy."""
    if bench.on_gpu:
        torch.ones(8, device="cuda").sum().item()  # the context is there; what the training needs besides is counted
    import accelerate  # noqa: F401

    fields: dict[str, Any] = {"epochs": 1, "max_steps": 11, "log_every": 8} if bench.options.quick else {}
    began = time.perf_counter()
    result = bench.train(recipe, "whole", SHOWN if shown else QUIET, **fields)
    seconds = time.perf_counter() - began
    scores = result.best["scores"] if result.best is not None else result.scores
    accuracy = 100 * scores["test/accuracy"]
    evaluations = sum("test/accuracy" in record for record in result.history.records)
    memory = f", {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB at most" if bench.on_gpu else ""
    bench.add(
        f"{recipe}, {result.steps:,} steps, {evaluations} evaluation{'s' * (evaluations > 1)}{', with W&B' * shown}",
        milliseconds=1e3 * seconds / result.steps,
        seconds=seconds,
        note=f"test {accuracy:.3f} % ({result.data}){memory}",
        bar=bench.judge(between[0] <= accuracy <= between[1]) if between else "",
    )


def parts_of(quick: bool) -> list[Part]:
    """In the order of what matters: the last ones are left out where time is short."""
    job = {"recipe": "mnist_mlp", "between": (97.8, 98.1)}
    cnn = {"recipe": "mnist_cnn"}
    parts = [
        Part("environment", 60, environment),
        *(Part("places", 45, places, {"recipe": recipe}) for recipe in ("mnist_cnn", "mnist_gan")),
        *(Part("bits", 60, resumed, {"recipe": recipe}) for recipe in FAMILIES),
        Part("whole", 60, whole, {**cnn, "shown": False}),
        Part("precision", 60, precisions),
        Part("004", 120, every_way),
        Part("004", 40, document_004),
        Part("whole", 150, whole, {**job, "shown": False}),
        Part("settings", 90, settings),
        *(Part("networks", 90, plain_and_compiled, {"recipe": recipe}) for recipe in FAMILIES),
        Part("photographs", 90, photographs),
        Part("shown", 60, whole, {**cnn, "shown": True}),
        Part("shown", 180, whole, {**job, "shown": True}),
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
    rehearsal = "" if options.device == "cuda" else "  [cpu, not a GPU: a rehearsal, its figures mean nothing]"
    print(heading() + rehearsal, flush=True)
    at_once = options.to and options.to.with_suffix(".rows.jsonl")
    if at_once:
        at_once.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = run_parts(parts_of(options.quick), options, Path(folder), GPUBench, at_once)
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

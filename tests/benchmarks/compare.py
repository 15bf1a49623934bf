"""Milliseconds per training step of four documented networks, by nndist and by the other ways that one would pick.

    python tests/benchmarks/compare.py                        # a few minutes; one thread
    pip install lightning && python tests/benchmarks/compare.py --data-source mnist --rounds 9

The ways take turns, round after round, in one process; a ratio is the median over the rounds of a way's time to the raw
loop's in the same round, so that a machine that is busy now and then moves it little. All take the same steps, in fp32:

- document's script: a DataLoader over examples that are scaled one by one, `loss.item()` at each step, layers in the
  document's order; for the sum of numbers, a batch drawn at each step;
- Lightning, Accelerate: their own loops, with a DataLoader over tensors in memory;
- raw loop: plain PyTorch on batches gathered by index from tensors in memory;
- by hand: the fastest that is known in plain PyTorch, in fp32 on a CPU (no records, no progress, this network only);
- nndist: the shared loop, with its records and its progress bar.

The table of tests/README.md is made by `--markdown`.
"""

import argparse
import contextlib
import io
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nndist.config import RunConfig
from nndist.data.sets import permutation
from nndist.distributed.runtime import Runtime
from nndist.recipe.loading import load_recipe
from nndist.runs.tracking import Tracker
from nndist.training.run import load_data
from nndist.training.trainer import Trainer

ROOT = Path(__file__).parent.parent.parent
NETWORKS = {"mnist_cnn": 6, "mnist_simple_cnn": 12, "mnist_mlp": 40, "sum_mlp": 400}  # steps of a turn
Way = Callable[[int], float]
"""Takes so many steps and gives the seconds of one."""


class Job:
    """One network with its data, which lies in the host's memory: what every way trains on `device`."""

    def __init__(self, name: str, source: str, threads: int, device: str = "cpu"):
        self.name, self.threads, self.device = name, threads, torch.device(device)
        self.recipe = load_recipe(ROOT / f"recipes/{name}.py")()
        self.config = RunConfig(data_source=source, threads=threads)  # type: ignore[arg-type]
        self.runtime = self.runtime_of("fp32")
        self.data = load_data(self.recipe, self.config, self.runtime)
        train: Any = self.data.train
        self.raw_tensors = train.tensors
        self.is_regression = name == "sum_mlp"

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The inputs and the targets of all examples."""
        return self.data.prepare(self.raw_tensors)[:2]

    def runtime_of(self, precision: str, **settings: Any) -> Runtime:
        return Runtime(threads=self.threads, precision=precision, cpu=self.device.type == "cpu", **settings)

    def clock(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def network(self, documents: bool = False) -> nn.Module:
        network = self.recipe.networks()["model"].to(self.device)
        if documents and self.name == "mnist_cnn":
            network.forward = lambda x: document_000(network, x)  # type: ignore[method-assign]
        return network

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.is_regression:
            return F.mse_loss(outputs, targets)
        return F.nll_loss(outputs, targets) if self.name == "mnist_mlp" else F.cross_entropy(outputs, targets)

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return self.recipe.optimizer("model", network)


def document_000(network: Any, x: torch.Tensor) -> torch.Tensor:
    """The CNN with ReLU before pooling and a log-softmax, as its document has it."""
    x = F.relu(network.conv2(F.relu(network.conv1(x))))
    x = network.dropout1(F.max_pool2d(x, 2)).flatten(1)
    return F.log_softmax(network.fc2(network.dropout2(F.relu(network.fc1(x)))), dim=1)


class OneByOne(Dataset):
    """Examples that are scaled when they are asked for, as torchvision's transforms do."""

    def __init__(self, job: Job):
        images, self.labels = job.raw_tensors[:2]
        self.images, self.flat = images.numpy(), job.name == "mnist_mlp"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        image = torch.from_numpy(self.images[number]).unsqueeze(0).to(torch.float32).div(255)
        image = image.sub_(torch.tensor([0.5]).view(-1, 1, 1)).div_(torch.tensor([0.5]).view(-1, 1, 1))
        return image.flatten() if self.flat else image, int(self.labels[number])


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def plain_loop(job: Job, network: nn.Module, batches: Iterator[Any], *, look: bool) -> Way:
    """The loop of PyTorch's tutorials; `look`: at the loss, at each step."""
    optimizer = job.optimizer(network)

    def turn(steps: int) -> float:
        began = job.clock()
        for _ in range(steps):
            inputs, targets, *_ = next(batches)
            optimizer.zero_grad()
            loss = job.loss(network(inputs), targets)
            loss.backward()
            optimizer.step()
            if look:
                loss.item()
        return (job.clock() - began) / steps

    return turn


def documents_script(job: Job) -> Way:
    """The loop as it is written, each batch made by the host."""

    def drawn() -> Iterator[Any]:
        while True:
            numbers = torch.randint(101, (job.recipe.batch_size, 30)).float() / 100
            yield numbers, numbers.sum(1, keepdim=True)

    one_by_one = None if job.is_regression else DataLoader(OneByOne(job), job.recipe.batch_size, shuffle=True)
    batches = drawn() if one_by_one is None else endless(one_by_one)
    return plain_loop(job, job.network(documents=True), sent(job, batches), look=True)


def sent(job: Job, batches: Iterator[Any]) -> Iterator[Any]:
    """Batches of the host, each sent to the device when it is needed."""
    return ([tensor.to(job.device) for tensor in batch] for batch in batches)


def loader_of(job: Job) -> DataLoader:
    return DataLoader(TensorDataset(*job.tensors), job.recipe.batch_size, shuffle=True)


def accelerates_loop(job: Job) -> Way:
    accelerator = job.runtime.accelerator
    network = job.network()
    network, optimizer, loader = accelerator.prepare(network, job.optimizer(network), loader_of(job))
    batches = endless(loader)

    def turn(steps: int) -> float:
        began = job.clock()
        for _ in range(steps):
            inputs, targets = next(batches)
            optimizer.zero_grad()
            accelerator.backward(job.loss(network(inputs), targets))
            optimizer.step()
        return (job.clock() - began) / steps

    return turn


def lightnings_loop(job: Job) -> Way | None:
    try:
        import lightning
    except ImportError:
        return None
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = job.network()
            self.times: list[float] = []

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            loss = job.loss(self.network(batch[0]), batch[1])
            self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.optimizer(self.network)

        def on_train_batch_start(self, batch: Any, number: int) -> None:
            if self.global_step in (0, self.trainer.max_steps - 1):
                self.times.append(job.clock())

    module = Module()

    def turn(steps: int) -> float:
        module.times.clear()
        with (
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(
                max_steps=steps + 1,
                accelerator="cpu" if job.device.type == "cpu" else "gpu",
                devices=1,
                default_root_dir=folder,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
            )
            with contextlib.redirect_stdout(io.StringIO()):
                trainer.fit(module, loader_of(job))
        began, ended = module.times
        return (ended - began) / steps

    return turn


def raw_loop(job: Job, compiled: Callable[[Any], Any] = lambda network: network) -> Way:
    """Plain PyTorch on tensors that lie on the device; `compiled` makes of the network what is trained."""
    tensors = [tensor.to(job.device) for tensor in job.raw_tensors]
    order = endless(permutation(len(tensors[0]), 0, 0).to(job.device).split(job.recipe.batch_size))
    batches = (job.data.prepare(tuple([t.index_select(0, index) for t in tensors])) for index in order)
    return plain_loop(job, compiled(job.network()), batches, look=False)


def by_hand(job: Job) -> Way:
    """All that is known to help in plain PyTorch on a CPU: channels last for convolutions, else a compiled function."""
    tensors = [tensor.to(job.device) for tensor in job.raw_tensors]
    order = endless(permutation(len(tensors[0]), 0, 0).to(job.device).split(job.recipe.batch_size))
    network = job.network()
    if any(isinstance(module, nn.Conv2d) for module in network.modules()):
        batches = (job.data.prepare(tuple([t.index_select(0, index) for t in tensors])) for index in order)
        return plain_loop(job, network.to(memory_format=torch.channels_last), batches, look=False)
    settings = job.optimizer(network).defaults
    State = tuple[dict[str, torch.Tensor], ...]
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    is_adam = "betas" in settings
    moments = [{name: torch.zeros_like(value) for name, value in parameters.items()} for _ in range(2 * is_adam)]
    state: State = (parameters, *moments)
    taken = torch.zeros(())

    def step(state: State, taken: torch.Tensor, *raw: torch.Tensor) -> State:
        inputs, targets, *_ = job.data.prepare(raw)
        parameters = state[0]

        def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
            return job.loss(torch.func.functional_call(network, given, (inputs,)), targets)

        found, lr = torch.func.grad(loss)(parameters), settings["lr"]
        if not is_adam:
            return ({name: value - lr * found[name] for name, value in parameters.items()},)
        (b1, b2), taken = settings["betas"], taken + 1
        first = {name: b1 * value + (1 - b1) * found[name] for name, value in state[1].items()}
        second = {name: b2 * value + (1 - b2) * found[name].square() for name, value in state[2].items()}
        roots = {name: (value / (1 - b2**taken)).sqrt() + settings["eps"] for name, value in second.items()}
        moved = {n: value - lr / (1 - b1**taken) * first[n] / roots[n] for n, value in parameters.items()}
        return moved, first, second

    compiled = torch.compile(step)

    def turn(steps: int) -> float:
        nonlocal state
        began = job.clock()
        for _ in range(steps):
            index = next(order)
            state = compiled(state, taken, *[t.index_select(0, index) for t in tensors])
            taken.add_(1)
        return (job.clock() - began) / steps

    return turn


def ours(job: Job, folder: Path, precision: str = "fp32", **settings: Any) -> Way:
    """The shared loop. settings: of the run, such as compile=True."""
    config = RunConfig(**{**vars(job.config), "precision": precision, **settings})
    kernels = {name: value for name, value in settings.items() if name in ("tf32", "cudnn_benchmark")}
    runtime = job.runtime if precision == "fp32" and not kernels else job.runtime_of(precision, **kernels)
    trainer = Trainer(job.recipe, config, runtime, job.data)
    trainer.begin()
    place = Path(tempfile.mkdtemp(dir=folder, prefix=f"{job.name}-{precision}-"))
    trainer.tracker = Tracker(place, title=job.name, steps=10**9, progress=True)
    trainer.last_step = trainer.evaluate_every = 10**9
    batches = (batch for epoch in range(10**9) for batch in trainer.feed.epoch(epoch))

    def turn(steps: int) -> float:
        began = job.clock()
        for _ in range(steps):
            trainer.take_step(next(batches))
        trainer.log()
        return (job.clock() - began) / steps

    return turn


def has_bf16() -> bool:
    """Whether this CPU computes in bf16."""
    with contextlib.suppress(OSError):
        return any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16"))
    return False


def ways_of(job: Job, folder: Path) -> dict[str, Way | None]:
    """Every way to train, None where it can't be had here."""
    ways: dict[str, Way | None] = {
        "document's script": documents_script(job),
        "Lightning": lightnings_loop(job),
        "Accelerate": accelerates_loop(job),
        "raw loop": raw_loop(job),
        "by hand": by_hand(job) if job.device.type == "cpu" else None,
        "nndist": ours(job, folder),
    }
    if has_bf16() and not job.is_regression:
        ways["nndist --precision bf16"] = ours(job, folder, "bf16")
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-source", default="sample")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--markdown", action="store_true", help="print the table of tests/README.md")
    options = parser.parse_args()
    medians: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            job = Job(name, options.data_source, options.threads)
            ways = ways_of(job, Path(folder))
            times: dict[str, list[float]] = {way: [] for way in ways}
            for number in range(options.rounds + 1):
                for way, turn in ways.items():
                    if turn is not None:
                        torch.set_num_threads(options.threads)
                        times[way].append(turn(NETWORKS[name]))
                print(f"\r{name}: round {number} of {options.rounds}", end="", flush=True)
            print()
            for way, taken in times.items():
                if taken[1:]:  # the first round warms up
                    ratios = [a / b for a, b in zip(taken[1:], times["raw loop"][1:], strict=True)]
                    medians.setdefault(way, {})[name] = (1e3 * statistics.median(taken[1:]), statistics.median(ratios))
    bar = "|" if options.markdown else ""
    rows = [["ms per step (ratio to the raw loop)", *options.networks]]
    for way, found in medians.items():
        cells = [found.get(name) for name in options.networks]
        rows.append([way, *(f"{cell[0]:.2f} ({cell[1]:.2f})" if cell else "" for cell in cells)])
    if options.markdown:
        rows.insert(1, ["---"] * len(rows[0]))
    for row in rows:
        print(bar, f"{row[0]:<36}", bar, f" {bar} ".join(f"{cell:>18}" for cell in row[1:]), bar)
    print(
        f"\n{platform.machine()}, {options.threads} thread(s), {options.data_source}, torch {torch.__version__}, "
        f"medians of {options.rounds} rounds, {time.strftime('%Y-%m-%d')}"
    )


if __name__ == "__main__":
    main()

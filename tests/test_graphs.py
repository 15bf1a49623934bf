"""Steps that are recorded as graphs: planning, places and fall-back, with a tape in the place of a CUDA graph."""

import contextlib
import gc
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from making import make
from test_engines import Counting, Everything, Hooked, Looks, assert_same_state, assert_same_training, with_module
from toys import Line
from workers.tapes import Tapes

import nndist
import nndist.loop
from nndist.data import Data, Feed, Resident
from nndist.errors import TrainingError
from nndist.graphs import CudaGraphs, GraphStep

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def engines(monkeypatch):
    """Has --engine graph use tapes on the CPU; the engines that were made."""
    made = []

    def engine(*arguments):
        made.append(GraphStep(*arguments, graphs=Tapes))
        return made[-1]

    chosen = nndist.loop.engine_called
    monkeypatch.setattr(
        nndist.loop, "engine_called", lambda name, *r, **k: engine if name == "graph" else chosen(name, *r, **k)
    )
    return made


@pytest.fixture
def train(tmp_path, engines):
    """nndist.train into a folder of the test, quietly."""

    def call(recipe, engine, **settings):
        made = {"runs_dir": tmp_path, "run": engine, "progress": False, "figures": False, "threads": 1}
        return nndist.train(recipe, engine=engine, wandb="off", report=False, **{**made, **settings})

    return call


def reference(train, recipe, monkeypatch, **settings):
    """The same training, each step eager, with the learning rates and kernels that replays need."""
    with monkeypatch.context() as patch:
        patch.setattr(GraphStep, "WARM_UP", 10**9)
        return train(recipe, "graph", run="reference", **settings)


@dataclass(kw_only=True)
class AllOfIt(Everything):
    """Dropout, BatchNorm, clipping, momentum, tied weights, weighted losses, a schedule, and random augmentation."""

    ema_decay: float | None = None
    schedule: str = "cosine"

    def data(self, config):
        data = super().data(config)

        def augment(batch, random):
            return batch[0] + 0.1 * random.normal(4), batch[1]

        return Data(train=data.train, test=data.test, augment=augment)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        (AllOfIt(epochs=12, batch_size=4), {}),
        (AllOfIt(epochs=12, batch_size=4), {"log_every": 24}),
        (AllOfIt(epochs=12, batch_size=4), {"accumulate": 2}),
        (AllOfIt(epochs=8, batch_size=4), {"precision": "bf16"}),
        (Everything(epochs=8), {}),  # with a moving average
    ],
    ids=["all", "records", "accumulate", "bf16", "average"],
)
def test_a_training_by_graphs_has_the_eager_ones_bits(train, engines, monkeypatch, recipe, settings):
    graphs = train(recipe, "graph", **settings)
    engine = engines[-1]
    assert engine.note == "" and engine.num_compared == engine.graphs.captured > 0
    expected = reference(train, recipe, monkeypatch, **settings)
    assert not engines[-1].graphs.captured
    assert_same_training(graphs, expected)
    if "log_every" in settings:
        assert engine.graphs.replays < graphs.steps / 4


@pytest.mark.parametrize("recipe", ["sum_mlp", "mnist_simple_cnn", "mnist_gan", "char_gpt", "date_transformer"])
def test_recipes_of_every_kind_are_replayed(train, engines, monkeypatch, recipe):
    made = make(recipe, batch_size=8, evaluate_every="100 steps")
    monkeypatch.setattr(nndist.loop.Trainer, "evaluate", lambda trainer: trainer.log())
    settings = {"max_steps": 12, "data_source": "sample", "log_every": 4, "eval_batch_size": 4000}
    graphs = train(made, "graph", **settings)
    assert engines[-1].note == "" and engines[-1].num_compared
    assert_same_training(graphs, reference(train, made, monkeypatch, **settings))


def test_it_goes_on_with_the_same_bits_and_another_engine_may_too(train, engines):
    recipe = AllOfIt(epochs=10, batch_size=4)
    whole = train(recipe, "graph")
    train(recipe, "graph", run="halves", max_steps=97)
    assert_same_state(train(recipe, "graph", run="halves"), whole)
    other = train(recipe, "eager", run="other", max_steps=97)
    assert engines[-1].graphs.captured and other.steps == 97
    assert train(recipe, "graph", run="other").steps == whole.steps  # counters and learning rates find their places
    assert train(recipe, "eager", run="halves", epochs=10).steps == whole.steps


def test_the_engine_agrees_with_the_eager_one_up_to_rounding(train):
    """Which has its learning rate in Python, where it is a float64."""
    recipe = AllOfIt(epochs=4)
    ours, theirs = train(recipe, "graph"), train(recipe, "eager")
    for mine, other in zip(ours.history.records, theirs.history.records, strict=True):
        for name in mine.keys() - {"examples_per_second", "data"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Counting, "a step changes Counting.calls"),
        (Looks, "Python looks at a tensor's value"),
        (Hooked, "the network has hooks"),
    ],
)
def test_what_a_graph_can_not_repeat_is_run_eagerly_and_said(train, engines, capsys, monkeypatch, module, reason):
    recipe = with_module(module)()
    graphs = train(recipe, "graph")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("engine")]
    assert sum(reason in line for line in said) == 1, said
    assert not engines[-1].graphs.replays
    assert_same_training(graphs, reference(train, recipe, monkeypatch))


def test_an_optimizer_that_looks_at_values_is_run_eagerly(train, engines, capsys):
    @dataclass(kw_only=True)
    class Other(Line):
        """An optimizer that can't be captured."""

        def optimizer(self, name, network):
            return torch.optim.Adafactor(network.parameters(), lr=self.lr)

    graphs = train(Other(), "graph")
    assert "steps run eagerly (the optimizer of model, Adafactor, looks at values" in capsys.readouterr().out
    assert_same_training(graphs, train(Other(), "eager"))


def test_a_graph_that_does_something_else_is_not_used(train, engines, capsys, monkeypatch):
    """A capture that fails silently: the comparison finds it, and no step is lost."""

    class Wrong(Tapes):
        def capture(self, function):
            super().capture(function)
            return lambda: None

    monkeypatch.setitem(globals(), "Tapes", Wrong)
    recipe = AllOfIt()
    graphs = train(recipe, "graph")
    assert "steps run eagerly (a replay does not give the recipe's bits)" in capsys.readouterr().out
    assert_same_training(graphs, reference(train, recipe, monkeypatch))


def test_a_capture_that_fails_is_reported_by_what_went_wrong_first(train, engines, capsys, monkeypatch):
    """CUDA then refuses to end the capture as well, and torch raises that."""

    class Failing(Tapes):
        def capture(self, function):
            try:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with ...")
            except RuntimeError:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904

    monkeypatch.setitem(globals(), "Tapes", Failing)
    train(AllOfIt(), "graph")
    said = capsys.readouterr().out
    assert "steps run eagerly (CUDA error: operation not permitted when stream is capturing)" in said


def test_nothing_is_collected_during_a_capture(monkeypatch):
    """A graph that is collected would spoil it; here without a GPU."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", lambda *arguments, **named: contextlib.nullcontext())
    graphs = CudaGraphs.__new__(CudaGraphs)
    graphs.pool = graphs.stream = None
    collects = []
    assert graphs.capture(lambda: collects.append(gc.isenabled())) == "replay"
    with pytest.raises(ZeroDivisionError):
        graphs.capture(lambda: 1 / 0)
    assert collects == [False] and gc.isenabled()


def test_the_first_loss_that_is_not_finite_is_named_among_steps_taken_together(train, engines):
    @dataclass(kw_only=True)
    class Breaks(Line):
        """One example whose target is infinite."""

        shuffle: bool = False

        def data(self, config):
            x = torch.rand(100, 4, generator=torch.Generator().manual_seed(0))
            y = x.sum(1, keepdim=True)
            y[75] = torch.inf
            return Data(train=Resident(x, y), test=Resident(x[:30], x[:30].sum(1, keepdim=True)))

    with pytest.raises(TrainingError, match=r"not finite at step 38 of 150, training example 75;"):
        train(Breaks(batch_size=2), "graph", log_every=8)
    assert max(captured.factors.numel() for captured in engines[-1]._captured.values()) > 1


@pytest.mark.parametrize("most", [1, 4, 32])
@pytest.mark.parametrize(("log_every", "evaluate_every", "last"), [(50, 234, 1000), (7, 30, 95), (1, 10, 40)])
def test_steps_are_taken_together_only_up_to_what_is_due(most, log_every, evaluate_every, last):
    """A table test of the plan: every step once, in order, in powers of two, and none across a record or an epoch."""
    feed = Feed(Resident(torch.arange(1003)), batch_size=10, seed=0)
    trainer = nndist.loop.Trainer.__new__(nndist.loop.Trainer)
    trainer.log_every, trainer.evaluate_every, trainer.save_steps = log_every, evaluate_every, None
    trainer.last_step, trainer.step = last, 0
    trainer.recipe = Line()
    engine = GraphStep.__new__(GraphStep)
    engine.MOST, engine._eager_from_now_on, engine._steps_of = most, False, {"any": 3}
    trainer.engine = engine
    epoch = 0
    while trainer.step < last:
        for batch in feed.epoch(epoch, 0, trainer.at_once):
            assert batch.steps & (batch.steps - 1) == 0 and batch.steps <= most
            (micro,) = batch.micro_batches
            expected = [feed.example_numbers(epoch, batch.index + n) for n in range(batch.steps)]
            assert torch.equal(micro.raw[0], torch.cat(expected)) and torch.equal(micro.numbers, torch.cat(expected))
            assert batch.size == len(expected[0]) == len(expected[-1])
            begun, trainer.step = trainer.step, trainer.step + batch.steps
            for every in (log_every, evaluate_every):
                assert begun // every == (trainer.step - 1) // every
            if trainer.step == last:
                return
        epoch += 1


def test_graphs_are_refused_without_a_gpu(tmp_path):
    with pytest.raises(nndist.UserError, match="--engine graph: serves GPUs, and this is cpu; use --engine eager"):
        nndist.train(Line(), engine="graph", runs_dir=tmp_path)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("recipe", ["mnist_mlp", "mnist_simple_cnn", "sum_mlp", "mnist_gan", "char_gpt"])
def test_cuda_graphs_and_eager_steps_agree_in_every_bit(tmp_path, monkeypatch, recipe):
    """After two epochs, with the same optimizer."""
    made = make(recipe, epochs=2)
    quiet = {"runs_dir": tmp_path, "progress": False, "figures": False, "report": False, "wandb": "off"}
    run = partial(nndist.train, made, engine="graph", data_source="sample", **quiet)
    graphs = run(run="graphs")
    monkeypatch.setattr(GraphStep, "WARM_UP", 10**9)
    assert_same_training(graphs, run(run="eager"))


@pytest.mark.gpu
@needs_gpu
def test_a_compiled_step_on_a_gpu_agrees_up_to_rounding(tmp_path):
    """As it does on a CPU (test_engines)."""
    quiet = {"runs_dir": tmp_path, "progress": False, "figures": False, "report": False, "wandb": "off"}
    made = partial(nndist.train, make("mnist_mlp", epochs=1), data_source="sample", **quiet)
    compiled, eager = made(run="compiled", engine="compile"), made(run="eager", engine="eager")
    for name, weight in eager.networks["model"].state_dict().items():
        torch.testing.assert_close(compiled.networks["model"].state_dict()[name], weight, rtol=1e-3, atol=1e-5)

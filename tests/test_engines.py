"""A replayed step gives the eager step's bits, for every recipe; what can't be replayed is run eagerly, and said."""

import os
import random
from dataclasses import dataclass

import pytest
import torch
from conftest import RECIPES
from launching import ROOT, Processes, python, succeeded
from making import make
from safetensors.torch import load_file
from torch import nn
from toys import Line

import nndist
import nndist.loop
from nndist import engines
from nndist.data import Data, Resident
from nndist.errors import TrainingError
from nndist.metrics import Weighted
from nndist.tape import NotReplayable, Tape, relative_difference, same_bits


@pytest.fixture
def train(tmp_path):
    """nndist.train into a folder of the test, quietly; gives the trainer's engine too."""

    def call(recipe, engine, **settings):
        made = {"runs_dir": tmp_path, "run": engine, "progress": False, "figures": False, "threads": 1}
        return nndist.train(recipe, engine=engine, wandb="off", report=False, **{**made, **settings})

    return call


@pytest.fixture
def replays(monkeypatch):
    """Counts the replays of all tapes."""
    counted = []
    call = Tape.__call__
    monkeypatch.setattr(Tape, "__call__", lambda tape, *inputs: counted.append(1) or call(tape, *inputs))
    return counted


def saved(result):
    """Every tensor of the newest checkpoint but the random state of Python's own."""
    (folder,) = result.folder.glob(f"checkpoints/step-{result.steps:08d}")
    return {f"{path.stem}/{n}": t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def assert_same_state(ours, theirs):
    a, b = saved(ours), saved(theirs)
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


def assert_same_training(ours, theirs):
    assert_same_state(ours, theirs)
    for mine, other in zip(ours.history.records, theirs.history.records, strict=True):
        assert {k: v for k, v in mine.items() if k != "examples_per_second"} == {
            k: v for k, v in other.items() if k != "examples_per_second"
        }


@dataclass(kw_only=True)
class Everything(Line):
    """Dropout, BatchNorm, clipping, momentum, tied weights, an unused parameter, and weights of the losses."""

    dropout: float = 0.3
    clip_norm: float | None = 0.5
    ema_decay: float | None = 0.9

    def networks(self):
        torch.manual_seed(5)
        network = nn.Sequential(
            *(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(self.dropout), nn.Linear(8, 8), nn.Tanh()),
            *(nn.Linear(8, 8), nn.Linear(8, 1)),
        )
        network[6].weight = network[4].weight
        network.unused = nn.Parameter(torch.ones(3))
        return {"model": network}

    def loss(self, networks, batch):
        losses = super().loss(networks, batch)
        return Weighted(losses, (batch[0][:, 0] > 0.2).float())

    def score(self, networks, batch):
        return {"loss": super().loss(networks, batch)}


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"precision": "bf16"}], ids=str)
def test_a_replayed_training_has_the_eager_ones_bits(train, replays, settings):
    recipe = Everything(epochs=12)
    eager = train(recipe, "eager", **settings)
    assert not replays
    taped = train(recipe, "tape", **settings)
    assert len(replays) > 50 * settings.get("accumulate", 1)
    assert_same_training(taped, eager)


@pytest.mark.parametrize("recipe", [r.stem for r in RECIPES])
def test_every_recipe_is_replayed_with_the_eager_ones_bits(train, recipe, monkeypatch):
    """Its first steps; those that take long, which are run eagerly, are replayed here too."""
    monkeypatch.setattr(engines.TapedStep, "LONGEST", 60.0)
    compared = []
    monkeypatch.setattr(engines.TapedStep, "_give_up", lambda engine, reason: pytest.fail(reason))
    original = engines.TapedStep._compared
    monkeypatch.setattr(
        engines.TapedStep, "_compared", lambda engine, *given: compared.append(1) or original(engine, *given)
    )
    fields = {"batch_size": 8, "evaluate_every": "100 steps"}
    settings = {"max_steps": 6, "data_source": "sample", "log_every": 1, "eval_batch_size": 4000}
    monkeypatch.setattr(nndist.loop.Trainer, "evaluate", lambda trainer: trainer.log())
    made = make(recipe, **fields)
    eager = train(made, "eager", **settings)
    taped = train(made, "tape", **settings)
    assert compared
    assert_same_training(taped, eager)


def test_a_resumed_tape_goes_on_with_the_same_bits(train):
    recipe = Everything(epochs=10)
    whole = train(recipe, "tape")
    train(recipe, "tape", run="halves", max_steps=31)
    assert_same_state(train(recipe, "tape", run="halves"), whole)
    train(recipe, "tape", run="changed", max_steps=31)  # another engine may go on, too
    assert_same_state(train(recipe, "eager", run="changed"), whole)


class Counting(nn.Module):
    """Another factor in each forward pass, which no tensor holds."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.01 * self.calls)


class Schedule:
    """Counts."""

    def __init__(self):
        self.calls = 0


class Scheduled(nn.Module):
    """Counts in something that it holds, beside another of its class that does not."""

    def __init__(self, counts=True):
        super().__init__()
        self.schedule, self.counts = Schedule(), counts
        self.other = Scheduled(counts=False) if counts else None

    def forward(self, x):
        self.schedule.calls += self.counts
        return x * (1 + 0.01 * self.schedule.calls)


class CountsInItsClass(nn.Module):
    """Counts in an attribute of its class."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return x * (1 + 0.01 * (type(self).calls % 7))


class Chance(nn.Module):
    """Skips itself at random, by Python's random numbers, in training."""

    def forward(self, x):
        return -x if self.training and random.random() < 0.5 else x


class Looks(nn.Module):
    """Looks at a value."""

    def forward(self, x):
        return x if x.sum().item() > 0 else 2 * x


class Lists(nn.Module):
    """Looks at all values."""

    def forward(self, x):
        return x if sum(x.detach().flatten().tolist()) > 0 else 2 * x


class AsNumPy(nn.Module):
    """Looks at all values as an array."""

    def forward(self, x):
        return x if x.detach().numpy().sum() > 0 else 2 * x


class Selects(nn.Module):
    """Gives as many numbers as are positive, then as many again as there were."""

    def forward(self, x):
        return x + x[x > 0].sum()


class Hooked(nn.Identity):
    """Has a hook."""

    def __init__(self):
        super().__init__()
        self.register_forward_hook(lambda module, inputs, output: output * 2)


def with_module(module):
    @dataclass(kw_only=True)
    class Odd(Line):
        """A network with a module of its own."""

        def networks(self):
            torch.manual_seed(5)
            return {"model": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), module(), nn.Linear(8, 1))}

    return Odd


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Counting, "a step changes Counting.calls"),
        (CountsInItsClass, "a step changes CountsInItsClass.calls"),
        (Scheduled, "a step changes Scheduled.schedule.calls"),
        (Chance, "a step changes Python's random numbers"),
        (Looks, "Python looks at a tensor's value"),
        (Lists, "Python looks at a tensor's values"),
        (AsNumPy, "Python looks at a tensor's values"),
        (Selects, "a shape that depends on values"),
        (Hooked, "the network has hooks"),
    ],
)
def test_what_a_tape_can_not_repeat_is_run_eagerly_and_said_once(train, replays, capsys, module, reason):
    CountsInItsClass.calls = 0
    eager = train(with_module(module)(), "eager")
    CountsInItsClass.calls = 0
    capsys.readouterr()
    random.seed(0)
    taped = train(with_module(module)(), "auto")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("engine")]
    assert sum(reason in line for line in said) == 1, said
    assert not replays
    assert_same_training(taped, eager)


HIDDEN = {"calls": 0}


class Hidden(nn.Module):
    """Changes after some steps by something that nobody can see."""

    def forward(self, x):
        HIDDEN["calls"] += 1
        return x * (2 if HIDDEN["calls"] > HIDDEN["until"] else 1)


def test_a_recipe_that_changes_unseen_is_caught(train):
    HIDDEN.update(calls=0, until=6)
    with pytest.raises(TrainingError, match=r"no longer agrees with the recipe's own.*--engine eager"):
        train(with_module(Hidden)(epochs=10, batch_size=20), "tape")


def test_batches_of_many_shapes_are_no_trouble(train, capsys):
    @dataclass(kw_only=True)
    class Lengths(Line):
        """Each batch is cut to a length of its own."""

        def data(self, config):
            x = torch.rand(400, 40, generator=torch.Generator().manual_seed(0))
            lengths = 1 + torch.arange(400) // 10

            def prepare(batch):
                return batch[0][:, : int(batch[1].max())], batch[0].sum(1, keepdim=True)

            sets = Resident(x, lengths), Resident(x[:8], lengths[:8])
            return Data(*sets, prepare=prepare, augment=lambda batch, random: batch)  # so it is prepared off the tape

        def networks(self):
            return {"model": nn.AdaptiveAvgPool1d(1)} | {"model": Mean()}

    recipe = Lengths(epochs=4, batch_size=10, shuffle=False, lr=1e-3)
    eager, auto = train(recipe, "eager"), train(recipe, "auto")
    assert "engine   steps run eagerly (batches have more than 16 shapes)" in capsys.readouterr().out
    assert_same_training(auto, eager)


class Mean(nn.Module):
    """The mean of however many numbers, scaled."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.mean(1, keepdim=True) * self.scale


@pytest.mark.long
def test_a_compiled_training_agrees_up_to_rounding_and_resumes_with_the_same_bits(train, tmp_path):
    """In processes of their own, as a resume is; dropout, BatchNorm, clipping and a smaller last batch included."""
    recipe = tmp_path / "everything.py"
    recipe.write_text("from test_engines import Everything\n\n\nclass Mine(Everything):\n    pass\n")
    flags = [
        ROOT / "launch/train.py",
        recipe,
        "--epochs",
        "10",
        "--runs-dir",
        tmp_path,
        "--wandb",
        "off",
        "--no-figures",
        "--no-report",
    ]
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}

    def weights(run, engine, *more):
        said = succeeded(python(*flags, "--engine", engine, "--run", run, *more, env=environment)).stdout
        assert f"engine   {engine}\n" in said and "eagerly" not in said
        return load_file(tmp_path / "everything" / run / "checkpoints/step-00000070/model.safetensors")

    eager, compiled = weights("eager", "eager"), weights("compiled", "compile")
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-5)
    succeeded(python(*flags, "--engine", "compile", "--run", "halves", "--max-steps", "31", env=environment))
    resumed = weights("halves", "compile")
    assert [name for name in resumed if not torch.equal(resumed[name], compiled[name])] == []


@pytest.mark.long
def test_a_machine_that_is_slow_for_a_while_changes_no_bit_of_a_compiled_training(train, monkeypatch):
    """The smaller last batches are run eagerly then, and the whole ones still compiled."""
    compiled = train(Everything(epochs=8), "compile")
    monkeypatch.setattr(engines.TapedStep, "LONGEST", 0.0)
    assert_same_training(train(Everything(epochs=8), "compile", run="slow"), compiled)


@pytest.mark.long
def test_a_step_that_can_not_be_compiled_is_replayed(train, capsys, monkeypatch):
    def fails(*arguments, **named):
        raise RuntimeError("no working compiler was found\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    compiled, eager = train(Everything(), "compile"), train(Everything(), "eager")
    out = capsys.readouterr().out
    assert "engine   compile; steps run eagerly (RuntimeError: no working compiler was found)\n" in out
    assert_same_training(compiled, eager)


def test_a_tape_on_three_processes_resumes_with_the_same_bits(tmp_path):
    """And all of them hold the same weights, or the next step's would differ from DDP's."""
    flags = ["--runs-dir", tmp_path, "--wandb", "off", "--no-figures", "--no-report", "--no-progress", "--threads", 1]

    def state(run, steps, engine="tape"):
        arguments = [ROOT / "recipes/sum_mlp.py", *flags, "--clip-norm", 1.0, "--run", run, "--max-steps", steps]
        launched = Processes(3, [*arguments, "--engine", engine], folder=tmp_path)
        assert launched.wait() == [0, 0, 0], launched.said()
        assert f"engine   {engine}\n" in launched.said() and "eagerly" not in launched.said()
        (folder,) = (tmp_path / "sum_mlp" / run / "checkpoints").glob(f"step-{steps:08d}")
        return {f"{p.stem}/{n}": t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}

    whole = state("whole", 40)
    state("halves", 17)
    resumed = state("halves", 40)
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    ddp = {name: tensor for name, tensor in state("ddp", 40, "eager").items() if name.startswith("model/")}
    assert ddp
    for name, tensor in ddp.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-4, atol=1e-5)


def test_an_engine_that_can_not_serve_is_refused():
    runtime = type("Two", (), {"world_size": 2, "device": torch.device("cpu"), "scaler": None})()
    with pytest.raises(nndist.UserError, match="--engine compile: serves one process, and there are 2"):
        engines.engine_called("compile", runtime)
    runtime.device, runtime.world_size = torch.device("cuda"), 1
    assert engines.engine_called("compile", runtime) is engines.CompiledStep
    assert engines.engine_called("auto", runtime) is engines.EagerStep
    with pytest.raises(nndist.UserError, match="--engine tape: serves CPUs, and this is cuda; use --engine eager"):
        engines.engine_called("tape", runtime)


def test_a_tape_repeats_operations_of_every_kind():
    """Lists, changes in place, views of weights, random numbers, things that are not finite."""
    weight = torch.randn(4, 3)
    running = torch.zeros(3)

    def function(x):
        running.mul_(0.9).add_(x.mean(0), alpha=0.1)
        a, b, c = x.split(2, 0)
        noise = torch.rand_like(a) + torch.nn.functional.dropout(b, 0.5)
        y = (a + noise) @ weight.t()
        z = torch.where(y > 0, y, -torch.inf)
        return y.t().t(), z, c.clamp(max=float("inf")), torch.stack([a, c]).unbind(0)[1], None, weight[1:]

    x = torch.randn(6, 3)
    tape = Tape(function, [x])
    for _ in range(3):
        x = torch.randn(6, 3)
        state, before = torch.get_rng_state(), running.clone()
        replayed = [None if t is None else t.clone() for t in tape(x)]
        ran, after = running.clone(), torch.get_rng_state()
        torch.set_rng_state(state)
        running.copy_(before)
        assert same_bits(replayed, function(x))
        assert torch.equal(ran, running) and torch.equal(after, torch.get_rng_state())
        weight.mul_(1.1)  # as an optimizer does
    assert "rand" not in tape.source and tape.source.count("\n") < 40


def test_a_function_that_a_tape_can_not_hold_has_still_run():
    with pytest.raises(NotReplayable) as caught:
        Tape(lambda x: (x * x.sum().item(),), [torch.ones(2)])
    assert torch.equal(caught.value.args[1][0], torch.full((2,), 2.0))
    with pytest.raises(NotReplayable, match="another kind"):
        Tape(lambda x: (x.to_sparse(),), [torch.eye(2)])


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ([torch.tensor([1.0, torch.nan])], [torch.tensor([1.0, torch.nan])], True),
        ([torch.tensor([1.0, torch.nan])], [torch.tensor([1.0, 2.0])], False),
        ([torch.tensor([1.0])], [torch.tensor([1.0 + 2**-23])], False),
        ([torch.ones(2)], [torch.ones(1, 2)], False),
        ([torch.ones(2)], [torch.ones(2).double()], False),
        ([None], [torch.ones(2)], False),
        ([None, torch.ones(0)], [None, torch.ones(0)], True),
    ],
)
def test_same_bits(ours, theirs, same):
    assert same_bits(ours, theirs) is same


@pytest.mark.parametrize(
    ("ours", "theirs", "difference"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], 0.0),
        ([[1.0, 2.1]], [[1.0, 2.0]], 0.1 / 2.02),
        ([[100.0], [2e-9]], [[100.0], [1e-9]], 1e-9),  # rounding of what is nothing
        ([[100.0], [0.2]], [[100.0], [0.1]], 0.1 / 1.1),  # but a small gradient that is wrong is wrong
        ([[torch.nan]], [[1.0]], torch.inf),
        ([[torch.inf]], [[1.0]], torch.inf),
        ([None], [None], 0.0),
    ],
)
def test_relative_difference(ours, theirs, difference):
    ours, theirs = ([None if t is None else torch.tensor(t) for t in side] for side in (ours, theirs))
    assert relative_difference(ours, theirs) == pytest.approx(difference, rel=1e-5)


def test_gradients_that_are_sent_in_bf16(tmp_path):
    """They are rounded, alike on all processes: the weights differ a little from those of fp32, and are all finite."""
    flags = ["--max-steps", 20, "--runs-dir", tmp_path, "--threads", 1]
    flags += ["--wandb", "off", "--no-figures", "--no-report", "--no-progress"]

    def weights(run, *more):
        launched = Processes(2, [ROOT / "recipes/sum_mlp.py", *flags, "--run", run, *more], folder=tmp_path)
        assert launched.wait() == [0, 0], launched.said()
        return load_file(tmp_path / "sum_mlp" / run / "checkpoints/step-00000020/model.safetensors")

    exact, rounded = weights("exact"), weights("rounded", "--gradient-compression", "bf16")
    assert any(not torch.equal(rounded[name], exact[name]) for name in exact)
    for name, tensor in exact.items():
        torch.testing.assert_close(rounded[name], tensor, rtol=0.05, atol=2e-3)

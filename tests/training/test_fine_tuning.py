"""`--freeze`, `--unfreeze-at`, `--lr-scale`: as torch does it, on 1 and 3 processes, and after a stop."""

import json

import pytest
import torch
from launching import Processes
from safetensors.torch import load_file
from workers import tuned
from workers.tuned import Tuned, plain, train

from nndist.config import RunConfig
from nndist.errors import UserError
from nndist.training.fine_tuning import FineTuning


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    return train(folder, "start", {"epochs": 2, "init_from": None}).folder


def weights(folder, run, file="model"):
    return load_file(folder / f"tuned/{run}/checkpoints/step-00000024/{file}.safetensors")


def started(start):
    return load_file(start / "checkpoints/step-00000012/model.safetensors")


@pytest.fixture(scope="module")
def by_processes(start, tmp_path_factory):
    folders = {}
    for world_size in (1, 3):
        folders[world_size] = folder = tmp_path_factory.mktemp(f"on{world_size}")
        launched = Processes(world_size, [folder, start], folder=folder, call=tuned.main)
        assert not any(launched.wait()), launched.said()
    return folders


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("run, thaw", [("frozen-ddp", 99), ("thawed", 12)])
def test_it_is_what_torch_does(by_processes, start, world_size, run, thaw):
    ours, theirs = weights(by_processes[world_size], run), plain(started(start), thaw=thaw).state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_is_frozen_keeps_every_bit(by_processes, start, world_size):
    before, after, ema = started(start), *(weights(by_processes[world_size], "frozen-ddp", f) for f in ("model", "ema"))
    frozen = [name for name in before if name.startswith("0.")]
    assert len(frozen) == 6 and all(torch.equal(before[n], after[n]) and torch.equal(before[n], ema[n]) for n in frozen)
    assert not any(torch.equal(before[name], after[name]) for name in before if name not in frozen)


def test_a_stop_on_either_side_of_the_thaw_changes_no_bit(by_processes, start, tmp_path):
    fields = {"init_from": str(start), "freeze": ("0",), "lr_scale": ("1.*=0.1",), "ema_decay": 0.9}
    train(tmp_path, "thawed", {**fields, "unfreeze_at": "12 steps"})
    for file in ("model", "ema", "optimizer"):
        ours, theirs = weights(by_processes[1], "thawed", file), weights(tmp_path, "thawed", file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_is_recorded_and_can_not_change_unseen(by_processes, start, tmp_path):
    about = json.loads((by_processes[1] / "tuned/thawed/run.json").read_text())
    assert about["fields"]["freeze"] == ["0"] and about["fields"]["unfreeze_at"] == "2 epochs"
    assert about["initial_weights"]["loaded"] == 10 and about["initial_weights"]["weights"].startswith("start, last")
    train(tmp_path, "it", {"freeze": ("0",)}, max_steps=3)
    with pytest.raises(UserError, match=r"freeze has changed from \['0'\] to \['1'\] since the run began"):
        train(tmp_path, "it", {"freeze": ("1",)}, max_steps=6)


def test_rates_of_a_recipe_with_groups_of_its_own(tmp_path):
    class Grouped(Tuned):
        def optimizer(self, name, network):
            groups = [{"params": network[0].parameters(), "lr": 0.5}, {"params": network[1:].parameters()}]
            return torch.optim.SGD(groups, lr=0.1)

        def lr_factor(self, step, total_steps):
            return [1.0, 0.5]

    import nndist
    from nndist.training.trainer import Trainer

    seen = {}
    original = Trainer.take_step

    def take_step(self, batch):
        done = original(self, batch)
        names = {p: n for n, p in self.networks["model"].named_parameters()}
        seen.update({names[p]: g["lr"] for g in self.optimizers["model"].param_groups for p in g["params"]})
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "take_step", take_step)
        settings = {"max_steps": 2, "runs_dir": tmp_path, "run": "it", **tuned.QUIET}
        nndist.train(Grouped(lr_scale=("*.bias=2", "3=0")), **settings)
    assert seen["0.0.weight"] == 0.5 and seen["0.1.bias"] == 1.0
    assert seen["1.weight"] == 0.05 and seen["1.bias"] == 0.1 and seen["3.weight"] == 0.0 and seen["3.bias"] == 0.1


def test_what_thaws_must_be_in_an_optimizer_by_then(tmp_path, capsys):
    class Head(Tuned):
        def optimizer(self, name, network):
            return torch.optim.SGD(network[3].parameters(), lr=0.1)

    import nndist

    settings = {"runs_dir": tmp_path, "run": "it", **tuned.QUIET}
    with pytest.raises(UserError, match=r"0\.0\.weight thaws at step 2 and no optimizer holds it.*add_param_group\(\)"):
        nndist.train(Head(freeze=("0",), unfreeze_at="2 steps"), **settings)
    assert "0.0.weight thaws at step 2; as yet no optimizer holds it" in capsys.readouterr().out


def test_what_is_to_thaw_is_frozen_once_the_optimizers_are_made():
    """Before the first step already: the throwaway step of DDP and the values of the start see it frozen."""
    network = Tuned().networks()["model"]
    tuning = FineTuning(Tuned(freeze=("0",), unfreeze_at="2 steps"), RunConfig(), {"model": network}, 6)
    assert all(parameter.requires_grad for parameter in network.parameters()), "filter(requires_grad) takes all"
    tuning.begin({"model": torch.optim.SGD(network.parameters(), lr=0.1)})
    frozen = {id(parameter) for parameter in network[0].parameters()}
    assert all(parameter.requires_grad is (id(parameter) not in frozen) for parameter in network.parameters())


def test_rates_reach_every_optimizer_that_has_the_groups():
    network = Tuned().networks()["model"]

    class Both(torch.optim.Optimizer):
        """Two optimizers as one, with their groups by a property."""

        def __init__(self, *inner):
            self.inner, self.defaults = inner, {}

        param_groups = property(lambda self: [group for one in self.inner for group in one.param_groups])

    class Copies(torch.optim.Optimizer):
        """Wraps an optimizer, with groups of its own."""

        def __init__(self, inner):
            self.inner = inner
            super().__init__([dict(group) for group in inner.param_groups], {})

    def scaled(optimizer):
        tuning = FineTuning(Tuned(lr_scale=("*.bias=0.5",)), RunConfig(), {"model": network}, 6)
        return tuning.with_rates("model", optimizer), tuning.origins["model"]

    def made(*parts):
        return [torch.optim.SGD([*part.parameters()], lr=0.1) for part in parts]

    both, origins = scaled(Both(*made(network[1], network[3])))
    assert [[group["lr"] for group in one.param_groups] for one in both.inner] == [[0.1, 0.05]] * 2
    assert origins == [0, 0, 1, 1]
    with pytest.raises(UserError, match="--lr-scale: Copies has parameter groups that can't be split from outside"):
        scaled(Copies(*made(network[1])))


@pytest.mark.parametrize(
    "fields, settings, expected",
    [
        ({"freeze": ("conv*",)}, {}, r"--freeze 'conv\*': matches no parameter; their names begin with 0, 1, 3"),
        ({"lr_scale": ("1.*",)}, {}, r"--lr-scale '1\.\*': give a pattern and a factor"),
        ({"lr_scale": ("1.*=-1",)}, {}, "give a pattern and a factor"),
        ({"unfreeze_at": "1 epoch"}, {}, "nothing is frozen; say what with --freeze"),
        ({"freeze": ("0",), "unfreeze_at": "3 minutes"}, {}, "must be in steps or epochs"),
        ({"freeze": ("0",), "unfreeze_at": "soon"}, {}, "give a number and a unit"),
        ({"freeze": ("0",), "unfreeze_at": "1 epoch"}, {"gradient_sync": "ddp"}, "--gradient-sync ddp needs the same"),
        ({"freeze": ("*",)}, {}, "every parameter is frozen"),
    ],
)
def test_what_has_no_meaning_is_one_line(tmp_path, fields, settings, expected):
    with pytest.raises(UserError, match=expected) as caught:
        train(tmp_path, "it", fields, **settings)
    assert "\n" not in str(caught.value)


def test_a_recipe_may_have_fields_of_these_names_for_its_own_use(tmp_path):
    class Own(Tuned):
        freeze: bool = True
        init_from: int = 3

    import nndist

    result = nndist.train(Own(), max_steps=1, runs_dir=tmp_path, run="it", **tuned.QUIET)
    fields = json.loads((result.folder / "run.json").read_text())["fields"]
    assert result.steps == 1 and (fields["freeze"], fields["init_from"]) == (True, 3)
    assert all(parameter.requires_grad for parameter in result.networks["model"].parameters()), "nothing is frozen"

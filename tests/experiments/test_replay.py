"""A step of a run taken again: the same bits, what happened in it, and what the run would have been otherwise."""

import json
import re
import shutil

import pytest
import torch
from launching import ROOT, Processes, command, succeeded
from resuming import SAVES
from safetensors.torch import load_file, save_file

from nndist.cli.main import main as nndist
from nndist.experiments.bisect import bisect

REPLAY, AUDIT = ROOT / "launch/replay.py", ROOT / "launch/audit.py"

RECIPE = """from dataclasses import dataclass
import torch
from torch import nn
from nndist import Data, Recipe, Resident


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.first(x)
        hidden = {how}
        return self.second(hidden).squeeze(1)


@dataclass(kw_only=True)
class Toy(Recipe):
    epochs: int = 4
    batch_size: int = 10
    lr: float = 0.05

    def data(self, config):
        x = torch.randn(60, 3, generator=torch.Generator().manual_seed(3))
        x[17] = -x[17].abs() * {scale}
        return Data(train=Resident(x, x.sum(1)), test=Resident(x[20:40], x[20:40].sum(1)))

    def networks(self):
        return {{"model": Net()}}

    def optimizer(self, name, network):
        return torch.optim.SGD(network.parameters(), self.lr)

    def objectives(self):
        return {{"model": self.loss}}

    def loss(self, networks, batch):
        x, y = batch
        return (networks["model"](x) - y).square()

    def score(self, networks, batch):
        return {{"error": (networks["model"](batch[0]) - batch[1]).abs()}}
"""


def toy(folder, how="torch.relu(hidden)", scale="1.0"):
    folder.mkdir(exist_ok=True)
    path = folder / "toy.py"
    path.write_text(RECIPE.format(how=how, scale=scale))
    return path


def trained(folder, *flags, code=0, **named):
    path = toy(folder, **named)
    words = ["--runs-dir", folder, "--run", "it", "--no-figures", "--no-report", "--wandb", "off", "--threads", 1]
    done = command(ROOT / "launch/train.py", path, *words, "--save-every", "5 steps", *flags)
    assert done.returncode == code, done.stderr + done.stdout
    return folder / "toy/it", done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 24 steps with a checkpoint every five."""
    return trained(tmp_path_factory.mktemp("whole"), "--keep", 9)[0]


def test_a_step_is_replayed_to_the_bits_of_its_checkpoint(whole):
    done = succeeded(command(REPLAY, whole, "--step", 10))
    assert "toy/it, step 10 of 24, from the checkpoint of step 5" in done.stdout
    assert "bit-identical to the run's checkpoint of this step" in done.stdout
    assert re.search(r"records  \d+ identical to those of metrics.jsonl", done.stdout)
    assert "model.first.weight" in done.stdout and max(map(len, done.stdout.splitlines())) <= 100
    page = (whole / "replay/step-10.html").read_text()
    assert "Gradients and updates" in page and "model.second" in page


def test_what_is_said_of_a_step_is_true(whole):
    shown = json.loads(succeeded(command(REPLAY, whole, "--step", 7, "--json")).stdout)
    before = load_file(whole / "checkpoints/step-00000005/model.safetensors")
    assert shown["from_step"] == 5 and shown["checkpoint"] == "none" and shown["record_differs"] == ""
    # step 6 and 7 by hand
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(3))
    x[17] = -x[17].abs()
    from nndist.data.sets import permutation

    weights = {name: tensor.clone().requires_grad_() for name, tensor in before.items()}
    order = permutation(60, 0, 0)
    order = torch.cat([order, permutation(60, 0, 1)])
    for step in (6, 7):
        numbers = order[10 * (step - 1) : 10 * step]
        hidden = torch.relu(x[numbers] @ weights["first.weight"].T + weights["first.bias"])
        losses = (
            (hidden @ weights["second.weight"].T + weights["second.bias"]).squeeze(1) - x[numbers].sum(1)
        ).square()
        gradients = torch.autograd.grad(losses.mean(), list(weights.values()))
        old = weights
        weights = {
            n: (w - 0.05 * g).detach().requires_grad_() for (n, w), g in zip(old.items(), gradients, strict=True)
        }
    assert shown["examples"] == numbers.tolist()
    assert shown["losses"]["model"] == pytest.approx(losses.tolist(), rel=1e-4)
    found = {layer["name"]: layer for layer in shown["layers"]}
    for (name, weight), gradient in zip(old.items(), gradients, strict=True):
        assert found[f"model.{name}"]["gradient"] == pytest.approx(gradient.norm().item(), rel=1e-4)
        assert found[f"model.{name}"]["update"] == pytest.approx(0.05 * gradient.norm().item(), rel=1e-3)
        assert found[f"model.{name}"]["weight"] == pytest.approx(weight.norm().item(), rel=1e-5)


def test_a_record_that_training_does_not_give_is_named(whole, tmp_path):
    other = tmp_path / "toy/it"
    shutil.copytree(whole, other)
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    place = next(n for n, line in enumerate(lines) if json.loads(line)["step"] == 8)
    lines[place] = re.sub(r'("train/loss": )\d', r"\g<1>9", lines[place], count=1)
    (other / "metrics.jsonl").write_text("".join(lines))
    done = command(REPLAY, other, "--step", 10)
    assert done.returncode == 1 and "differ from metrics.jsonl: the record of step 8" in done.stdout


@pytest.mark.parametrize(
    "how, kind, operation, passes",
    [
        ("torch.log(hidden)", "nan", "log", "forward"),
        ("torch.relu(hidden) * float('inf')", "nan", "mul", "forward"),
        ("(hidden * (x[:, :1] > -5)).abs().sqrt()", "nan", "", "backward"),
    ],
)
def test_the_first_number_that_is_not_finite_is_found(tmp_path, how, kind, operation, passes):
    run, done = trained(tmp_path, "--log-every", 3, code=1, how=how, scale="100.0")
    step = int(re.search(r"not finite at step (\d+) of 24", done.stderr)[1])
    assert f"nndist replay {run} --step {step} shows where" in done.stderr
    told = command(REPLAY, run, "--step", step, "--json")
    first = json.loads(told.stdout)["first"]
    if passes == "backward":  # the weights were lost in the step before
        first = json.loads(command(REPLAY, run, "--step", step - 1, "--json").stdout)["first"]
    assert first["kind"] == kind and first["passes"] == passes, first
    if operation:
        assert first["operation"] == operation
        assert re.search(r"toy\.py, line 14, in forward", first["where"]), first


def test_another_value_from_a_step_on_stands_beside_the_original(whole):
    before = sorted(path.name for path in whole.rglob("*") if "replay" not in str(path))
    done = succeeded(command(REPLAY, whole, "--step", 12, "--vary", "lr=0.001", "--for", 6))
    lines = [line for line in done.stdout.splitlines() if line.startswith("train/loss")]
    assert len(lines) == 2 and lines[0].endswith("at step 18, as it was") and lines[1].endswith("at step 18, lr=0.001")
    records = map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
    recorded = {record["step"]: record for record in records if "train/loss" in record}
    assert float(lines[0].split()[1]) == pytest.approx(recorded[18]["train/loss"], rel=1e-4)
    assert "lr=0.001" in (whole / "replay/step-12-lr=0.001.html").read_text()
    assert sorted(path.name for path in whole.rglob("*") if "replay" not in str(path)) == before


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--step", 25], "--step 25: the run has steps 1 to 24"),
        (["--step", 0], "--step 0: steps count from 1"),
        (["--step", 3, "--vary", "speed=3"], "--vary speed=3: the recipe has no such field"),
        (["--step", 3, "--vary", "lr"], "such as lr=0.05"),
    ],
)
def test_what_can_not_be_replayed_is_one_line(whole, flags, said):
    done = command(REPLAY, whole, *flags)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) <= 2


def main(*words):
    from nndist.cli.main import main

    main(list(words))


def test_three_processes_replay_their_run_with_dropout_and_batch_norm(uninterrupted, tmp_path):
    run = uninterrupted(3, *SAVES)
    words = ["replay", str(run.place), "--step", "30", "--json"]
    launched = Processes(3, words, folder=tmp_path, call=main)
    assert launched.wait() == [0, 0, 0], launched.said()
    shown = json.loads(next(line for line in launched.said().splitlines() if line.startswith("{")))
    assert shown["checkpoint"] == "identical" and shown["record_differs"] == "" and shown["from_step"] < 30
    assert len(shown["examples"]) == 10 and set(shown["losses"]) == {"discriminator", "generator"}
    assert len(shown["losses"]["generator"]) == 10


def bisected(first, second):
    return vars(bisect(first, second, trust=False, say=lambda line: None))


@pytest.mark.parametrize(
    "flags, named, step, cause",
    [
        (["--lr", "0.06"], {}, 1, r"another result of .*; the runs differ in lr \(0.05 and 0.06\)"),
        (["--seed", "1"], {}, 0, r"the initial weights differ; the runs differ in seed \(0 and 1\)"),
        ([], {"scale": "2.0"}, None, "the same examples with other contents"),
        ([], {"how": "torch.relu(hidden) * 1.0"}, None, "no record and no checkpoint that both have differs"),
        (
            [],
            {"how": "torch.relu(hidden) + torch.randn(8) * 0.1"},
            1,
            r"other operations .*randn|other random numbers, in randn.*toy\.py, line 14",
        ),
    ],
)
def test_the_cause_of_a_difference_is_found(whole, tmp_path, flags, named, step, cause):
    other, _ = trained(tmp_path, "--keep", 9, *flags, **named)
    found = bisected(whole, other)
    assert re.search(cause, found["cause"]), found
    if step is not None:
        assert found["step"] == step
    if "scale" in named:  # the step whose batch has example 17
        from nndist.data.sets import permutation

        assert found["step"] == 1 + permutation(60, 0, 0).tolist().index(17) // 10


def test_the_command_prints_the_cause_last_and_exits_with_1(whole, tmp_path, capsys):
    other, _ = trained(tmp_path, "--lr", "0.06")
    with pytest.raises(SystemExit) as stopped:
        nndist(["bisect", str(whole), str(other)])
    said = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 1 and "described lr: 0.05 and 0.06" in said
    assert said[-1].startswith("cause     another result of ") and said[-2].startswith("weights   of step 1 ")


def test_dropout_with_another_share_is_found_where_it_draws(tmp_path):
    runs = [
        trained(tmp_path / share, how=f"torch.dropout(torch.relu(hidden), {share}, self.training)")[0]
        for share in ("0.5", "0.4")
    ]
    found = bisected(*runs)
    assert found["step"] == 1 and re.search(r"toy\.py, line 14, in forward", found["cause"]), found
    assert found["cause"].startswith("other random numbers, in")


def test_a_changed_bit_is_not_blamed_on_the_recipe(whole, tmp_path):
    from nndist.runs import checkpoint, checkpoint_writer

    other = tmp_path / "toy/it"
    shutil.copytree(whole, other)
    saved = checkpoint.read(other / "checkpoints/step-00000010")
    saved.tensors["model.safetensors"]["second.bias"] += 1e-6
    checkpoint_writer.publish(other / "checkpoints", saved)
    found = bisected(whole, other)
    assert found["differs_at"] == 10 and found["step"] is None
    assert "these are not those of run B: not the recipe, its fields or its data" in found["cause"]


def test_an_audit_of_an_honest_run_holds(whole):
    done = succeeded(command(AUDIT, whole, "--stretches", 2, "--seed", 1))
    assert done.stdout.count("holds") == 6 and "FAILS" not in done.stdout
    assert "2 of 5 stretches were trained again (seed 1)" in done.stdout and "probability 0.60" in done.stdout


def test_weights_forged_with_all_hashes_made_to_agree_are_found_by_training_again(whole, tmp_path):
    from nndist.runs import checkpoint, checkpoint_writer

    forged = tmp_path / "toy/it"
    shutil.copytree(whole, forged)
    path = forged / "checkpoints/step-00000010"
    saved = checkpoint.read(path)
    saved.tensors["model.safetensors"]["second.bias"] += 1e-6
    save_file(saved.tensors["model.safetensors"], path / "model.safetensors")
    shut = command(AUDIT, forged, "--stretches", 5, "--seed", 1)
    assert shut.returncode == 1 and "FAILS    checkpoints" in shut.stdout, "the hash tells"
    shutil.rmtree(path)
    checkpoint_writer.publish(forged / "checkpoints", saved)
    done = command(AUDIT, forged, "--stretches", 5, "--seed", 1)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILS    steps 5 to 10" in done.stdout and "model.safetensors: second.bias" in done.stdout
    assert "FAILS    steps 10 to 15" in done.stdout, "nor do the next weights follow from the forged ones"


def test_a_changed_digit_in_the_records_is_found(whole, tmp_path):
    forged = tmp_path / "toy/it"
    shutil.copytree(whole, forged)
    lines = (forged / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[3] = re.sub(r'("train/loss": )\d', r"\g<1>0", lines[3], count=1)
    (forged / "metrics.jsonl").write_text("".join(lines))
    done = command(AUDIT, forged)
    assert done.returncode == 1 and "FAILS    records" in done.stdout and "line 4" in done.stdout

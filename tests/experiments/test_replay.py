"""A step of a run taken again: the same bits, what happened in it, and what the run would have been otherwise."""

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from launching import ROOT, Processes, command, succeeded
from making import make
from resuming import SAVES
from safetensors.torch import load_file, save_file

from nndist.cli.main import main as nndist
from nndist.config import RunConfig
from nndist.data import ExampleRandom
from nndist.experiments import audit_page, replay_page
from nndist.experiments.again import Trace
from nndist.experiments.audit_page import missed
from nndist.experiments.bisect import bisect, first_difference
from nndist.experiments.examine import Examined, module_names

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


@pytest.mark.parametrize(
    "name, fields",
    [
        ("char_gpt", {"context": 16, "width": 16, "num_layers": 1}),
        ("char_bert", {"length": 16, "width": 16, "num_layers": 1}),
        ("date_transformer", {"num_train": 200, "width": 16}),
        ("sentiment_rnn", {}),
        ("text_file", {"width": 16}),
        ("translation_rnn", {"hidden": 16}),
    ],
)
def test_the_page_shows_the_texts_of_the_batch(name, fields):
    recipe = make(name, batch_size=4, **fields)
    data = recipe.data(RunConfig(data_source="sample").data_config(download=False))
    batch = data.inputs(data.train, 100, 104)
    if data.augment is not None:  # hides characters
        batch = data.augment(batch, ExampleRandom(0, 0, torch.arange(4)))
    found = Examined(1, examples=[3, 2, 1, 0], inputs=batch, losses={"model": [1.0, 4.0, 2.0, 3.0]})
    page = replay_page.examples(found, data.as_text)
    rows = re.findall(r'"number">(\d)</td><td>(.*?)</td>', page)
    assert [number for number, _ in rows] == ["2", "0", "1", "3"] and "its text" in page, "the largest losses first"
    said = "".join(text for _, text in rows)
    assert len(said) > 20 and sum(c.isalnum() or c.isspace() for c in said) > 0.6 * len(said), said


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


def test_each_operation_has_its_module_also_in_the_backward_pass():
    """Those between modules have none, and an in-place one is its own module's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Noting(TorchDispatchMode):
        module, seen = "", []

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            self.seen.append((str(function).split(".")[1], self.module))
            return function(*arguments, **(named or {}))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(True)

        def forward(self, x):
            return self.last(self.norm(torch.sigmoid(self.first(x)))).sum()

    network, noting = Net(), Noting()
    with module_names({"model": network}, noting), noting:
        network(torch.randn(5, 4)).backward()
    modules = {
        "threshold_backward": "model.last",
        "native_batch_norm_backward": "model.norm",
        "sigmoid_backward": "",
        "mm": "model.first",
    }
    assert {name: module for name, module in noting.seen if name in modules} == modules, noting.seen
    assert not noting.module


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
        (["--step", 3, "--vary", "lr=fast"], "--vary lr=fast: is not a value of this field; the run has "),
        (["--step", 3, "--vary", "lr=0.05", "--for", 0], "--for 0: must be at least 1"),
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


def answered(world_size, folder, *words):
    """What a command says on so many processes as JSON, and its exit code, the same on all."""
    launched = Processes(world_size, [*words, "--json"], folder=folder, call=main)
    codes = launched.wait()
    assert len({*codes}) == 1, launched.said()
    return json.loads(next(line for line in launched.said().splitlines() if line.startswith("{"))), codes[0]


@pytest.mark.long
def test_runs_of_other_numbers_of_processes_are_taken_again_and_said_to_be(uninterrupted, tmp_path):
    """Dropout draws otherwise there, so their bits are not expected; what differs is named, not blamed on the run."""
    flags = ("--save-every", "5 steps")
    one, three = uninterrupted(1, *flags).place, uninterrupted(3, *flags).place
    for world_size, run in ((1, three), (2, one)):
        shown, code = answered(world_size, tmp_path, "replay", run, "--step", 32)
        assert shown["step"] == 32 and shown["from_step"] == 30 and code in (0, 1)
        assert len(shown["examples"]) == 10, "the same global batch"
        found, code = answered(world_size, tmp_path, "audit", run, "--stretches", 1, "--seed", 1)
        was = 3 if run == three else 1
        assert f"world size {was} in the run, {world_size} now: bits may differ" in found["notes"], found
    for world_size in (1, 2):
        found, code = answered(world_size, tmp_path, "bisect", one, three)
        assert code == 1 and "world_size (1 and 3)" in found["cause"], found


def test_batches_of_other_sizes_differ_where_the_shorter_one_ends():
    _, said = first_difference(Trace(examples=[4, 2]), Trace(examples=[4, 2, 7]))
    assert said == "different examples: number 3 of the batch"


def bisected(first, second):
    return vars(bisect(first, second, trust=False, say=lambda line: None))


@pytest.mark.parametrize(
    "flags, named, step, cause",
    [
        (["--lr", "0.06"], {}, 1, r"a different result of .*; the runs differ in lr \(0.05 and 0.06\)"),
        (["--seed", "1"], {}, 0, r"the initial weights differ; the runs differ in seed \(0 and 1\)"),
        ([], {"scale": "2.0"}, None, "the same examples with different contents"),
        ([], {"how": "torch.relu(hidden) * 1.0"}, None, "no record and no checkpoint that both have differs"),
        (
            [],
            {"how": "torch.relu(hidden) + torch.randn(8) * 0.1"},
            1,
            r"different operations .*randn|different random numbers, in randn.*toy\.py, line 14",
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
    assert said[-1].startswith("cause     a different result of ") and said[-2].startswith("weights   of step 1 ")


def test_dropout_with_another_share_is_found_where_it_draws(tmp_path):
    runs = [
        trained(tmp_path / share, how=f"torch.dropout(torch.relu(hidden), {share}, self.training)")[0]
        for share in ("0.5", "0.4")
    ]
    found = bisected(*runs)
    assert found["step"] == 1 and re.search(r"toy\.py, line 14, in forward", found["cause"]), found
    assert found["cause"].startswith("different random numbers, in")


def test_a_changed_bit_is_not_blamed_on_the_recipe(whole, tmp_path):
    from nndist.runs import checkpoint, checkpoint_writer

    other = tmp_path / "toy/it"
    shutil.copytree(whole, other)
    saved = checkpoint.read(other / "checkpoints/step-00000010")
    saved.tensors["model.safetensors"]["second.bias"] += 1e-6
    checkpoint_writer.publish(other / "checkpoints", saved)
    found = bisected(whole, other)
    assert found["differs_at"] == 10 and found["step"] is None
    assert (
        "these are not those of run B (checkpoint of step 10, model.safetensors: second.bias): not the recipe, its"
        in (found["cause"])
    )


def copied(run, folder, **about):
    """A copy of a run whose run.json says something else."""
    other = folder / "toy/it"
    shutil.copytree(run, other)
    said = json.loads((other / "run.json").read_text())
    for name, value in about.items():
        said[name] = {**said[name], **value} if isinstance(value, dict) else value
    (other / "run.json").write_text(json.dumps(said))
    return other


def with_another_bit(run, step):
    """The run's checkpoint of a step is what a machine wrote that computed one bit otherwise."""
    from nndist.runs import checkpoint, checkpoint_writer

    saved = checkpoint.read(run / f"checkpoints/step-{step:08}")
    saved.tensors["model.safetensors"]["first.weight"].view(-1)[:1].view(torch.int32).bitwise_xor_(1)
    checkpoint_writer.publish(run / "checkpoints", saved)
    return run


@pytest.mark.parametrize(
    "about, said",
    [
        ({"versions": {"torch": "2.11.0"}}, "torch ({torch} and 2.11.0)"),
        ({"device": "NVIDIA H200 x 1 process", "settings": {"device": "cuda"}}, "device (CPU and NVIDIA H200)"),
        ({"world_size": 3}, "world_size (1 and 3)"),
        ({"threads": 2}, "threads (1 and 2)"),
    ],
)
def test_what_this_machine_can_not_repeat_is_said_as_a_cause(whole, tmp_path, about, said):
    """The weights of the run that another release, device, processes or threads trained differ in a bit."""
    found = bisected(whole, with_another_bit(copied(whole, tmp_path, **about), 10))
    assert found["differs_at"] == 10 and found["step"] is None
    assert f"; they differ in {said.format(torch=torch.__version__)}" in found["cause"], found["cause"]
    assert ("--python" in found["cause"]) == ("versions" in about), "what another environment can repeat"
    assert "not those of run B (checkpoint of step 10, model.safetensors: first.weight)" in found["cause"]
    name = next(iter(about)).replace("_", " ").replace("versions", "torch")
    assert any(note.startswith(name) and note.endswith("bits may differ") for note in found["notes"]), found["notes"]


def test_another_precision_is_found_in_the_first_step(whole, tmp_path):
    other, _ = trained(tmp_path, "--precision", "bf16")
    found = bisected(whole, other)
    assert found["step"] == 1 and "the runs differ in precision (fp32 and bf16)" in found["cause"], found["cause"]


def test_a_flipped_bit_in_a_file_is_found(whole, tmp_path):
    other = copied(whole, tmp_path)
    file = other / "checkpoints/step-00000010/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    cause = bisected(whole, other)["cause"]
    assert "not those of run B (checkpoint of step 10, damaged: step-00000010/model.safetensors" in cause, cause


def test_a_recipe_that_is_not_deterministic_is_told_apart(tmp_path):
    how = "torch.relu(hidden) * (1 + __import__('time').perf_counter() % 1)"
    runs = [trained(tmp_path / name, how=how)[0] for name in "ab"]
    cause = bisected(*runs)["cause"]
    assert re.search(
        "the recipe does not repeat its bits: taken again, step 1 of run A has a different result of mul", cause
    )
    assert "toy.py, line 14, in forward" in cause


def test_fingerprints_name_the_step_without_training_both_again(whole, tmp_path):
    """One run loses a bit of a weight in step 8, as a machine does: both agree in all that they record of losses."""
    runs = [trained(tmp_path / name, "--fingerprint-every", 1, "--log-every", 24)[0] for name in "ab"]
    records = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    printed = [[r["fingerprint"] for r in one if "fingerprint" in r] for one in records]
    assert len(printed[0]) == 24 and printed[0] == printed[1] and len({*printed[0]}) == 24
    assert bisected(*runs)["differs_at"] is None
    ours = load_file(whole / "checkpoints/step-00000024/model.safetensors")
    theirs = load_file(runs[0] / "checkpoints/step-00000024/model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), "training has the same bits"
    lines = (runs[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    for place, record in enumerate(records[1]):
        if "fingerprint" in record and record["step"] >= 8:
            lines[place] = lines[place].replace(record["fingerprint"], record["fingerprint"][::-1])
    (runs[1] / "metrics.jsonl").write_text("".join(lines))
    said: list[str] = []
    found = vars(bisect(*runs, trust=False, say=said.append))
    assert said == ["step 8 is taken again under observation"]
    assert (found["same_until"], found["differs_at"], found["step"]) == (7, 8, 8)
    assert "these are not those of run B (the record of step 8)" in found["cause"], found["cause"]


def test_another_number_of_threads_is_found_where_it_adds_up_otherwise(tmp_path):
    how = "torch.relu(hidden) * torch.linspace(0, 1, 300_000).sin().sum().mul(1e-5)"
    runs = [trained(tmp_path / n, "--threads", n, "--fingerprint-every", 1, how=how)[0] for n in "12"]
    found = bisected(*runs)
    assert found["step"] == 1 and "toy.py, line 14, in forward" in found["cause"], found
    assert re.search(r"^a different result of sum.*; the runs differ in threads \(1 and 2\)$", found["cause"]), found


def test_a_run_is_bisected_by_the_python_of_its_own_environment(whole, tmp_path, capsys):
    """Here this one again: the same cause, with and without fingerprints; what is no Python is one line."""
    other, _ = trained(tmp_path, "--lr", "0.06")
    here = bisected(whole, other)
    assert here["step"] == 1 and vars(bisect(whole, other, trust=False, say=print, python=sys.executable)) == here
    for wrong in ("no/such/python", shutil.which("true")):
        with pytest.raises(SystemExit) as stopped:
            nndist(["bisect", str(whole), str(other), "--python", wrong])
        said = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and said[-1].startswith(f"error: --python {wrong}: "), said


@pytest.mark.long
def test_another_release_of_torch_is_found_in_the_operation_that_it_computes_otherwise(tmp_path):
    """NNDIST_OTHER_PYTHON: of an environment with a release of torch whose batch normalisation has other bits."""
    other = os.environ.get("NNDIST_OTHER_PYTHON")
    if not other:
        pytest.skip("NNDIST_OTHER_PYTHON is not set")
    words = [ROOT / "launch/train.py", ROOT / "recipes/mnist_gan.py", "--data-source", "sample", "--max-steps", 3]
    words += [
        "--fingerprint-every",
        1,
        "--threads",
        1,
        "--no-figures",
        "--no-report",
        "--no-progress",
        "--wandb",
        "off",
    ]
    runs = []
    for name, python in (("ours", sys.executable), ("theirs", other)):
        flags = ["--runs-dir", tmp_path, "--run", name]
        done = subprocess.run(
            [python, *map(str, [*words, *flags])],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        succeeded(done)
        runs.append(tmp_path / "mnist_gan" / name)
    releases = [json.loads((run / "run.json").read_text())["versions"]["torch"] for run in runs]
    said = f"torch ({releases[0]} and {releases[1]})"
    here = bisected(*runs)
    assert here["step"] and f"; they differ in {said}. Give --python the Python of run B's" in here["cause"], here
    there = vars(bisect(*runs, trust=False, say=lambda line: None, python=other))
    assert there["step"] == here["step"] and there["cause"].endswith(f"; the runs differ in {said}"), there["cause"]
    assert re.match(r"a different result of \w+ of (discriminator|generator)\.\w+", there["cause"]), there["cause"]


@pytest.mark.long
def test_fingerprints_of_fewer_steps_leave_fewer_to_train_again(tmp_path):
    runs = [
        trained(tmp_path / name, "--fingerprint-every", 4, "--log-every", 24, "--evaluate-every", "4 epochs", *flags)[0]
        for name, flags in (("a", []), ("b", ["--schedule", "step", "--decay-steps", 5, "--decay-factor", 0.5]))
    ]
    said: list[str] = []
    found = vars(bisect(*runs, trust=False, say=said.append))
    assert (found["same_until"], found["differs_at"], found["step"]) == (4, 8, 6)
    assert said[0] == "training steps 1 to 8 of both again", "the last checkpoint on which they agree is the start"


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_several_processes_bisect_their_runs(uninterrupted, tmp_path, world_size):
    """Two runs of that many processes; they differ in what one of their fields says."""
    flags = ("--save-every", "5 steps")
    runs = [uninterrupted(world_size, *flags).place, uninterrupted(world_size, *flags, "--momentum", 0.8).place]
    launched = Processes(world_size, ["bisect", *runs, "--json"], folder=tmp_path, call=main)
    assert launched.wait() == [1] * world_size, launched.said()
    found = json.loads(next(line for line in launched.said().splitlines() if line.startswith("{")))
    assert found["step"] == 1 and found["cause"].endswith("; the runs differ in momentum (0.9 and 0.8)"), found
    assert re.search(r"a different result of .*\(process 0\)", found["cause"])


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_several_processes_audit_their_run(uninterrupted, tmp_path, world_size):
    run = uninterrupted(world_size, "--save-every", "5 steps")
    words = ["audit", run.place, "--stretches", 2, "--seed", 1, "--json"]
    launched = Processes(world_size, words, folder=tmp_path, call=main)
    assert launched.wait() == [0] * world_size, launched.said()
    found = json.loads(next(line for line in launched.said().splitlines() if line.startswith("{")))
    assert found["holds"] and len(found["trained_again"]) == 2, found


@pytest.mark.parametrize("error", [KeyError("uid not found: 1234"), OSError("No username"), ImportError("pwd")])
def test_a_page_can_be_signed_where_the_user_has_no_name(monkeypatch, error):
    """A container's user need not be in /etc/passwd."""

    def unnamed():
        raise error

    monkeypatch.setattr(audit_page.getpass, "getuser", unnamed)
    assert audit_page.user() == "an unnamed user"


def test_an_audit_of_an_honest_run_holds(whole):
    done = succeeded(command(AUDIT, whole, "--stretches", 2, "--seed", 1))
    assert done.stdout.count("holds") == 6 and "FAILS" not in done.stdout
    assert "2 of 5 stretches were trained again (seed 1)" in done.stdout and "probability 0.60" in done.stdout
    page = (whole / "replay/audit.html").read_text()
    assert f"page     {whole / 'replay/audit.html'}" in done.stdout
    again = re.findall(r"steps (\d+) to (\d+) ", done.stdout)
    left = [pair for pair in itertools.pairwise(["0", "5", "10", "15", "20", "24"]) if pair not in again]
    assert "Everything examined holds." in page and len(left) == 3
    assert ", ".join(f"steps {a} to {b}" for a, b in left) + ": not trained again" in page
    assert hashlib.sha256((whole / "metrics.jsonl").read_bytes()).hexdigest() in page, "it names the run that it is of"


def test_the_chance_to_miss_a_forgery_is_that_of_drawing_none():
    draws = list(itertools.combinations(range(7), 3))
    for forged in range(1, 6):
        none = sum(not set(draw) & set(range(forged)) for draw in draws)
        assert missed(7, 3, forged) == pytest.approx(none / len(draws))


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


def test_every_checkpoint_names_the_records_recipe_and_data_before_it(whole, tmp_path):
    """Also one that is not the newest, and whose own hashes agree."""
    from nndist.runs import checkpoint, checkpoint_writer

    for name, row in (("metrics_chain", "records"), ("source_sha256", "recipe"), ("fingerprint", "data")):
        forged = copied(whole, tmp_path / name)
        saved = checkpoint.read(forged / "checkpoints/step-00000010")
        assert isinstance(saved.state[name], str)
        saved.state[name] = saved.state[name][::-1]
        checkpoint_writer.publish(forged / "checkpoints", saved)
        done = command(AUDIT, forged)
        assert done.returncode == 1 and f"FAILS    {row}" in done.stdout, done.stdout
        assert done.stdout.count("FAILS") == 1, done.stdout

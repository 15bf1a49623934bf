"""`--recheck-every`: a machine that computes wrongly is found and named, and on others nothing changes."""

import json
import platform
import re

import pytest
import torch
from launching import ROOT, Processes
from resuming import over_the_network

from nndist.runs.fingerprints import fingerprint

RECIPE = ROOT / "tests/workers/corrupted.py"
FILES = ("model", "ema", "optimizer", "random", "python")
STEPS = 11  # an epoch, whose last batch is a smaller one
LONG = pytest.mark.long
EVERY_STEP = ("--recheck-every", 1)


def train(folder, world_size, *flags, run="run", flip="", patch=None, recipe=RECIPE):
    """Trains; gives the run's folder, what was said and the exit codes."""
    words = [
        recipe,
        "--runs-dir",
        folder,
        "--run-name",
        run,
        "--threads",
        1,
        "--log-every",
        3,
        "--save-every",
        "4 steps",
    ]
    words += ["--epochs", 1]
    words += ["--no-progress", "--no-figures", "--no-report", "--timeout-seconds", 60, *flags]
    launched = Processes(world_size, words, folder=folder, env={"FLIP": flip} if flip else {}, patch=patch)
    codes = launched.wait()
    return folder / recipe.stem / run, launched.said(), codes


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory):
    """Runs without the flag, by processes and other flags."""
    folder, made = tmp_path_factory.mktemp("unchecked"), {}

    def get(world_size, *flags, patch=None):
        key = (world_size, *flags, patch)
        if key not in made:
            made[key], said, codes = train(folder, world_size, *flags, run=str(len(made)), patch=patch)
            assert not any(codes), said
        return made[key]

    return get


def state(run):
    """All that a run ends with: files by name, and the records without what tells of the machine."""
    newest = max((run / "checkpoints").glob("step-*"))
    assert newest.name == f"step-{STEPS:08}"
    files = {name: (newest / f"{name}.safetensors").read_bytes() for name in FILES}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "seconds_per_epoch", "examples_per_second", "load", "memory", "traffic", "chain")
    records = [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]
    python = json.loads((newest / "manifest.json").read_text())["state"]["ranks"]
    return files, records, python


@pytest.mark.parametrize(
    "world_size, flags, patch",
    [
        (1, ("--accumulate", 2), None),
        pytest.param(2, ("--accumulate", 2), None, marks=pytest.mark.nightly),
        (3, (), None),
        pytest.param(3, ("--accumulate", 2), over_the_network, marks=LONG),
        pytest.param(2, ("--gradient-sync", "ddp"), None, marks=pytest.mark.nightly),
        pytest.param(3, ("--gradient-sync", "ddp", "--accumulate", 2), None, marks=pytest.mark.nightly),
        pytest.param(2, ("--precision", "bf16"), None, marks=pytest.mark.nightly),
        pytest.param(2, ("--precision", "bf16", "--gradient-sync", "ddp"), None, marks=LONG),
    ],
)
def test_training_has_the_bits_that_it_has_without(unchecked, tmp_path, world_size, flags, patch):
    """Two networks against each other, BatchNorm, dropout, generators, counters, lists."""
    run, said, codes = train(tmp_path, world_size, *flags, *EVERY_STEP, patch=patch)
    assert codes == [0] * world_size, said
    assert said.count("recheck  every 1 steps each share of the batch is computed twice") == 1
    ours, theirs = state(run), state(unchecked(world_size, *flags, patch=patch))
    assert [name for name in FILES if ours[0][name] != theirs[0][name]] == []
    assert ours[1:] == theirs[1:]


@pytest.mark.parametrize(
    "world_size, flip, named",
    [
        (1, "0 6 activation 2", r"process 0 \(HOST\): the output of generator.0 came out differently when"),
        pytest.param(
            1,
            "0 6 gradient 1",
            r"process 0 \(HOST\): the gradient of generator.0.(weight|bias) came out differently",
            marks=LONG,
        ),
        (2, "1 6 weight 1", r"processes 0 \(HOST\) and 1 \(HOST\): generator.0.weight has different bits on each"),
        pytest.param(
            2,
            "1 6 activation 1",
            r"process 1 \(HOST\): the output of generator.0 came out differently on the other process, and in",
            marks=LONG,
        ),
        (2, "0 6 gradient always", r"processes 0 .* and 1 .*: the gradient of generator.0.* differently on each"),
        pytest.param(
            3,
            "2 6 weight 1",
            r"process 2 \(HOST\): generator.0.weight differs from its copies on the other processes",
            marks=LONG,
        ),
        pytest.param(
            3,
            "2 6 activation 2",
            r"process 2 \(HOST\): the output of generator.0 .* than on two other processes",
            marks=LONG,
        ),
        (3, "1 6 gradient 1", r"process 1 \(HOST\): the gradient of generator.0.* than on two other processes"),
        (3, "1 6 activation always", r"process 1 \(HOST\): the output of generator.0 .* its own share .* another's"),
    ],
)
def test_a_flipped_bit_stops_the_run_and_is_named_once(tmp_path, world_size, flip, named):
    run, said, codes = train(tmp_path, world_size, "--recheck-every", 3, flip=flip)
    assert all(codes) and said.count("error:") == 1, said
    line = next(line for line in said.splitlines() if line.startswith("error:"))
    assert re.search(f"step 6: silent corruption on {named}".replace("HOST", re.escape(platform.node())), line), line
    about = json.loads((run / "run.json").read_text())
    assert about["status"] == "failed" and about["problem"] == line.removeprefix("error: ") and about["step"] == 5
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"], "the one before is kept"


def test_the_same_command_goes_on_from_the_checkpoint_before_with_the_same_bits(unchecked, tmp_path):
    train(tmp_path, 2, *EVERY_STEP, "--accumulate", 2, flip="1 6 gradient 1")
    run, said, codes = train(tmp_path, 2, *EVERY_STEP, "--accumulate", 2)
    assert not any(codes) and "resumed from step 4" in said, said
    assert state(run)[:2] == state(unchecked(2, "--accumulate", 2))[:2]


@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_that_depend_on_the_time_are_not_called_corruption(tmp_path, world_size):
    _, said, codes = train(tmp_path, world_size, *EVERY_STEP, "--clock")
    assert all(codes) and said.count("error:") == 1, said
    assert "error: step 1: the losses came out differently each time" in said and "is not deterministic" in said
    assert "corruption" not in said


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--recheck-every", 0), "--recheck-every 0: must be at least 1"),
        (
            ("--recheck-every", 2, "--shard", "fsdp"),
            "--recheck-every: no process has a whole network with --shard fsdp",
        ),
    ],
)
def test_what_can_not_be_checked_is_refused(tmp_path, flags, said):
    _, printed, codes = train(tmp_path, 2, *flags)
    assert all(codes) and said in printed and printed.count("error:") == 1, printed


def test_a_value_that_only_advances_is_refused(tmp_path):
    recipe = tmp_path / "advancing.py"
    recipe.write_text(
        "from dataclasses import dataclass\nfrom toys import Line\n\nNUMBERS = iter(range(10**6))\n\n\n"
        "@dataclass(kw_only=True)\nclass Advancing(Line):\n    pass\n"
    )
    _, said, codes = train(tmp_path, 1, *EVERY_STEP, recipe=recipe)
    assert codes == [2] and "advancing.NUMBERS is changed by a pass and can't be put back" in said, said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.complex64])
def test_a_fingerprint_sees_every_bit_and_the_order(dtype):
    tensor = torch.arange(70_000, dtype=torch.float32).to(dtype)
    before = fingerprint(tensor).item()
    assert fingerprint(tensor.clone()).item() == before
    assert fingerprint(tensor.view(7, 10_000).t().contiguous().t()).item() == before, "whatever its layout in memory"
    size = tensor.element_size()
    for place in (0, 1, 65_535, 65_536, 69_999):
        for bit in (0, 7):
            other = tensor.clone()
            other.view(torch.uint8)[place * size] ^= 1 << bit
            assert fingerprint(other).item() != before, (place, bit)
    swapped = tensor.clone()
    swapped[3], swapped[4] = tensor[4], tensor[3]
    assert fingerprint(swapped).item() != before

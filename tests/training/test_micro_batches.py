"""Where memory is short: the micro-batches of all processes become smaller, the batch and the result stay."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from launching import ROOT, Processes
from torch import nn

from nndist.cli.train import where_from
from nndist.errors import ShortOfMemory, TrainingError, out_of_memory
from nndist.runs import checkpoint
from nndist.training.micro_batches import MicroBatches

HUNGRY = ROOT / "tests/workers/hungry.py"
STEPS = 7
FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors")


def train(folder, run, world_size=1, *flags, hungry=None, steps=STEPS, recipe=HUNGRY):
    """Trains, and gives what was said and the exit codes."""
    flags = [*flags, "--max-steps", steps, "--log-every", 1, "--runs-dir", folder, "--run-name", run, "--threads", 1]
    more = ["--no-progress", "--no-figures", "--no-report", "--timeout-seconds", 60]
    env = {"HUNGRY": hungry} if hungry else {}
    processes = Processes(world_size, [recipe, *flags, *more], folder=folder, env=env)
    codes = processes.wait()
    return processes.said(), codes


def newest(folder, run, recipe="hungry"):
    return max((folder / recipe / run / "checkpoints").glob("step-*"))


def same_bits(ours, theirs):
    return all((ours / file).read_bytes() == (theirs / file).read_bytes() for file in FILES)


def same_up_to_rounding(ours, theirs):
    ours, theirs = (checkpoint.read(path).tensors["model.safetensors"] for path in (ours, theirs))
    return all(((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()).item() < 1e-12 for n in theirs)


def plan(folder, run, recipe="hungry"):
    return json.loads((folder / recipe / run / "run.json").read_text())["plan"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Runs that were started with so many micro-batches and have all memory, by processes and micro-batches."""
    folder = tmp_path_factory.mktemp("given")
    made = {}

    def trained(world_size, accumulate, *flags):
        key = (world_size, accumulate, *flags)
        if key not in made:
            run = str(len(made))
            said, codes = train(folder, run, world_size, *flags, "--accumulate", accumulate)
            assert codes == [0] * world_size and "memory   short" not in said, said
            made[key] = newest(folder, run)
        return made[key]

    return trained


def system_refuses():
    torch.empty(1 << 60, dtype=torch.uint8)


def no_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_workspace():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def other_error():
    torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.parametrize(
    "work, short", [(system_refuses, True), (no_gpu_memory, True), (no_workspace, True), (other_error, False)]
)
def test_what_says_that_there_is_no_memory(work, short):
    with pytest.raises(RuntimeError) as caught:
        work()
    assert out_of_memory(caught.value) == short
    assert ("process 1: out of memory (" in where_from(caught.value, 1)) == short


@pytest.mark.parametrize("world_size, examples, used", [(1, 6, 4), (2, 6, 2), (3, 3, 4)])
def test_all_take_smaller_micro_batches_where_one_lacks_memory(given, tmp_path, world_size, examples, used):
    """Of 22 examples: 22, 11 and 8 at a time are too many for the last rank."""
    hungry = f"{world_size - 1} {examples} 1"
    said, codes = train(tmp_path, "short", world_size, hungry=hungry)
    assert codes == [0] * world_size, said
    note = f"short: {used} micro-batches, not 1; the batch stays 22"
    assert said.count(f"memory   {note}\n") == 1, said
    assert plan(tmp_path, "short")["memory"] == note
    assert f"x {world_size} x {used} accumulated" in plan(tmp_path, "short")["batch"]
    ours = newest(tmp_path, "short")
    assert same_bits(ours, given(world_size, used))
    assert same_up_to_rounding(ours, given(1, 1))


def test_dropout_draws_what_it_would_have_drawn(given, tmp_path):
    flags = ("--dropout", 0.3)
    said, codes = train(tmp_path, "short", 1, *flags, hungry="0 11 1")
    assert codes == [0] and "short: 2 micro-batches" in said, said
    assert same_bits(newest(tmp_path, "short"), given(1, 2, *flags))


def test_gradients_of_the_micro_batches_before_are_dropped(given, tmp_path):
    """The second of two fails, when the first one's are there."""
    said, codes = train(tmp_path, "short", 1, "--norm", "--accumulate", 2, hungry="0 6 2")
    assert codes == [0] and said.count("memory   short: 4 micro-batches, not 2;") == 1, said
    assert same_bits(newest(tmp_path, "short"), given(1, 4, "--norm"))


def test_a_second_network_fails_after_the_first_one_was_updated(given, tmp_path):
    """That update is not taken twice: the run ends, and resumes from an earlier step."""
    flags = ("--two", "--save-every", "1 steps")
    said, codes = train(tmp_path, "short", 1, *flags, hungry="0 6 5")
    assert codes == [1] and said.count("error: ") == 1 and "--accumulate 2 resumes" in said, said
    said, codes = train(tmp_path, "short", 1, *flags, "--accumulate", 4, hungry="0 6 1")
    assert codes == [0] and "resumed from step" in said, said
    assert same_up_to_rounding(newest(tmp_path, "short"), given(1, 1, "--two"))


def test_the_small_last_batch_of_batch_norm_is_not_split_into_single_examples(tmp_path):
    """200 examples in batches of 22 end with one of 2."""
    said, codes = train(tmp_path, "split", 1, "--norm", "--accumulate", 8)
    assert codes == [0], said


def test_batch_norm_counts_no_failed_pass_and_the_plan_says_what_changes(given, tmp_path):
    said, codes = train(tmp_path, "short", 1, "--norm", hungry="0 4 1")
    assert codes == [0] and "BatchNorm sees 3\n" in said, said
    assert same_bits(newest(tmp_path, "short"), given(1, 8, "--norm"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_goes_on_in_the_micro_batches_that_it_had(given, tmp_path, world_size):
    """With all memory back, and interrupted again, it ends in the same bits; unless told otherwise."""
    said, codes = train(tmp_path, "once", world_size, hungry="0 6 1", steps=3)
    assert codes == [0] * world_size, said
    shutil.copytree(tmp_path / "hungry/once", tmp_path / "hungry/other")
    said, codes = train(tmp_path, "once", world_size)
    used = 4 // world_size
    assert codes == [0] * world_size and f"memory   short: {used} micro-batches" in said, said
    assert same_bits(newest(tmp_path, "once"), given(world_size, used))
    said, codes = train(tmp_path, "other", world_size, "--accumulate", 3)
    assert codes == [0] * world_size and "memory   short" not in said and "x 3 accumulated" in said, said


@pytest.mark.parametrize(
    "call, flags",
    [
        (6, ()),
        (1, ("--shard", "fsdp")),
        pytest.param(1, ("--norm",), marks=pytest.mark.nightly),
        pytest.param(3, ("--gradient-sync", "ddp"), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_several_processes_that_can_not_agree_say_one_line(given, tmp_path, call, flags):
    """In mid-training, or if the others wait in their passes; the line names the remedy, and the run resumes."""
    expected = given(2, 2, "--norm") if "--norm" in flags else given(1, 1)  # its statistics are a micro-batch's
    flags = (*flags, "--save-every", "1 steps")
    said, codes = train(tmp_path, "late", 2, *flags, hungry=f"1 6 {call}")
    assert 1 in codes
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: process 1: out of memory in a step (") and "can't allocate memory" in line
    assert "--accumulate 2" in line and "Traceback" not in said
    said, codes = train(tmp_path, "late", 2, *flags, "--accumulate", 2, hungry=f"1 6 {call}")
    assert codes == [0, 0] and ("resumed from step" in said) == (call > 1), said
    assert same_up_to_rounding(newest(tmp_path, "late"), expected)


def test_the_remedy_names_the_smallest_micro_batch_that_batch_norm_allows():
    feed = SimpleNamespace(accumulate=2, largest_micro_batch=2)
    step = SimpleNamespace(networks={"model": nn.BatchNorm1d(2)})
    micro_batches = MicroBatches(step, feed, SimpleNamespace(world_size=1))
    assert micro_batches._remedy().startswith("a micro-batch is only 2 examples, which BatchNorm needs; use a smaller")


def test_what_a_gradient_hook_sees_is_not_made_smaller():
    network = nn.Linear(2, 1)
    network.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    feed = SimpleNamespace(accumulate=1, largest_micro_batch=8)
    runtime = SimpleNamespace(world_size=1, device=torch.device("cpu"))
    micro_batches = MicroBatches(SimpleNamespace(networks={"model": network}), feed, runtime)
    line = r"out of memory in a step \(none\); model.weight has a gradient hook, .* in before_update\(\) instead"
    with pytest.raises(TrainingError, match=line), micro_batches.attempt():
        raise ShortOfMemory("none", False, 0)
    assert not micro_batches.is_short


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_single_example_that_is_too_much_is_one_line(tmp_path, world_size):
    said, codes = train(tmp_path, "never", world_size, hungry=f"{world_size - 1} 0 1")
    assert codes[0] in (1, 2) and said.count("error: ") == 1 and "single example" in said, said


def test_an_evaluation_without_memory_names_its_own_flag(tmp_path):
    recipe = tmp_path / "wide.py"
    recipe.write_text(HUNGRY.read_text().replace('networks["model"].training and process', "process"))
    said, codes = train(tmp_path, "wide", 1, "--batch-size", 4, hungry="0 5 1", recipe=recipe)
    assert codes == [1] and "in an evaluation" in said and "give --eval-batch-size 500" in said, said
    said, codes = train(tmp_path, "wide", 1, "--batch-size", 4, "--eval-batch-size", 3, hungry="0 5 1", recipe=recipe)
    assert codes == [0], said

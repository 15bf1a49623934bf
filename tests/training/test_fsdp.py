"""Networks split over the processes (--shard fsdp): the steps of DDP, and checkpoints that anyone can read."""

import functools
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from differences import relative_difference
from launching import ROOT, Processes, command, succeeded
from safetensors import safe_open
from safetensors.torch import load_file
from workers import fsdp

from nndist.config import RunConfig
from nndist.errors import UserError
from nndist.files import write_json
from nndist.runs import checkpoint, checkpoint_writer
from nndist.runs.checkpoint import DamagedCheckpoint
from nndist.runs.checkpoint_writer import TensorFile
from nndist.runs.records import without_times
from nndist.training import sharded_saving
from nndist.training.sharded_saving import shared_out

WORKER = ROOT / "tests/workers/fsdp.py"
GPT = f"{WORKER}:TinyGPT"
THREE = pytest.param(3, marks=pytest.mark.long)
WORLD_SIZES = (2, THREE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of runs per world size, each under DDP (`<name>-none`) and split (`<name>-fsdp`), when asked for.

    A number with "more" gives the runs of more optimizers alone.
    """

    class Folders(dict):
        def __missing__(self, key):
            world_size, *more = key if isinstance(key, tuple) else (key,)
            folder = self[key] = tmp_path_factory.mktemp(f"world{world_size}")
            launched = Processes(world_size, [folder, *more], folder=folder, call=fsdp.main)
            assert not any(launched.wait(300)), launched.said()
            return folder

    return Folders()


def outcomes(folder, world_size, run):
    """What each process reported of a run, by rank."""
    return [json.loads((folder / f"outcomes-{rank}.json").read_text())[run] for rank in range(world_size)]


def newest(folder, run) -> Path:
    (place,) = folder.glob(f"*/{run}")
    return checkpoint.checkpoints_in(place / "checkpoints")[-1][1]


def tensors_of(path, file="model.safetensors"):
    """All tensors of a checkpoint's file, whichever files stand for it."""
    return checkpoint.read(path).tensors[file]


def close_scores(ours, theirs):
    ours, theirs = without_times(ours), without_times(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"data"}:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-9), name


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("run", ["plain", "accumulated", "last1", "gan", "sequences", "tied"])
def test_each_process_holds_a_part_of_every_parameter(folders, world_size, run):
    reports = outcomes(folders[world_size], world_size, f"{run}-fsdp")
    assert all(report["kinds"] == ["DTensor"] for report in reports)
    whole = reports[0]["whole"]
    assert sum(report["held"] for report in reports) == whole
    # a dimension of 5 over 3 processes is 2, 2 and 1
    assert all(report["held"] < (0.45 if world_size == 3 else 0.62) * whole for report in reports)
    under_ddp = outcomes(folders[world_size], world_size, f"{run}-none")
    assert all(report["kinds"] == ["Parameter"] and report["held"] == whole for report in under_ddp)


EXACT = ["plain", "accumulated", "last1", "recomputed", "tied", "sequences"]
COMPARED = [(run, 2) for run in EXACT]
COMPARED += [pytest.param(run, 3, marks=pytest.mark.long) for run in (*EXACT, *fsdp.OPTIMIZERS, "Muon")]
COMPARED += [pytest.param(run, (3, "more"), marks=pytest.mark.nightly) for run in fsdp.MORE_OPTIMIZERS]


@pytest.mark.parametrize("run, key", COMPARED)
def test_the_weights_and_optimizer_of_ddp(folders, key, run):
    """In float64: with clipping, accumulation, dropout, averages, tied and padded weights, uneven and empty slices."""
    ours, theirs = (checkpoint.read(newest(folders[key], f"{run}-{shard}")) for shard in ("fsdp", "none"))
    assert ours.step == theirs.step and ours.tensors.keys() == theirs.tensors.keys()
    assert ("ema.safetensors" in ours.tensors) == (run == "accumulated")
    for file in ours.tensors.keys() - {"random.safetensors"}:
        if not theirs.tensors[file]:
            assert not ours.tensors[file]  # plain SGD has no state
            continue
        # attention's key bias has a gradient of rounding only, which these make as large as any
        tolerance = {"Adagrad": 1e-10, "Adafactor": 1e-5}.get(run, 1e-12)
        assert relative_difference(ours.tensors[file], theirs.tensors[file]) < tolerance
        rest = {name: t for name, t in ours.tensors[file].items() if "qkv.bias" not in name}
        assert relative_difference(rest, {name: theirs.tensors[file][name] for name in rest}) < 1e-12
        assert all(tensor.dtype == theirs.tensors[file][name].dtype for name, tensor in ours.tensors[file].items())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("run", EXACT)
def test_the_losses_norms_and_scores_of_ddp(folders, world_size, run):
    for report, under_ddp in zip(
        *(outcomes(folders[world_size], world_size, f"{run}-{shard}") for shard in ("fsdp", "none")), strict=True
    ):
        for ours, theirs in zip(report["history"], under_ddp["history"], strict=True):
            close_scores(ours, theirs)
        close_scores(report["scores"], under_ddp["scores"])
    history = outcomes(folders[world_size], world_size, f"{run}-fsdp")[0]["history"]
    norms = [record["gradient_norm"] for record in history if "gradient_norm" in record]
    if run in ("plain", "accumulated", "recomputed"):
        assert max(norms) > 0.5, "some steps were clipped"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_two_networks_with_batch_norm(folders, world_size):
    ours, theirs = (tensors_of(newest(folders[world_size], f"gan-{shard}")) for shard in ("fsdp", "none"))
    moving = [name for name in theirs if theirs[name].is_floating_point()]
    assert relative_difference({n: ours[n] for n in moving}, {n: theirs[n] for n in moving}) < 1e-4  # float32
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs.keys() - moving)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_recomputed_activations_change_no_bit(folders, world_size):
    for shard in ("fsdp", "none"):
        ours, theirs = (newest(folders[world_size], f"{run}-{shard}") for run in ("recomputed", "plain"))
        ours, theirs = tensors_of(ours), tensors_of(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradients_can_be_sent_in_half_the_bytes(folders, world_size):
    folder = folders[world_size]
    compressed, exact, under_ddp = (tensors_of(newest(folder, run)) for run in ("bf16-fsdp", "short-fsdp", "bf16-none"))
    assert 1e-5 < relative_difference(compressed, exact) < 0.1
    assert relative_difference(compressed, under_ddp) < 0.1  # which rounds elsewhere


@pytest.mark.parametrize("world_size", [THREE])
def test_weights_gathered_in_bf16_are_kept_and_summed_in_fp32(folders, world_size):
    """The weights end about as far from those of fp32 as under autocast alone."""
    folder = folders[world_size]
    mixed, autocast, exact = (tensors_of(newest(folder, run)) for run in ("mixed-fsdp", "mixed-none", "exact-none"))
    assert relative_difference(mixed, exact) < 2 * relative_difference(autocast, exact)
    for tensors in (mixed, tensors_of(newest(folder, "mixed-fsdp"), "optimizer.safetensors")):
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in mixed.values())
    sent = outcomes(folder, world_size, "mixed-fsdp")[0]["sent"]
    gathered, summed = (
        {dtype for what, dtype in sent if what == f"gloo:{name}"} for name in ("all_gather", "all_reduce")
    )
    assert "BFloat16" in gathered and "Float" not in gathered and "BFloat16" not in summed, sent


# The files of a checkpoint.


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_any_tool_can_open_the_files(folders, world_size):
    path = newest(folders[world_size], "accumulated-fsdp")
    for name in ("model", "ema", "optimizer"):
        index = json.loads((path / f"{name}.safetensors.index.json").read_text())
        files = [f"{name}-{n:05d}-of-{world_size:05d}.safetensors" for n in range(1, world_size + 1)]
        assert sorted(set(index["weight_map"].values())) == files
        assert sorted(file.name for file in path.glob(f"{name}-*")) == files
        loaded = {file: load_file(path / file) for file in files}
        for key, file in index["weight_map"].items():
            assert key in loaded[file]
        assert sum(map(len, loaded.values())) == len(index["weight_map"])
        sizes = [sum(t.numel() * t.element_size() for t in found.values()) for found in loaded.values()]
        assert index["metadata"]["total_size"] == sum(sizes)
        if name != "ema":
            assert max(sizes) < 1.3 * sum(sizes) / world_size, "each process writes about as much"
    under_ddp = load_file(newest(folders[world_size], "accumulated-none") / "model.safetensors")
    together = {key: tensor for file in path.glob("model-*") for key, tensor in load_file(file).items()}
    assert relative_difference(together, under_ddp) < 1e-12
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    with safe_open(path / f"model-00001-of-{world_size:05d}.safetensors", "pt") as opened:
        assert opened.keys()


def test_the_weights_open_in_a_plain_network(folders):
    from workers.fsdp import TinyGPT

    def answers(run):
        network = TinyGPT(text=folders[2] / "text.txt").networks()["model"].double()
        files = sorted(newest(folders[2], run).glob("model*.safetensors"))
        network.load_state_dict({key: tensor for file in files for key, tensor in load_file(file).items()})
        return network(torch.arange(8).unsqueeze(0))

    torch.testing.assert_close(answers("plain-fsdp"), answers("plain-none"), rtol=1e-9, atol=1e-9)


def test_commands_read_it(folders, tmp_path):
    run = newest(folders[2], "accumulated-fsdp").parent.parent
    script = ROOT / "launch/checkpoint.py"
    shown = succeeded(command(script, "verify", run)).stdout
    assert "model.safetensors" in shown and "hash correct" in shown
    succeeded(command(script, "convert", run, tmp_path / "weights.safetensors"))
    succeeded(command(script, "convert", run, tmp_path / "average.safetensors", "--ema"))
    for file, name in (("model.safetensors", "weights"), ("ema.safetensors", "average")):
        found = load_file(tmp_path / f"{name}.safetensors")
        expected = tensors_of(newest(folders[2], "accumulated-fsdp"), file)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_an_index_that_lies_is_noticed(folders, tmp_path):
    source = newest(folders[2], "plain-fsdp")
    path = tmp_path / source.name
    shutil.copytree(source, path)
    manifest = json.loads((path / "manifest.json").read_text())
    index = json.loads((path / "model.safetensors.index.json").read_text())
    key = next(iter(index["weight_map"]))
    other = set(index["weight_map"].values()) - {index["weight_map"][key]}
    index["weight_map"][key] = other.pop()
    said = checkpoint_writer.write_file(path / "model.safetensors.index.json", json.dumps(index).encode())
    manifest["files"]["model.safetensors.index.json"] = said
    manifest["sha256"] = checkpoint.own_hash(manifest)
    write_json(path / "manifest.json", manifest)
    with pytest.raises(DamagedCheckpoint, match=r"model.safetensors.index.json: does not name what the files hold"):
        checkpoint.read(path)


def test_a_file_written_tensor_by_tensor_is_a_safetensors_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype): torch.randint(0, 2, (3, 5), generator=generator).to(dtype) for dtype in checkpoint_writer.DTYPES
    } | {"scalar": torch.tensor(3.5), "nothing": torch.empty(0, 4), "transposed": torch.rand(4, 3).t()}
    file = TensorFile(tmp_path / "it.safetensors", tensors)
    for tensor in tensors.values():
        file.add(tensor)
    said = file.close()
    found = load_file(tmp_path / "it.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert said["bytes"] == (tmp_path / "it.safetensors").stat().st_size


@pytest.mark.parametrize(
    "sizes, count, expected",
    [
        ({"a": 4, "b": 3, "c": 3, "d": 2}, 2, {"a": 0, "b": 1, "c": 1, "d": 0}),
        ({"a": 1, "b": 9}, 3, {"b": 0, "a": 1}),
        ({}, 2, {}),
        ({"a": 1, "b": 1, "c": 1}, 1, {"a": 0, "b": 0, "c": 0}),
    ],
)
def test_tensors_are_shared_out_by_their_bytes(sizes, count, expected):
    assert shared_out(sizes, count) == expected


# Resumed, killed, on a full disk.


class Launches:
    """One run in a folder of its own, launched as often as it takes, with any number of processes."""

    def __init__(self, folder: Path, *flags):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        (folder / "text.txt").write_text("".join(chr(97 + (n * n + n // 7) % 23) for n in range(900)))
        self.flags = ["--runs-dir", folder, "--run", "it", "--no-progress", "--no-figures", "--threads", 1]
        self.flags += ["--text", folder / "text.txt", "--timeout-seconds", 20, "--log-every", 1, *flags]

    def launch(self, world_size, *flags, fault=None, patch=None) -> Processes:
        env = {"FAULT": fault} if fault else {}
        return Processes(world_size, [GPT, *self.flags, *flags], env=env, folder=self.folder, patch=patch)

    def finish(self, world_size, *flags, **named) -> str:
        launched = self.launch(world_size, *flags, **named)
        codes = launched.wait()
        assert not any(codes), f"{codes}\n{launched.said()}"
        return launched.said()

    def fail(self, world_size, *flags, **named) -> tuple[list[int], str]:
        launched = self.launch(world_size, *flags, **named)
        codes = launched.wait()
        assert any(codes), launched.said()
        return codes, launched.said()

    @property
    def place(self) -> Path:
        return self.folder / "fsdp/it"

    def newest(self) -> Path:
        return checkpoint.checkpoints_in(self.place / "checkpoints")[-1][1]

    def records(self):
        lines = [json.loads(line) for line in (self.place / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in without_times(line).items() if k != "data"} for line in lines]


FSDP = ("--shard", "fsdp")
EXACTLY = (*FSDP, "--save-every", "4 steps", "--max-steps", 14, "--dropout", 0.2, "--ema-decay", 0.9)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One uninterrupted run per set of flags, made on first use."""
    made: dict = {}

    def get(world_size, *flags) -> Launches:
        if (world_size, *flags) not in made:
            run = made[world_size, *flags] = Launches(tmp_path_factory.mktemp("uninterrupted"), *flags)
            run.finish(world_size)
        return made[world_size, *flags]

    return get


def assert_same(run: Launches, other: Launches) -> None:
    """Every bit of every file but the manifest, whose scores, position and window must agree; and the records."""
    ours, theirs = run.newest(), other.newest()
    names = sorted(path.name for path in theirs.iterdir())
    assert ours.name == theirs.name and sorted(path.name for path in ours.iterdir()) == names
    for name in names:
        if name != "manifest.json":
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert run.records() == other.records()
    states = [json.loads((path / "manifest.json").read_text())["state"] for path in (ours, theirs)]
    for state in states:
        for name in ("metrics_bytes", "metrics_chain", "saved", "data", "fields"):
            state.pop(name)
    assert states[0] == states[1]


@pytest.mark.parametrize(
    "world_size, flags, faults",
    [
        pytest.param(2, (), ["1 10 kill"], marks=pytest.mark.nightly),
        (3, ("--accumulate", 2), ["2 13 kill", "0 8 kill"]),  # in the middle of a step, before and after a save
    ],
)
def test_killed_at_a_step(tmp_path, uninterrupted, world_size, flags, faults):
    run = Launches(tmp_path, *EXACTLY, *flags)
    for fault in faults:
        run.fail(world_size, fault=fault)
    run.finish(world_size)
    assert_same(run, uninterrupted(world_size, *EXACTLY, *flags))


def steps_counted():
    """Counts the steps that this process has begun; the list grows by one for each."""
    from nndist.training.trainer import Trainer

    take_step, begun = Trainer.take_step, []

    def counted(trainer, batch):
        begun.append(trainer.step + 1)
        return take_step(trainer, batch)

    Trainer.take_step = counted
    return begun


def wait_for_step(begun, number):
    deadline = time.monotonic() + 60
    while not begun or begun[-1] < number:
        assert time.monotonic() < deadline, "training does not go on while a checkpoint is written"
        time.sleep(0.001)


def die_in_the_second_save(world_size, rank):
    """The last process ends as by kill -9 in the middle of its part of step 8's weights, while step 11 is trained."""
    add, calls, begun = TensorFile.add, [], steps_counted()

    def dying(self, tensor):
        if self.path.name.startswith("model") and self.path.parent.name.startswith(".step-00000008"):
            calls.append(1)
            if len(calls) == 3 and rank == world_size - 1:
                wait_for_step(begun, 11)
                os.kill(os.getpid(), signal.SIGKILL)
        add(self, tensor)

    TensorFile.add = dying


@pytest.mark.parametrize(
    "world_size, flags", [pytest.param(2, (), marks=pytest.mark.nightly), (3, ("--accumulate", 2))]
)
def test_killed_while_a_checkpoint_is_written_beside_training(tmp_path, uninterrupted, world_size, flags):
    run = Launches(tmp_path, *EXACTLY, *flags)
    run.fail(world_size, patch=functools.partial(die_in_the_second_save, world_size))
    assert [step for step, _ in checkpoint.checkpoints_in(run.place / "checkpoints")] == [4]
    assert [path.name for path in (run.place / "checkpoints").glob(".*")] == [".step-00000008.part"]
    run.finish(world_size)
    assert not list((run.place / "checkpoints").glob(".*"))
    assert_same(run, uninterrupted(world_size, *EXACTLY, *flags))


def a_slow_disk(rank):
    """Writing a checkpoint lasts until training is up to three steps further, and says when it begins and has ended."""
    publish, begun = sharded_saving.publish, steps_counted()

    def slow(aside, root, parts, rest):
        print(f"process {rank} begins {rest.step} in step {begun[-1]}", flush=True)
        wait_for_step(begun, min(rest.step + 3, 14))
        publish(aside, root, parts, rest)
        time.sleep(0.2)  # the next save is due meanwhile
        print(f"process {rank} has written {rest.step}", flush=True)

    sharded_saving.publish = slow


def test_training_goes_on_while_a_checkpoint_is_written_and_two_never_overlap(tmp_path, uninterrupted):
    run = Launches(tmp_path, *EXACTLY)
    said = run.finish(2, patch=a_slow_disk)
    for rank in (0, 1):
        events = [line for line in said.splitlines() if line.startswith(f"process {rank} ")]
        assert [event.split()[2] for event in events] == ["begins", "has"] * 4, events
        assert [event.split()[3 if "begins" in event else 4] for event in events] == [
            step for number in (4, 8, 12, 14) for step in (str(number), str(number))
        ]
    assert_same(run, uninterrupted(2, *EXACTLY))


def no_room_for_one(rank):
    """From the second checkpoint on one process can't write more than 3,000 bytes to a file: the system refuses."""
    begin = checkpoint_writer.TensorFile.__init__

    def limited(self, path, like):
        if rank == 1 and path.parent.name.startswith(".step-00000008"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
        begin(self, path, like)

    TensorFile.__init__ = limited


def test_one_process_that_cannot_write_stops_all_in_one_line(tmp_path, uninterrupted):
    run = Launches(tmp_path, *EXACTLY, "--accumulate", 2)
    codes, said = run.fail(3, patch=no_room_for_one)
    assert codes[0] == 1
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "step 8: checkpoint in" in line and "process 1: File too large" in line and "earlier ones are kept" in line
    assert [path.name for path in sorted((run.place / "checkpoints").iterdir())] == ["step-00000004"]
    run.finish(3)
    assert_same(run, uninterrupted(3, *EXACTLY, "--accumulate", 2))


FIRST, LAST = ("--max-steps", 10), ("--max-steps", 20)


@pytest.mark.parametrize(
    "launches",
    [
        [(2, FSDP), (1, FSDP)],
        [(2, FSDP), (3, FSDP)],
        [(3, FSDP), (2, ())],
        *(
            pytest.param(launches, marks=pytest.mark.nightly)
            for launches in ([(2, FSDP), (1, ())], [(1, ()), (2, FSDP)], [(2, ()), (2, FSDP)])
        ),
    ],
    ids=lambda launches: "-then-".join(f"{world_size}{'fsdp' * bool(flags)}" for world_size, flags in launches),
)
def test_a_run_resumes_with_a_different_sharding(tmp_path, uninterrupted, launches):
    """Weights, average and optimizer go from any number of processes to any other, split or not."""
    expected = uninterrupted(1, *LAST, "--ema-decay", 0.9)
    run = Launches(tmp_path, "--ema-decay", 0.9)
    for (world_size, flags), until in zip(launches, (FIRST, LAST), strict=True):
        said = run.finish(world_size, *flags, *until)
    ours, theirs = checkpoint.read(run.newest()), checkpoint.read(expected.newest())
    assert ours.step == theirs.step == 20
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert relative_difference(ours.tensors[file], theirs.tensors[file]) < 1e-12
    for record, its in zip(run.records(), expected.records(), strict=True):
        close_scores(record, its)
    (before, _), (now, _) = launches
    assert (f"{before} processes before, {now} now" in said) == (before != now)


# What is said, and what is refused.


def test_check_figures_and_plan(tmp_path):
    done = Launches(tmp_path, *FSDP, "--max-steps", 3).flags
    done.remove("--no-figures")
    launched = Processes(2, [GPT, *done], folder=tmp_path)
    assert not any(launched.wait()), launched.said()
    assert "shard    fsdp (4 units over 2 processes)" in launched.said()
    assert "prompt (from the validation part of text.txt)" in launched.said(), "written by a whole copy"
    assert "model.safetensors.index.json" in launched.said()
    assert (tmp_path / "fsdp/it/figures/samples.txt").exists()
    launched = Processes(2, [GPT, *done, "--check", "--run", "check"], folder=tmp_path)
    assert not any(launched.wait()), launched.said()
    assert launched.said().count("check passed: 1 step, test/loss") == 1


def test_one_process_has_nothing_to_split(tmp_path):
    said = Launches(tmp_path, *FSDP, "--max-steps", 3).finish(1)
    assert "shard    fsdp, 1 process: nothing to shard" in said
    assert (tmp_path / "fsdp/it/checkpoints/step-00000003/model.safetensors").exists()


@pytest.mark.parametrize("given", [{}, {"shard": "fsdp"}, {"precision": "bf16"}], ids=str)
def test_compressed_weights_without_what_they_are_for_are_one_line(given):
    with pytest.raises(UserError, match=r"^--weight-compression bf16: give it with --shard fsdp and --precision bf16$"):
        RunConfig(weight_compression="bf16", **given).validate()
    RunConfig(weight_compression="bf16", shard="fsdp", precision="bf16").validate()

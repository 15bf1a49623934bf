"""Kill any process at any instant, start the same command again: the bits are those of a run never killed."""

import json
import shutil
from pathlib import Path

import pytest
from launching import ROOT, Processes
from resuming import RECIPE, SAVES, STEPS, Run, assert_same, over_the_network


@pytest.mark.parametrize("call", [3, 12, 33, *(pytest.param(n, marks=pytest.mark.nightly) for n in (1, 6, 11, 17, 26))])
def test_killed_at_a_step(tmp_path, uninterrupted, call):
    """Before the first save, at the begin of an epoch after two, and at the last step; nightly at more of them."""
    run = Run(tmp_path, *SAVES).die(f"0 {call} kill").finish()
    assert_same(run, uninterrupted(1, *SAVES))


def test_killed_three_times_in_one_epoch_and_again(tmp_path, uninterrupted):
    run = Run(tmp_path, *SAVES)
    for fault in ("0 7 kill", "0 2 kill", "0 4 kill", "0 9 kill"):
        run.die(fault)
    assert_same(run.finish(), uninterrupted(1, *SAVES))


@pytest.mark.parametrize(
    "fault", ["1 16 kill", *(pytest.param(f, marks=pytest.mark.nightly) for f in ("0 8 kill", "2 23 kill"))]
)
def test_killed_in_the_middle_of_accumulation_at_three_processes(tmp_path, uninterrupted, fault):
    flags = (*SAVES, "--accumulate", 2)
    run = Run(tmp_path, *flags, world_size=3).die(fault).finish()
    assert_same(run, uninterrupted(3, *flags))


@pytest.mark.parametrize(
    "world_size, gradient_sync", [pytest.param(2, "step", marks=pytest.mark.nightly), (3, "step"), (3, "ddp")]
)
def test_killed_at_several_processes(tmp_path, uninterrupted, world_size, gradient_sync):
    """By a sum in shared memory, and under DDP, whose buckets are rebuilt after a first backward pass."""
    flags = (*SAVES, "--gradient-sync", gradient_sync)
    run = Run(tmp_path, *flags, world_size=world_size).die(f"{world_size - 1} 14 kill").die("0 9 kill").finish()
    assert_same(run, uninterrupted(world_size, *flags))


@pytest.mark.parametrize(
    "optimizer",
    ["Plain", "Adam", "AdamFused", "AdamWForeach", "RMSprop", "Adadelta", "Adagrad", "NAdam", "Adamax", "Adafactor"],
)
def test_every_optimizer(tmp_path, uninterrupted, optimizer):
    flags = (*SAVES, "--optimizers", optimizer)
    run = Run(tmp_path, *flags).die("0 13 kill").finish()
    assert_same(run, uninterrupted(1, *flags))


@pytest.mark.parametrize("schedule", ["constant", "warmup", "cosine", "step"])
def test_every_schedule(tmp_path, uninterrupted, schedule):
    flags = (*SAVES, "--schedule", schedule, "--warmup-steps", 6, "--decay-steps", 8)
    run = Run(tmp_path, *flags).die("0 13 kill").finish()
    assert_same(run, uninterrupted(1, *flags))


@pytest.mark.parametrize(
    "world_size, number",
    [(1, "SIGTERM"), (1, "SIGUSR1"), (3, "SIGTERM"), pytest.param(3, "SIGUSR1", marks=pytest.mark.nightly)],
)
def test_a_signal_saves_and_the_run_resumes(tmp_path, uninterrupted, number, world_size):
    run = Run(tmp_path, world_size=world_size)
    launched = (
        run.launch(fault=f"{world_size - 1} 14 term", patch=_agree_at_every_step)
        if number == "SIGTERM"
        else run.launch(patch=_send_usr1_at_step_14)
    )
    codes = launched.wait()
    expected = 128 + (15 if number == "SIGTERM" else 10)
    assert expected in codes, launched.said()
    described = json.loads((run.place / "run.json").read_text())
    assert described["status"] == "preempted" and 14 <= described["step"] < STEPS
    assert "stopped  by signal" in launched.said()
    assert_same(run.finish(), uninterrupted(world_size))


def _agree_at_every_step(rank):
    """Rather than once a second, in which a fast machine has taken all steps."""
    from nndist.training.trainer import Trainer

    take_step = Trainer.take_step

    def counted(trainer, batch):
        trainer._next_agreement = 0
        return take_step(trainer, batch)

    Trainer.take_step = counted


def _send_usr1_at_step_14(rank):
    import os
    import signal

    from nndist.training.trainer import Trainer

    _agree_at_every_step(rank)
    take_step = Trainer.take_step

    def counted(trainer, batch):
        taken = take_step(trainer, batch)
        if trainer.step == 14:
            os.kill(os.getpid(), signal.SIGUSR1)
        return taken

    Trainer.take_step = counted


def test_another_number_of_processes_goes_on_with_the_same_examples(tmp_path):
    def seen(folder, world_size):
        shares = [(folder / f"seen-{rank}").read_text().splitlines() for rank in range(world_size)]
        return [[int(n) for share in step for n in share.split()] for step in zip(*shares, strict=True)]

    alone = Run(tmp_path / "alone")
    alone.finish(env={"SEEN": str(tmp_path / "alone/seen")})
    expected = seen(tmp_path / "alone", 1)
    run = Run(tmp_path / "moved")
    taken = []
    for world_size, steps in ((1, 8), (2, 17), (3, 25), (1, STEPS)):
        part = tmp_path / f"part{steps}"
        part.mkdir()
        launched = run.launch("--max-steps", steps, world_size=world_size, env={"SEEN": str(part / "seen")})
        assert not any(launched.wait()), launched.said()
        if len(taken):
            assert "processes before" in launched.said()
        taken += seen(part, world_size)
    assert len(taken) == STEPS
    assert [sorted(step) for step in taken] == [sorted(step) for step in expected]


def test_another_way_of_adding_up_is_said(tmp_path):
    """As on another number of machines: the order of the additions is another one."""
    run = Run(tmp_path, world_size=2).finish("--max-steps", 5, patch=over_the_network)
    launched = run.launch()
    assert not any(launched.wait()), launched.said()
    assert launched.said().count("sums network before, shared memory now: bits may differ") == 1


def test_a_changed_field_is_named_and_can_be_allowed(tmp_path):
    run = Run(tmp_path).finish("--max-steps", 5)
    for flag, value, change in (("--lr", 0.5, "0.02 to 0.5"), ("--seed", 3, "0 to 3")):
        launched = run.launch(flag, value)
        assert launched.wait() == [2]
        assert f"{flag[2:]} has changed from {change}" in launched.said() and "--allow-change" in launched.said()
    run.finish("--lr", 0.5, "--allow-change", "lr")
    assert run.newest().name == "step-00000033"


def test_a_changed_recipe_file_is_noticed(tmp_path):
    recipe = tmp_path / "resumable.py"
    shutil.copy(RECIPE, recipe)
    flags = ["--runs-dir", tmp_path, "--run", "it", "--no-progress", "--no-figures"]
    assert Processes(1, [recipe, *flags, "--max-steps", 3], folder=tmp_path).wait() == [0]
    recipe.write_text(recipe.read_text() + "\n# another line\n")
    launched = Processes(1, [recipe, *flags], folder=tmp_path)
    assert launched.wait() == [2] and "the recipe's file has changed" in launched.said()
    assert Processes(1, [recipe, *flags, "--allow-change", "source"], folder=tmp_path).wait() == [0]


def test_resume_must_and_never(tmp_path):
    run = Run(tmp_path)
    launched = run.launch("--resume", "must")
    assert launched.wait() == [2] and "there is no run at" in launched.said()
    run.finish("--max-steps", 5)
    launched = run.launch("--resume", "never")
    assert launched.wait() == [2] and "--resume is never" in launched.said()
    run.finish("--resume", "must")


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run = Run(tmp_path).finish()
    before = {path: path.read_bytes() for path in run.place.rglob("*") if path.is_file() and path.name != "run.json"}
    run.finish()
    for path, data in before.items():
        assert path.name in ("lock", "report.html") or path.read_bytes() == data, path


def test_a_second_launch_of_a_run_is_refused(tmp_path):
    run = Run(tmp_path)
    first = run.launch(fault="0 5 stop")
    import time

    deadline = time.monotonic() + 60
    while not (run.place / "metrics.jsonl").exists() or not (run.place / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second = run.launch()
    assert second.wait() == [2]
    assert "is being trained by process" in second.said() and len(second.said().strip().splitlines()) == 1
    first.kill(0)
    first.wait()
    run.finish()


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(tmp_path, uninterrupted):
    flags = ("--save-every", "5 steps", "--keep", 3)
    run = Run(tmp_path, *flags).die("0 18 kill")
    newest = run.newest()
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[len(data) // 2] ^= 16
    (newest / "optimizer.safetensors").write_bytes(data)
    launched = run.launch()
    assert launched.wait() == [0], launched.said()
    assert f"damaged checkpoint: {newest.name}/optimizer.safetensors" in launched.said()
    assert_same(run, uninterrupted(1, *flags))


def test_all_checkpoints_damaged_is_an_error_and_nothing_is_deleted(tmp_path):
    run = Run(tmp_path, "--save-every", "5 steps", "--keep", 3).die("0 18 kill")
    for path in (run.place / "checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"no")
    before = sorted(run.place.rglob("*"))
    metrics = (run.place / "metrics.jsonl").read_bytes()
    launched = run.launch()
    assert launched.wait() == [2]
    (line,) = [line for line in launched.said().splitlines() if line.startswith("error:")]
    assert "every checkpoint is damaged" in line and line.count("model.safetensors") >= 3
    assert sorted(run.place.rglob("*")) == before and (run.place / "metrics.jsonl").read_bytes() == metrics


PICTURES = ROOT / "tests/workers/pictures.py"


def pictures(folder: Path, *flags, fault="", world_size=1) -> Run:
    folder.mkdir(exist_ok=True)
    run = Run(folder, *flags, world_size=world_size)
    launched = Processes(world_size, [PICTURES, *run.flags], env={"FAULT": fault}, folder=folder)
    codes = launched.wait()
    assert any(codes) == bool(fault), launched.said()
    return run


def test_loader_processes_and_augmentation(tmp_path):
    """Whatever the number of loader processes, killed or not, the examples are augmented alike."""
    tensors = {}
    for num_workers in (0, 2):
        flags = ("--save-every", "5 steps", "--num-workers", num_workers)
        pictures(tmp_path / f"whole{num_workers}", *flags)
        pictures(tmp_path / f"killed{num_workers}", *flags, fault="0 13 kill")
        pictures(tmp_path / f"killed{num_workers}", *flags)
        for kind in ("whole", "killed"):
            newest = max((tmp_path / f"{kind}{num_workers}/pictures/it/checkpoints").glob("step-*"))
            assert newest.name == "step-00000021"
            names = ("model", "optimizer", "random")
            tensors[kind, num_workers] = [(newest / f"{name}.safetensors").read_bytes() for name in names]
    assert len(set(map(tuple, tensors.values()))) == 1


def test_augmentation_is_the_same_on_three_processes(tmp_path):
    from safetensors.torch import load_file

    flags = ("--num-workers", 0, "--dropout", 0.0)
    weights = []
    for world_size in (1, 3):
        pictures(tmp_path / str(world_size), *flags, world_size=world_size)
        (path,) = (tmp_path / f"{world_size}/pictures/it/checkpoints").glob("step-*/model.safetensors")
        weights.append(load_file(path)["2.weight"])
    assert (weights[0] - weights[1]).abs().max() < 1e-5 * weights[0].abs().max()


def test_another_number_of_threads_is_said(tmp_path):
    run = Run(tmp_path).finish("--max-steps", 5)
    launched = run.launch("--threads", 2)
    assert launched.wait() == [0]
    assert "note     threads 1 before, 2 now: bits may differ" in launched.said()


def _scaled(rank):
    """fp16's gradient scaler, on a CPU, with gradients that overflow in steps 3, 8 and 9."""
    import torch

    from nndist.distributed.runtime import Runtime
    from nndist.training.trainer import Trainer

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1000)
    Runtime.scaler = property(lambda runtime: scaler)
    scale, take_step = scaler.scale, Trainer.take_step
    overflowing = [False]

    def step(trainer, batch):
        overflowing[0] = trainer.step in (2, 7, 8)
        return take_step(trainer, batch)

    scaler.scale = lambda weights: scale(weights) * (1e9 if overflowing[0] else 1.0)
    Trainer.take_step = step


def test_an_overflow_of_the_scaler_right_before_the_kill(tmp_path):
    whole = Run(tmp_path / "whole", *SAVES).finish(patch=_scaled)
    state = json.loads((whole.newest() / "manifest.json").read_text())["state"]
    assert state["scaler"]["scale"] != 2.0**120
    run = Run(tmp_path / "killed", "--save-every", "1 steps")
    run.die("0 4 kill", patch=_scaled).die("0 6 kill", patch=_scaled).finish(patch=_scaled)
    resumed = json.loads((run.newest() / "manifest.json").read_text())["state"]
    assert resumed["scaler"] == state["scaler"], "weights alone can't tell: powers of two cancel without rounding"
    for name in ("model", "ema", "optimizer", "random"):
        file = f"{name}.safetensors"
        assert (run.newest() / file).read_bytes() == (whole.newest() / file).read_bytes(), file


def _always_nan(rank):
    from nndist.training import step

    backward = step.Step._forward_backward

    def poisoned(self, name, inputs, micro, size):
        return backward(self, name, tuple(t * float("nan") for t in inputs[:2]) + inputs[2:], micro, size)

    step.Step._forward_backward = poisoned


def test_a_scaler_does_not_hide_losses_that_are_not_numbers(tmp_path):
    run = Run(tmp_path)
    launched = run.launch(patch=_scaled_and_nan)
    assert launched.wait() == [1]
    assert "error: the loss is not finite at step 1 of 33" in launched.said()
    assert not (run.place / "checkpoints").exists()


def _scaled_and_nan(rank):
    _scaled(rank)
    _always_nan(rank)


def _interrupted_twice(rank):
    import os
    import signal

    from nndist.training.trainer import Trainer

    take_step = Trainer.take_step

    def step(trainer, batch):
        taken = take_step(trainer, batch)
        if trainer.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return taken

    Trainer.take_step = step


def test_a_second_interrupt_ends_at_once(tmp_path, uninterrupted):
    run = Run(tmp_path, *SAVES)
    launched = run.launch(patch=_interrupted_twice)
    assert launched.wait() == [130]
    assert json.loads((run.place / "run.json").read_text())["status"] == "running", "there was no time to say more"
    assert_same(run.finish(), uninterrupted(1, *SAVES))


# What a review found, each of it once broken.


def test_a_run_whose_description_is_lost_is_not_begun_again(tmp_path):
    run = Run(tmp_path, *SAVES).die("0 18 kill")
    (run.place / "run.json").unlink()
    before = sorted(run.place.rglob("*"))
    launched = run.launch()
    assert launched.wait() == [2] and "run.json: can't be read" in launched.said()
    assert [path for path in before if path.name != "lock"] == [
        path for path in sorted(run.place.rglob("*")) if path.name != "lock"
    ]


def test_an_allowed_change_of_the_optimizer_takes_effect(tmp_path):
    def first_group():
        state = json.loads((run.newest() / "manifest.json").read_text())["state"]
        return state["optimizer"]["discriminator"]["groups"][0]

    run = Run(tmp_path).finish("--max-steps", 5)
    assert first_group()["momentum"] == 0.9
    run.finish("--momentum", 0.5, "--allow-change", "momentum", "--max-steps", 8)
    assert first_group()["momentum"] == 0.5


def test_patience_that_is_over_can_be_extended(tmp_path):
    flags = ("--best", "test/realness", "--best-is", "highest", "--epochs", 12)
    run = Run(tmp_path, *flags).finish("--patience", 1)
    stopped = run.newest().name
    assert stopped < "step-00000132"
    run.finish("--patience", 100, "--allow-change", "patience")
    assert run.newest().name == "step-00000132"


def test_an_average_that_is_asked_for_later_starts_from_the_weights(tmp_path):
    from safetensors.torch import load_file

    run = Run(tmp_path).finish("--max-steps", 5, "--ema-decay", "None")
    before = load_file(run.newest() / "model.safetensors")
    run.finish("--max-steps", 5, "--ema-decay", 0.5, "--allow-change", "ema_decay")
    run.finish("--max-steps", 6, "--ema-decay", 0.5, "--allow-change", "ema_decay")
    average = load_file(run.newest() / "ema.safetensors")
    after = load_file(run.newest() / "model.safetensors")
    name = "generator.0.weight"
    apart = (after[name] - before[name]).abs().max()
    assert (average[name] - before[name]).abs().max() <= apart


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    run = Run(tmp_path, *SAVES).die("0 18 kill")
    root = run.place / "checkpoints"
    shutil.copytree(run.newest(), root / "step-00000003")  # killed between publishing a newer one and removing it
    (root / ".step-00000016.part").mkdir()
    (root / ".step-00000010.old").mkdir()
    run.finish()
    assert all(path.name.startswith("step-") for path in root.iterdir())
    assert not (root / "step-00000003").exists()


def _broken_writer(rank):
    from nndist.runs import checkpoint_writer

    def publish(root, what):
        raise ValueError("no such number in JSON")

    checkpoint_writer.publish = publish


def test_a_save_that_fails_in_any_way_fails_the_run(tmp_path):
    launched = Run(tmp_path, *SAVES).launch(patch=_broken_writer)
    assert launched.wait() == [1]
    assert "could not be written (ValueError: no such number in JSON)" in launched.said()


UNSEEDED = """
from dataclasses import dataclass
import numpy, torch
from nndist import Data, Resident
from toys import Line

@dataclass(kw_only=True)
class Drawn(Line):
    hidden: tuple[int, ...] = (8,)

    def data(self, config):
        x = torch.from_numpy(numpy.random.rand(50, 4)).float() + torch.rand(50, 4)
        return Data(train=Resident(x, x.sum(1, keepdim=True)), test=Resident(x, x.sum(1, keepdim=True)))

    def score(self, networks, batch):
        return {"x": batch[0].sum(1), "infinite": torch.full((len(batch[0]),), float("inf"))}
"""


def test_data_that_is_drawn_is_the_same_on_all_processes_and_after_a_resume(tmp_path):
    """And a tuple among the fields, and a score that is not finite, do not stand in the way of a resume."""
    (tmp_path / "drawn.py").write_text(UNSEEDED)
    scores = []
    for world_size, name, flags in ((1, "alone", []), (2, "two", ["--max-steps", 4]), (2, "two", [])):
        arguments = [tmp_path / "drawn.py", "--runs-dir", tmp_path, "--run", name, "--no-progress", "--no-figures"]
        launched = Processes(world_size, [*arguments, *flags], folder=tmp_path)
        assert not any(launched.wait()), launched.said()
        lines = (tmp_path / f"drawn/{name}/metrics.jsonl").read_text().splitlines()
        scores.append(json.loads(lines[-1])["test/x"])
        assert json.loads(lines[-1])["test/infinite"] is None
    assert scores[1] == pytest.approx(scores[0], rel=1e-6) and scores[2] == pytest.approx(scores[0], rel=1e-6)

"""Real faults: what breaks is named once, nothing is lost, nobody is left waiting."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, Processes, alive, children_of
from resuming import RECIPE, SAVES, Run, assert_same

TRAIN = ROOT / "launch/train.py"


def _die_in_save(rank):
    """Sends this process SIGKILL at the CRASH-th write, fsync or rename of its saves."""
    from nndist import files

    countdown = [int(os.environ["CRASH"])]

    def dangerous(function):
        def call(*arguments):
            countdown[0] -= 1
            if countdown[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    files.write = dangerous(files.write)
    files.sync_folder = dangerous(files.sync_folder)
    Path.rename = dangerous(Path.rename)


# A save writes five files, syncs its folder, renames it and syncs the parent: two saves, and the run's own files.
@pytest.mark.parametrize(
    "operation", [6, 10, 17, 18, 19, *(pytest.param(n, marks=pytest.mark.nightly) for n in (4, 8, 9, 11, 13))]
)
def test_killed_at_each_operation_of_a_save(tmp_path, uninterrupted, operation):
    run = Run(tmp_path, *SAVES)
    launched = run.launch(patch=_die_in_save, env={"CRASH": str(operation)})
    assert launched.wait() == [-signal.SIGKILL]
    assert_same(run.finish(), uninterrupted(1, *SAVES))
    assert not list((run.place / "checkpoints").glob(".*")), "what the killed process left must be cleared away"


def _no_large_files(rank):
    """No file may grow beyond 8,000 bytes: as on a full disk, a write fails half way."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    from nndist.training.trainer import Trainer

    take_step = Trainer.take_step

    def step(trainer, batch):
        taken = take_step(trainer, batch)
        if trainer.step == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        return taken

    Trainer.take_step = step


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_disk_that_fills_up(tmp_path, uninterrupted, world_size):
    run = Run(tmp_path, *SAVES, world_size=world_size)
    launched = run.launch(patch=_no_large_files)
    assert 1 in launched.wait()
    said = [line for line in launched.said().splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "could not be written (File too large); earlier ones are kept" in said[0]
    checkpoints = sorted(path.name for path in (run.place / "checkpoints").iterdir())
    assert checkpoints and all(name.startswith("step-") for name in checkpoints)
    assert json.loads((run.place / "run.json").read_text())["status"] == "failed"
    assert_same(run.finish(), uninterrupted(world_size, *SAVES))


def _poisoned_example(rank):
    """Example 42 is not a number, on whichever process it falls."""
    from nndist.training.step import Step

    inputs = Step.inputs

    def poisoned(self, batch, micro):
        real, noise, numbers = inputs(self, batch, micro)
        return real.masked_fill((numbers == 42).unsqueeze(1), float("nan")), noise, numbers

    Step.inputs = poisoned


def test_a_loss_that_is_not_finite_on_one_of_three_processes_stops_all(tmp_path):
    from nndist.data.sets import permutation

    step = 1 + permutation(107, 0, 0).tolist().index(42) // 10
    run = Run(tmp_path, world_size=3)
    launched = run.launch(patch=_poisoned_example)
    assert launched.wait()[0] == 1
    said = [line for line in launched.said().splitlines() if line.startswith("error:")]
    assert len(said) == 1, "all three stop; the first one says why"
    # BatchNorm hands one example's value to all of its batch: they are all named, the culprit among them
    assert f"the loss is not finite at step {step} of 33" in said[0] and "42" in said[0]


def _one_byte_free(rank):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    shutil.disk_usage = lambda path: usage(100, 99, 1)


def test_a_disk_without_room_is_refused_before_training(tmp_path):
    launched = Run(tmp_path).launch(patch=_one_byte_free)
    assert launched.wait() == [2]
    (line,) = [line for line in launched.said().splitlines() if line.startswith("error:")]
    assert "make room or choose another --runs-dir" in line


def test_a_process_that_raises_is_named_once(tmp_path):
    run = Run(tmp_path, *SAVES, world_size=2)
    launched = run.launch(fault="1 9 raise")
    assert 1 in launched.wait()
    said = [line for line in launched.said().splitlines() if line.startswith("error:")]
    assert len(said) == 1, launched.said()
    assert "process 1: ValueError: the disk with the pictures is gone" in said[0]
    assert "resumable.py, line" in said[0] and "in suffer" in said[0]
    assert "Traceback" not in launched.said()
    run.finish()


def test_a_process_that_hangs_ends_the_others_within_the_time_out(tmp_path):
    run = Run(tmp_path, *SAVES, world_size=2)
    began = time.monotonic()
    launched = run.launch("--timeout-seconds", 4, fault="1 9 stop")
    while launched.processes[0].is_alive():
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    assert launched.processes[0].exitcode == 1
    launched.kill(1)
    launched.wait()
    assert "error: process 0: lost another process" in launched.said()
    assert "; the same command resumes it" in launched.said()
    run.finish()


def _sleep_for_ever_in_a_step(rank):
    from nndist.training.step import Step

    step = Step.__call__

    def sleeping(self, batch, *more):
        if rank == 1 and batch.epoch == 1:
            time.sleep(10_000)
        return step(self, batch, *more)

    Step.__call__ = sleeping


@pytest.mark.long
def test_a_process_that_hangs_outside_a_collective_ends_by_itself(tmp_path):
    """No launcher kills it here: its own watchdog prints its stacks and ends it."""
    run = Run(tmp_path, *SAVES, world_size=2)
    launched = run.launch("--timeout-seconds", 4, patch=_sleep_for_ever_in_a_step)
    deadline = time.monotonic() + 120
    while any(process.is_alive() for process in launched.processes):
        assert time.monotonic() < deadline, launched.said()
        time.sleep(0.1)
    assert [process.exitcode for process in launched.processes] == [1, 1]
    assert "Timeout" in launched.said() and "in sleeping" in launched.said()
    run.finish()


def _signal_in_save(rank):
    """SIGTERM twice: in a save, and again right after."""
    from nndist.training.saving import Saving

    save = Saving.save

    def saving(self):
        if self.trainer.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        save(self)

    Saving.save = saving


def _signal_in_evaluation(rank):
    from nndist.training import evaluation

    evaluate_all = evaluation.evaluate_all

    def evaluating(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_all(*arguments, **named)

    evaluation.evaluate_all = evaluating


@pytest.mark.parametrize("patch", [_signal_in_save, _signal_in_evaluation])
def test_a_signal_at_an_awkward_moment(tmp_path, uninterrupted, patch):
    run = Run(tmp_path, *SAVES)
    launched = run.launch(patch=patch)
    assert launched.wait() == [128 + signal.SIGTERM], launched.said()
    assert_same(run.finish(), uninterrupted(1, *SAVES))


def _kill_in_evaluation(rank):
    from nndist.training import evaluation

    evaluate_set = evaluation.evaluate_set
    count = [0]

    def evaluating(*arguments, **named):
        count[0] += 1
        if count[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate_set(*arguments, **named)

    evaluation.evaluate_set = evaluating


def test_killed_during_an_evaluation(tmp_path, uninterrupted):
    run = Run(tmp_path, *SAVES)
    assert run.launch(patch=_kill_in_evaluation).wait() == [-signal.SIGKILL]
    assert_same(run.finish(), uninterrupted(1, *SAVES))


def _no_warm_up(rank):
    from nndist.training.wrapped_steps import DDPStep

    DDPStep.warm_up = lambda self, give_batch: None


@pytest.mark.long
def test_without_the_throwaway_step_three_processes_would_differ(tmp_path):
    """Why DDPStep.warm_up exists: DDP rebuilds its buckets after the first backward pass."""
    flags = (*SAVES, "--width", 300, "--gradient-sync", "ddp")
    whole = Run(tmp_path / "whole", *flags, world_size=3).finish(patch=_no_warm_up)
    resumed = Run(tmp_path / "resumed", *flags, world_size=3)
    resumed.die("0 13 kill", patch=_no_warm_up)
    resumed.finish(patch=_no_warm_up)
    weights = [(run.newest() / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert weights[0] != weights[1]
    whole = Run(tmp_path / "whole warm", *flags, world_size=3).finish()
    assert_same(Run(tmp_path / "resumed warm", *flags, world_size=3).die("0 13 kill").finish(), whole)


@pytest.mark.parametrize(
    "world_size, number",
    [
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.long),
        pytest.param(2, signal.SIGKILL, marks=pytest.mark.long),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.nightly),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.nightly),
    ],
)
def test_when_the_launcher_dies_no_process_is_left_and_nothing_lost(tmp_path, world_size, number):
    config = ROOT / "launch/accelerate" / ("cpu.yaml" if world_size == 1 else "cpu_ddp.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    run = Run(tmp_path, "--epochs", 2000, world_size=world_size)
    command = [*launcher, str(TRAIN), str(RECIPE), *map(str, run.flags)]
    with (tmp_path / "output.txt").open("w") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output)
        deadline = time.monotonic() + 90
        while not (run.place / "metrics.jsonl").exists() or len(run.records()) < 50:
            assert time.monotonic() < deadline and started.poll() is None, (tmp_path / "output.txt").read_text()
            time.sleep(0.2)
        family = children_of(started.pid)
        assert len(family) >= world_size
        started.send_signal(number)
        started.wait()
    deadline = time.monotonic() + 5
    while any(map(alive, family)):
        assert time.monotonic() < deadline, "processes of the run are left 5 s later"
        time.sleep(0.1)
    described = json.loads((run.place / "run.json").read_text())
    assert described["status"] == "preempted" and described["step"] > 0
    before = described["step"]
    launched = run.launch("--max-steps", before + 5)
    assert not any(launched.wait()), launched.said()
    assert f"resumed from step {before:,}" in launched.said()


def exit_codes(folder, world_size, times):
    """Of every process of so many launches, one after the other; what an aborted one said is printed.

    gloo aborts a process at its end in 1 of 15 launches, unless it leaves as `cli.train.leave` has it.
    """
    codes = []
    for number in range(times):
        launched = Run(folder / str(number), "--max-steps", 3, "--no-report", world_size=world_size).launch()
        codes.append(launched.wait())
        if any(codes[-1]):
            print(f"launch {number}: {launched.said()}")
        pids = {str(process.pid) for process in launched.processes}  # another test's 22711 is not 2271
        left = [path for path in Path("/dev/shm").iterdir() if pids & set(re.findall(r"\d+", path.name))]
        assert not left, "left in shared memory"
        assert not users_of(launched.outputs), "a process outlives its launch"
    return codes


def users_of(outputs) -> list[int]:
    """The processes that have one of these files open, as all do whose standard output it is, and their children."""
    found, names = [], set(map(str, outputs))
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if any(str(descriptor.readlink()) in names for descriptor in (process / "fd").iterdir()):
                found.append(int(process.name))
    return found


@pytest.mark.long
def test_ten_launches_end_without_an_abort(tmp_path):
    assert exit_codes(tmp_path, 3, 10) == [[0] * 3] * 10


@pytest.mark.nightly
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_hundred_launches_end_without_an_abort(tmp_path, world_size):
    assert exit_codes(tmp_path, world_size, 100) == [[0] * world_size] * 100


def struck(folder, number, draw):
    """A run of four processes, and the environment in which one of them is killed, once."""
    run = Run(folder / str(number), *SAVES, world_size=4)
    once = folder / str(number) / "killed"
    fault = f"{draw.randrange(4)} {draw.randrange(2, 33)} kill"
    return run, {"FAULT": fault, "FAULT_ONCE": str(once), "OMP_NUM_THREADS": "1"}


def assert_restarted(run, env, expected):
    assert Path(env["FAULT_ONCE"]).exists()
    assert len(json.loads((run.place / "run.json").read_text())["launches"]) == 2
    assert_same(run, expected)


@pytest.mark.nightly  # on two hosts it is a long test: launchers/test_nodes.py
def test_torchruns_elastic_restart_resumes(tmp_path, uninterrupted):
    """A worker is killed; torchrun starts all four again by itself."""
    run, env = struck(tmp_path, 0, random.Random(1))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = [*torchrun, "--max-restarts", "2", str(TRAIN), str(RECIPE)]
    command += ["--run-name" if flag == "--run" else str(flag) for flag in run.flags]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=200)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 0, f"{errors}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert_restarted(run, env, uninterrupted(4, *SAVES))


@pytest.mark.nightly
@pytest.mark.parametrize("times", [10])
def test_all_of_so_many_elastic_restarts_resume(tmp_path, uninterrupted, times):
    """By torchrun's own agent, whose processes are forked, so that a start takes no time: any process, any step."""
    draw = random.Random(0)
    struck_runs = [struck(tmp_path, number, draw) for number in range(times)]
    plan = [{"arguments": [str(RECIPE), *map(str, run.flags)], "env": env} for run, env in struck_runs]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, str(ROOT / "tests/workers/elastic.py"), str(tmp_path / "plan.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
    for run, env in struck_runs:
        assert_restarted(run, env, uninterrupted(4, *SAVES))


def _little_grace(rank):
    from nndist.distributed import rendezvous

    rendezvous.MEETING_GRACE_SECONDS = 0.5


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_that_another_program_has_is_said_within_the_time_out(tmp_path, rank):
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
        names |= {"MASTER_PORT": server.getsockname()[1]}
        env = {name: str(value) for name, value in names.items()}
        began = time.monotonic()
        launched = Run(tmp_path).launch("--timeout-seconds", 2, env=env, patch=_little_grace)
        assert launched.wait() == [2], launched.said()
    assert time.monotonic() - began < 15
    (line,) = [line for line in launched.said().splitlines() if line.startswith("error:")]
    assert ("another program may use the port" if rank else "another program uses the port") in line


def _no_more_files(rank):
    """As on a disk that fails: the folder can be made, its files not."""
    import errno

    from nndist import files

    def failing(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    files.write_whole = lambda path, data: failing(path)


def test_a_disk_that_fails_at_the_start_is_one_line(tmp_path):
    launched = Run(tmp_path).launch(patch=_no_more_files)
    assert launched.wait() == [1]
    (line,) = [line for line in launched.said().splitlines() if line.startswith("error:")]
    assert "recipe.py: Input/output error; check the disk (df -h, df -i" in line
    assert "Traceback" not in launched.said()


@pytest.fixture
def disk(tmp_path):
    """A function that gives an empty file system for so many files; skips where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(num_files: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"nr_inodes={num_files}", "none", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system may be mounted here")
        return place

    yield mounted
    subprocess.run(["umount", "--lazy", str(place)], capture_output=True)


@pytest.mark.parametrize(
    "num_files, code, said",
    [
        (2, 2, "/resumable/it: No space left on device; choose another"),
        (5, 1, "No space left on device; check the disk (df -h, df -i"),
        (8, 1, "could not be written (No space left on device); earlier ones are kept"),
        *(pytest.param(number, None, "No space left on device", marks=pytest.mark.long) for number in range(3, 30, 4)),
    ],
)
def test_a_disk_without_room_for_another_file_is_one_line(tmp_path, disk, num_files, code, said):
    run = Run(tmp_path, *SAVES)
    flags = [disk(num_files) if flag == run.folder else flag for flag in run.flags]
    launched = Processes(1, [RECIPE, *flags], folder=tmp_path)
    assert launched.wait() == [code or 1] or code is None
    (line,) = [line for line in launched.said().splitlines() if line.startswith("error:")]
    assert said in line and "Traceback" not in launched.said()

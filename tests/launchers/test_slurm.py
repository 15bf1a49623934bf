"""launch/submit.py and launch/slurm/train.sbatch: what is submitted, and a real Slurm that stops and requeues it."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from cluster import Slurm
from launching import ROOT, python
from resuming import RECIPE, Run, assert_same

SUBMIT = ROOT / "launch/submit.py"
SCRIPT = ROOT / "launch/slurm/train.sbatch"


def sbatch_lines(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_a_dry_run_prints_the_script_with_the_settings_in_it():
    flags = ["--nodes", "3", "--gpus-per-node", "4", "--time", "2:00:00", "--sbatch=--partition=a100", "--cpu"]
    done = python(SUBMIT, "recipes/mnist_cnn.py", *flags, "--epochs", "7", "--best", "a b", "--dry-run", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = sbatch_lines(done.stdout)
    expected = {"--job-name=mnist_cnn", "--nodes=3", "--gpus-per-node=4", "--time=2:00:00", "--partition=a100"}
    expected |= {"--requeue", "--signal=USR1@90", "--open-mode=append", "--ntasks-per-node=1"}
    assert expected <= set(found) and len(found) == len({line.partition("=")[0] for line in found})
    assert "set -- recipes/mnist_cnn.py --cpu --epochs 7 --best 'a b'" in done.stdout.splitlines()
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True).returncode == 0
    untouched = [line for line in SCRIPT.read_text().splitlines() if line and not line.startswith("#SBATCH")]
    assert [line for line in done.stdout.splitlines() if line in untouched] == untouched


def test_without_gpus_none_are_asked_for():
    flags = ["--gpus-per-node", "0", "--processes-per-node", "2", "--dry-run"]
    done = python(SUBMIT, "recipes/mnist_cnn.py", *flags, cwd=ROOT)
    assert "gpus-per-node" not in " ".join(sbatch_lines(done.stdout)) and "PROCESSES_PER_NODE=2" in done.stdout


def test_submitting_loads_no_torch():
    arguments = ["submit.py", str(RECIPE), "--dry-run"]
    code = f"import runpy, sys; sys.argv = {arguments}; runpy.run_path({str(SUBMIT)!r}, run_name='__main__')"
    done = python("-c", f"{code}; print('torch' in sys.modules)")
    assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["nowhere.py"], "nowhere.py: no such file"),
        ([str(RECIPE), "--nodes", "0"], "--nodes 0: must be at least 1"),
        ([str(RECIPE), "--nodes", "two"], "--nodes: invalid int value: 'two'"),
        ([str(RECIPE), "--run", "first"], "--run: the run is named after the job"),
        ([str(RECIPE), "--name", "my run"], "--name 'my run': give a plain name"),
        ([str(RECIPE)], "sbatch: not found"),
    ],
)
def test_what_cannot_be_submitted_is_one_line(tmp_path, arguments, expected):
    done = python(SUBMIT, *arguments, env={"PATH": str(tmp_path)})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1 and expected in done.stderr


needs_slurm = pytest.mark.skipif(
    os.geteuid() != 0 or not (shutil.which("slurmctld") and shutil.which("munged")),
    reason="needs root and Debian's slurm-wlm and munge",
)


class JobRun(Run):
    """The run that a job has trained, in whatever folder."""

    def __init__(self, place):
        self.where = place

    @property
    def place(self):
        return self.where


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Slurm(tmp_path_factory.mktemp("cluster") / "slurm") as started:
        yield started


@pytest.mark.long
@needs_slurm
def test_a_job_that_is_stopped_and_requeued_ends_like_one_left_alone(tmp_path, slurm):
    """First signalled to save, as before a time limit, then requeued by force, as by preemption."""
    flags = ["--save-every", "50 steps", "--epochs", 40, "--evaluate-every", "10 epochs", "--no-report"]
    whole = Run(tmp_path / "whole", *flags, world_size=2)
    left_alone = whole.launch()  # while the job waits for Slurm
    training = [str(flag) for flag in Run(tmp_path, *flags).flags]
    for name in ("--runs-dir", "--run"):
        del training[training.index(name) : training.index(name) + 2]
    job_flags = ["--time", "0:30:00", "--nodes", "2", "--gpus-per-node", "0", "--cpus-per-task", "1"]
    job_flags += ["--runs-dir", str(tmp_path)]
    command = [sys.executable, SUBMIT, RECIPE, *job_flags, *training]
    done = subprocess.run(command, env=slurm.env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1]
    log = tmp_path / f"resumable-{job}.log"
    place = tmp_path / f"resumable/resumable-{job}"

    def until(true, timeout=150):
        deadline = time.monotonic() + timeout
        while not true():
            said = log.read_text() if log.exists() else "no log"
            assert time.monotonic() < deadline, f"{slurm.job(job)}\n{said[-5000:]}"
            time.sleep(0.1)

    def trained(steps):
        def reached():
            lines = (place / "metrics.jsonl").read_text().splitlines() if (place / "metrics.jsonl").exists() else []
            return len(lines) > 1 and json.loads(lines[-2])["step"] > steps

        return reached

    def described():
        return json.loads((place / "run.json").read_text())

    def goes_on():
        until(lambda: slurm.job(job)["JobState"] == "PENDING")
        assert described()["status"] == "preempted"
        # Slurm delays a requeued job by two minutes; within the same second its nodes would still reject it
        slurm.call("scontrol", "update", f"jobid={job}", "StartTime=now+3seconds")
        return described()["step"]

    until(trained(30))
    slurm.call("scancel", "--signal=USR1", job)
    first = goes_on()
    until(trained(first + 30))
    slurm.call("scontrol", "requeue", job)
    second = goes_on()
    assert 30 < first < second < 440
    until(lambda: slurm.job(job)["JobState"] == "COMPLETED")
    assert [launch["from_step"] for launch in described()["launches"]] == [0, first, second]
    assert described()["world_size"] == 2
    said = log.read_text()
    assert f"job {job}: stopped by a signal and saved; queued again" in said
    assert f"resumed from step {first:,}" in said and f"resumed from step {second:,}" in said
    assert not any(left_alone.wait()), left_alone.said()
    assert_same(JobRun(place), whole)

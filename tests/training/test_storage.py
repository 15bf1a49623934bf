"""Runs kept in a store: resumed on machines with empty disks, with real kill -9 at any point of a transfer."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from launching import ROOT, Processes, command, free_port, python
from resuming import RECIPE, SAVES, STEPS, Run, assert_same, slow_steps

from nndist.errors import UserError
from nndist.runs.checkpoint import read
from nndist.runs.manifest import MANIFEST, DamagedCheckpoint, folder_name, parse_manifest
from nndist.runs.sending import push

SECRET = "geheim-4711-xyz"


class Kept(Run):
    """A run in a faulty store; its machine's disk may be lost."""

    def __init__(self, folder: Path, *flags, world_size=1):
        super().__init__(folder, *flags, world_size=world_size)
        self.store, self.disk, self.faults = folder / "store", folder / "disk", folder / "faults.json"
        self.flags[1] = f"faulty://{self.store}"
        self.flags += ["--local-runs-dir", self.disk]
        (folder / "faulty-1.0.dist-info").mkdir()
        (folder / "faulty-1.0.dist-info/METADATA").write_text("Name: faulty\nVersion: 1.0\n")
        (folder / "faulty-1.0.dist-info/entry_points.txt").write_text("[fsspec.specs]\nfaulty = faulty_store:Faulty\n")
        path = [str(folder), str(ROOT / "tests/workers"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.env = {"PYTHONPATH": os.pathsep.join(path), "FAULTS": str(self.faults), "A_SECRET_KEY": SECRET}

    @property
    def place(self) -> Path:
        return self.disk / "resumable/it"

    @property
    def there(self) -> Path:
        return self.store / "resumable/it"

    def launch(self, *flags, env=None, **named) -> Processes:
        return super().launch(*flags, env={**self.env, **(env or {})}, **named)

    def stop(self, steps: int) -> "Kept":
        """Trains so many steps more, until SIGTERM; what was saved then is sent before the process ends."""
        launched = self.launch(
            fault=f"0 {steps} term", patch=partial(slow_steps, 0.12) if self.world_size > 1 else None
        )
        assert 143 in launched.wait(), launched.said()
        return self

    def suffer(self, *faults) -> "Kept":
        """From now on the store has these faults."""
        Path(f"{self.faults}.counts").unlink(missing_ok=True)
        Path(f"{self.faults}.log").unlink(missing_ok=True)
        self.faults.write_text(json.dumps(faults))
        return self

    def lose_the_disk(self) -> "Kept":
        shutil.rmtree(self.disk)
        return self

    def requests(self) -> list[str]:
        lines = Path(f"{self.faults}.log").read_text().splitlines()
        return [line.replace(f"{self.there}/", "") for line in lines if "lease.json" not in line]

    def whole(self) -> list[int]:
        """The steps of the checkpoints in the store that have a whole manifest; each must be as that says."""
        steps = []
        for path in sorted(self.there.glob("checkpoints/step-*")):
            with contextlib.suppress(OSError, DamagedCheckpoint):
                parse_manifest((path / "manifest.json").read_bytes(), path.name)
                steps.append(path)
        return [read(path).step for path in steps]


@pytest.mark.parametrize("world_size", [1, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 3))])
def test_an_empty_disk_resumes_exactly(tmp_path, uninterrupted, world_size):
    """From the store alone, which in the end holds the run as its folder does."""
    run = Kept(tmp_path, *SAVES, world_size=world_size).stop(17)
    newest = run.whole()[-1]
    assert newest >= 17
    best = json.loads((run.there / "run.json").read_text())["best"]["step"]
    run.lose_the_disk().suffer().finish()
    fetched = {line.split("/")[1] for line in run.requests() if re.search("open checkpoints.*safetensors", line)}
    assert fetched == {f"step-{newest:08d}", f"step-{best:08d}"}
    assert_same(run, uninterrupted(world_size, *SAVES))
    own = {path.name for path in (run.place / "checkpoints").iterdir()}
    assert {path.name for path in (run.there / "checkpoints").iterdir()} == own
    for name in ("run.json", "report.html", "recipe.py", "metrics.jsonl"):
        assert (run.there / name).read_bytes() == (run.place / name).read_bytes()
    assert not (run.there / "lease.json").exists()


POINTS = {
    "in the first of its parts": {"on": r"part .*step-00000022/model", "do": "kill"},
    "between its parts": {"on": r"part .*step-00000022/optimizer", "do": "kill", "skip": 3},
    "in its records": {"on": r"(put|part) .*step-00000022/metrics", "do": "kill"},
    "in its manifest": {"on": r"put .*step-00000022/manifest|parts .*step-00000022/manifest", "do": "kill"},
    "before the older one is removed": {"on": r"remove .*step-00000011/manifest", "do": "kill"},
    "in the removal": {"on": r"remove .*step-00000011$", "do": "kill"},
    "in run.json": {"on": r"(put|part) .*/run.json", "do": "kill", "skip": 1},
}


QUICK = ("between its parts", "in its manifest")


@pytest.mark.parametrize(
    "point", [*QUICK, *(pytest.param(p, marks=pytest.mark.long) for p in POINTS if p not in QUICK)]
)
def test_the_machine_dies_while_it_sends(tmp_path, uninterrupted, point):
    """Whatever is in the store then is whole or not believed; the run resumes from it on an empty disk."""
    run = Kept(tmp_path, "--save-every", "11 steps").stop(17)
    before = run.whole()
    run.suffer(POINTS[point])
    assert run.launch(fault="0 5 term").wait() == [-9]
    left = run.whole()
    assert left and (left[-1] == 22 or left == before), (before, left)
    said = run.suffer().lose_the_disk().launch()
    assert said.wait() == [0], said.said()
    assert f"resumed from step {left[-1]}" in said.said()
    assert_same(run, uninterrupted(1, "--save-every", "11 steps"))
    assert run.whole()[-1] == STEPS


def test_a_damaged_checkpoint_in_the_store_is_named_and_the_one_before_is_used(tmp_path, uninterrupted):
    run = Kept(tmp_path, *SAVES).stop(17)
    data = bytearray((run.there / "checkpoints/step-00000017/optimizer.safetensors").read_bytes())
    data[-5] ^= 1
    (run.there / "checkpoints/step-00000017/optimizer.safetensors").write_bytes(data)
    launched = run.lose_the_disk().launch()
    assert launched.wait() == [0], launched.said()
    assert "damaged checkpoint: step-00000017/optimizer.safetensors" in launched.said()
    assert "resumed from step 15" in launched.said()
    assert_same(run, uninterrupted(1, *SAVES))


def test_a_store_that_fails_holds_nobody_up(tmp_path, uninterrupted):
    """One line, and another when it works again; nothing that a client says of its keys is shown."""
    run = Kept(tmp_path, *SAVES).suffer({"on": "p(ut|arts) .*checkpoints", "do": "fail", "times": 5})
    launched = run.launch()
    assert launched.wait() == [0], launched.said()
    said = launched.said()
    assert said.count("checkpoints are kept locally, last sent: nothing") == 1
    assert "no answer from https://store/?***" in said and SECRET not in said
    assert f"works again; sent: step {STEPS}" in said
    assert_same(run, uninterrupted(1, *SAVES))
    assert run.whole()[-1] == STEPS


def test_a_store_that_can_not_be_used_at_the_start(tmp_path, uninterrupted):
    """An error on an empty disk, since the run may be there; where this machine has a checkpoint, a note."""
    everything = {"on": ".", "do": "deny"}
    run = Kept(tmp_path, *SAVES).suffer(everything)
    launched = run.launch()
    assert launched.wait() == [2]
    assert re.fullmatch(r"error: faulty://\S+: can't be used \(Access Denied\); check .*\n", launched.said())
    run.suffer().stop(17).suffer({**everything, "times": 25})
    launched = run.launch()
    assert launched.wait() == [0], launched.said()
    assert "can't be used (Access Denied); the run continues from the local copy" in launched.said()
    assert_same(run, uninterrupted(1, *SAVES))
    assert run.whole()[-1] == STEPS


def _short_waits(rank):
    import nndist.runs.storage

    nndist.runs.storage.IDLE_SECONDS = 2.0
    nndist.runs.storage.FIRST_PAUSE_SECONDS = 0.1


@pytest.mark.parametrize("fault", ["deny", pytest.param("stall", marks=pytest.mark.long)])
def test_what_can_not_be_sent_is_sent_later(tmp_path, uninterrupted, fault):
    """Credentials that are lost, and a client that hangs: the run ends well, in bounded time, and says what to do."""
    run = Kept(tmp_path, *SAVES).suffer({"on": "p(ut|arts) .*checkpoints", "do": fault})
    launched = run.launch(patch=_short_waits)
    assert launched.wait(60) == [0], launched.said()
    assert_same(run, uninterrupted(1, *SAVES))
    assert run.whole() == []
    found = re.search(r"nndist push (\S+) (\S+) sends the rest", launched.said())
    assert found, launched.said()
    assert found.group(1) == str(run.place) and found.group(2) == f"faulty://{run.store}"
    run.suffer()
    pushed = python(ROOT / "launch/push.py", *found.groups(), env=run.env)  # whose fsspec finds the client
    assert pushed.returncode == 0, pushed.stderr
    assert f"step {STEPS}" in pushed.stdout and run.whole()[-1] == STEPS
    assert_same(run.lose_the_disk().finish(), uninterrupted(1, *SAVES))


@pytest.mark.long
def test_a_slow_store_gets_whole_checkpoints_although_older_ones_are_removed_meanwhile(tmp_path):
    run = Kept(tmp_path, "--save-every", "1 steps", "--keep", 1).suffer({"on": "part .*model", "do": "slow"})
    run.finish()
    sent = [line for line in run.requests() if re.search("put checkpoints/.*/manifest", line)]
    assert 1 < len(sent) < STEPS  # it skips what is no longer the newest
    assert run.whole()[-1] == STEPS


def test_no_secret_is_written_or_shown(tmp_path):
    run = Kept(tmp_path, *SAVES)
    run.flags[1] = f"faulty://user:{SECRET}@{run.store}"
    launched = run.launch(env={"WANDB_MODE": "offline"})
    assert launched.wait() == [0], launched.said()
    assert "***@" in launched.said() and SECRET not in launched.said()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != tmp_path]
    assert len(files) > 20
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_two_machines_do_not_train_one_run(tmp_path):
    """One that is alive is named; one whose lease was taken is told; a dead one is waited for, and its place taken."""
    run = Kept(tmp_path, *SAVES, "--epochs", 2000, "--evaluate-every", "1000 epochs", "--no-report")
    started = [first := run.launch()]
    try:
        deadline = time.monotonic() + 30
        while not list(run.there.glob("checkpoints/*/manifest.json")):
            assert time.monotonic() < deadline, first.said()
            time.sleep(0.05)
        other = [tmp_path / "another" if flag == run.disk else flag for flag in run.flags]
        started.append(second := Processes(1, [RECIPE, *other], env=run.env, folder=tmp_path))
        assert second.wait(30) == [2]
        host = os.uname().nodename
        assert re.search(rf"is being trained on '{host}' \(process \d+, since", second.said()), second.said()
        lease = {"holder": "x", "host": "node7", "process": 1, "since": "2026-01-01T00:00:00", "renewed": 1}
        while "is being trained on 'node7'" not in first.said():
            # again and again, as its holder would: one write may cross with the other's renewal
            (run.there / "lease.json").write_text(json.dumps(lease))
            assert first.processes[0].is_alive() and time.monotonic() < deadline + 30, first.said()
            time.sleep(0.05)
        assert first.said().count("nothing more is sent") == 1
        first.kill(0)
        first.wait()
        started.append(
            third := Processes(
                1, [RECIPE, *other, "--max-steps", 10**6, "--resume", "must"], env=run.env, folder=tmp_path
            )
        )
        while "resumed from step" not in third.said():
            assert third.processes[0].is_alive() and time.monotonic() < deadline + 30, third.said()
            time.sleep(0.05)
        assert "waiting to see whether it still is" in third.said()
    finally:
        for process in [process for launched in started for process in launched.processes]:
            process.kill()
            process.join()


# A real client and a server.


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """The URL of a bucket on a server of S3's protocol; keys and address are in the environment."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed; .ci/run installs it")
    apart = os.environ.get("NNDIST_MOTO")  # not installed: beside boto3 Accelerate starts slowly
    if apart is None:
        pytest.importorskip("moto", reason="moto is neither in $NNDIST_MOTO nor installed")
    port = free_port()
    given = {"AWS_ACCESS_KEY_ID": "AKIA4711", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    given["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with (tmp_path / "server.txt").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
            env={**os.environ, **({"PYTHONPATH": apart} if apart else {})},
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(Exception):
                s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
                break
            assert time.monotonic() < deadline and server.poll() is None, (tmp_path / "server.txt").read_text()
            time.sleep(0.3)
        yield "s3://bucket/runs"
    finally:
        server.kill()
        server.wait()


@pytest.mark.long
def test_an_empty_disk_resumes_exactly_from_s3(tmp_path, s3, monkeypatch):
    """Checkpoints of 60 MB, sent in parts; the run is shown, verified and loaded by its URL."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    flags = ["--width", 250_000, "--epochs", 1, "--save-every", "5 steps"]
    whole = Run(tmp_path / "whole", *flags).finish()
    run = Run(tmp_path / "kept", *flags, "--local-runs-dir", tmp_path / "disk")
    run.flags[1] = s3
    # the processes are forked from a server that may be older than these variables
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_") or name == "HOME"}
    launched = run.launch(fault="0 7 term", env=keys)
    assert launched.wait() == [143], launched.said()
    shutil.rmtree(tmp_path / "disk")
    run.finish(env=keys)
    run.folder = tmp_path / "disk"
    assert_same(run, whole)
    there = f"{s3}/resumable/it"
    for script, *arguments in (["checkpoint.py", "verify", there], ["report.py", there], ["report.py", s3]):
        done = command(ROOT / "launch" / script, *arguments)
        assert done.returncode == 0, done.stderr
    import nndist

    shutil.rmtree(tmp_path / "disk")
    loaded = nndist.load_run(there)
    assert loaded.status == "finished" and loaded.weights("last").step == 11
    missing = command(ROOT / "launch/report.py", "s3://nobucket/runs")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    said = "".join(path.read_text() for path in (tmp_path / "kept").glob("output*"))
    assert SECRET not in said


def test_a_push_of_an_older_run_sends_nothing_and_keeps_no_lease(tmp_path):
    there, here = tmp_path / "store/toy/it", tmp_path / "runs/toy/it"
    newer = there / "checkpoints" / folder_name(4) / MANIFEST
    for path in (newer, here / "run.json"):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    with pytest.raises(UserError, match=r"has step 4 and .* has no checkpoint; nothing was sent"):
        push(here, f"file://{tmp_path}/store", say=print)
    assert [path for path in there.rglob("*") if path.is_file()] == [newer]


@pytest.mark.long
def test_a_run_without_a_bucket_is_one_line(tmp_path, s3):
    done = command(ROOT / "launch/train.py", RECIPE, "--runs-dir", "s3://nobucket/runs", "--run", "it")
    assert done.returncode == 2 and "nobucket" in done.stderr and done.stderr.count("\n") == 1, done.stderr

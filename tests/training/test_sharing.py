"""Machines that share no disk: the first process has the run, the others get what they must read."""

import os
import shutil
from pathlib import Path

import pytest
from resuming import SAVES, Run, assert_same


def own_disk(rank):
    """Each process has a machine of its own: a different working folder, and it is the first there."""
    place = Path(f"machine-{rank}")
    place.mkdir(exist_ok=True)
    os.chdir(place)
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


class Apart(Run):
    """A run in a folder that each machine has on a disk of its own."""

    def __init__(self, folder: Path, *flags, world_size):
        super().__init__(folder, *flags, world_size=world_size)
        self.flags[1] = "runs"

    @property
    def place(self) -> Path:
        return self.folder / "machine-0/runs/resumable/it"


@pytest.mark.parametrize("shard", ["none", pytest.param("fsdp", marks=pytest.mark.long)])
def test_killed_on_machines_without_a_shared_disk(tmp_path, uninterrupted, shard, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = (*SAVES, "--shard", shard)
    run = Apart(tmp_path, *flags, world_size=2).die("1 24 kill", patch=own_disk)
    launched = run.launch(patch=own_disk)
    assert launched.wait() == [0, 0], launched.said()
    assert "resumed from step" in launched.said()
    for file in Path(tmp_path / "machine-1").rglob("*"):
        assert file.is_dir(), "what was read is removed"
    if shard == "none":
        assert_same(run, uninterrupted(2, *flags))
    else:  # written by the processes of the first machine alone, and so in other files
        assert (run.newest() / "model.safetensors").exists() and run.newest().name == "step-00000033"


@pytest.mark.long
def test_a_checkpoint_of_the_same_name_on_another_machine_is_not_taken(tmp_path, uninterrupted, monkeypatch):
    """The second machine was once the first, and kept what another run has left there."""
    monkeypatch.chdir(tmp_path)
    other = Run(tmp_path / "other", *SAVES, "--seed", 5, world_size=2).finish()
    run = Apart(tmp_path, *SAVES, world_size=2).die("1 24 kill", patch=own_disk)
    there = tmp_path / "machine-1/runs/resumable/it"
    shutil.rmtree(there, ignore_errors=True)
    shutil.copytree(other.place, there)
    newest = run.newest().name
    if not (there / "checkpoints" / newest).exists():
        next((there / "checkpoints").iterdir()).rename(there / "checkpoints" / newest)
    run.finish(patch=own_disk)
    assert_same(run, uninterrupted(2, *SAVES))

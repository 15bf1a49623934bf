"""What is lost of a run beside its weights: noticed in the run and at the next launch, said, and gone on without."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from launching import ROOT
from safetensors.torch import load_file
from workers.keeping import Keeping

import nndist
from nndist.errors import TrainingError, UserError
from nndist.runs.records import Records
from nndist.trained.loaded_run import load_run

RECIPE = ROOT / "tests/workers/keeping.py"


@pytest.fixture
def train(tmp_path):
    """nndist.train into a folder of the test."""

    def call(recipe=RECIPE, **settings):
        options = {"runs_dir": tmp_path, "progress": False, "figures": False, "threads": 1, "run": "it"}
        return nndist.train(recipe, **{**options, "save_every": "5 steps", **settings})

    return call


def problem_of(place: Path) -> str:
    return Records.of_file(place / "metrics.jsonl").compare(json.loads((place / "run.json").read_text()))


# While it is trained.


@pytest.mark.parametrize("gone", ["metrics.jsonl", "run.json", "checkpoints/step-*"])
def test_what_is_removed_while_a_run_is_trained_is_written_anew(train, tmp_path, capsys, gone):
    whole = train()

    class Vanishing(Keeping):
        """In the second evaluation something of the run's folder goes."""

        def snapshot(self, networks, data):
            if self.name not in seen and (tmp_path / self.name / "it/snapshots").exists():
                seen.append(self.name)
                for path in (tmp_path / self.name / "it").glob(gone):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            return super().snapshot(networks, data)

    seen: list = []
    result = train(Vanishing())
    place = result.folder
    assert seen and place != whole.folder
    assert [r["step"] for r in result.history.records] == [r["step"] for r in whole.history.records]
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(whole.history.records) and problem_of(place) == ""
    described = json.loads((place / "run.json").read_text())
    assert described["status"] == "finished" and len(described["launches"]) == 1
    kept = load_file(place / "checkpoints/step-00000021/model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in result.networks["model"].state_dict().items())
    said = capsys.readouterr().out
    if gone == "metrics.jsonl":
        assert "was removed during training; rewritten, nothing is lost" in said
    if "checkpoints" in gone:
        assert "was removed while the run was trained" in said and result.best is None


def test_a_run_whose_folder_goes_stops_with_one_line(train, tmp_path):
    class Gone(Keeping):
        def snapshot(self, networks, data):
            while (tmp_path / self.name / "it").exists():  # a checkpoint may be written there just now
                shutil.rmtree(tmp_path / self.name / "it", ignore_errors=True)
            return {}

    with pytest.raises(TrainingError, match=r"the run's folder was removed|could not be written \(No such file"):
        train(Gone())
    assert not (tmp_path / "test_rebuild/it").exists()


# At the next launch.


def test_a_description_that_is_lost_can_be_done_without(train, tmp_path, capsys):
    first = train(max_steps=12)
    (first.folder / "run.json").unlink()
    with pytest.raises(UserError, match=r"run.json: can't be read \(No such file .*--resume rebuild"):
        train()
    with pytest.raises(UserError, match=r"lr has changed from 0.05 to 0.1 since"):
        train(resume="rebuild", lr=0.1)
    whole = train(run="whole")
    result = train(resume="rebuild")
    assert "run.json: can't be read (No such file or directory); rewritten" in capsys.readouterr().out
    assert result.steps == 21
    for name, tensor in whole.networks["model"].state_dict().items():
        assert torch.equal(result.networks["model"].state_dict()[name], tensor)
    assert problem_of(result.folder) == ""


def test_records_that_were_changed_are_noticed_and_can_be_left_out(train, capsys):
    first = train(max_steps=12)
    path = first.folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"lr": 0.05', '"lr": 0.06', 1))
    with pytest.raises(UserError, match=r"metrics.jsonl: line 1 is not as written .*; restore it .*--resume rebuild"):
        train()
    assert "metrics.jsonl: line 1 is" in load_run(first.folder).history.columns.problem
    page = nndist.report.write_run(first.folder).read_text()
    assert "metrics.jsonl: line 1 is not as written" in page
    result = train(resume="rebuild")
    assert "rewritten with 12 intact records, 1 left out" in capsys.readouterr().out
    assert [r["step"] for r in result.history.records][:3] == [2, 3, 4] and problem_of(result.folder) == ""
    assert (first.folder / "metrics.damaged.jsonl").exists()


@pytest.mark.parametrize("harm", ["removed", "cut", "a pipe"])
def test_records_that_are_lost_are_noticed_and_can_be_done_without(train, capsys, harm):
    first = train(max_steps=12)
    path = first.folder / "metrics.jsonl"
    if harm == "cut":
        os.truncate(path, 200)
    else:
        path.unlink()
    if harm == "a pipe":
        os.mkfifo(path)
    with pytest.raises(UserError, match=r"metrics.jsonl: .*--resume rebuild"):
        train()
    result = train(resume="rebuild")
    assert result.steps == 21 and result.history.records[-1]["step"] == 21 and problem_of(result.folder) == ""


def test_a_best_checkpoint_that_is_damaged_is_said_and_no_longer_promised(train, capsys):
    first = train(max_steps=16)
    assert first.best["step"] == 7
    file = first.folder / "checkpoints/step-00000007/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    result = train()
    said = capsys.readouterr().out
    assert (
        "the best checkpoint is damaged (step-00000007/model.safetensors: its content is not what was written" in said
    )
    assert result.best["step"] == 21, "the best of what came after"
    assert (first.folder / "checkpoints/damaged-step-00000007").is_dir()
    assert load_run(first.folder).weights("best").step == 21


def test_a_best_checkpoint_that_is_whole_stays_the_best(train):
    assert train(max_steps=16).best["step"] == 7
    assert train().best["step"] == 7


def test_a_newest_checkpoint_that_is_gone_is_said(train, capsys):
    first = train(max_steps=16)
    shutil.rmtree(first.folder / "checkpoints/step-00000016")
    train()
    assert "run.json names step 16, whose checkpoint is gone" in capsys.readouterr().out


def test_rebuild_wants_a_run(train):
    with pytest.raises(UserError, match="--resume rebuild: there is no run at"):
        train(resume="rebuild")
    with pytest.raises(UserError, match="--resume rebuild: say which run"):
        train(resume="rebuild", run=None)

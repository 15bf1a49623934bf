"""A run's folder from a stranger: whichever command is given it, one line names the file, at once."""

import contextlib
import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from launching import ROOT

import nndist
from nndist import files
from nndist.cli.main import main
from nndist.errors import TrainingError, UserError
from nndist.runs import checkpoint, checkpoint_writer, wandb
from nndist.runs.reading import read_run
from nndist.trained.loaded_run import load_run

RECIPE = ROOT / "tests/workers/keeping.py"
QUIET = {"progress": False, "threads": 1, "run": "it", "wandb": "off"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return nndist.train(RECIPE, runs_dir=tmp_path_factory.mktemp("runs"), figures=False, **QUIET).folder


@pytest.fixture
def place(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "keeping/it")


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def endless(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def nested(path):
    path.write_text('{"a": ' * 100_000)


def many(path):
    path.write_text("[" + "[]," * files.MAX_JSON_VALUES + "[]]")


def of_another_type(path):
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "fields": 3, "state": 3}))


def gone(path):
    path.unlink()


COMMANDS = {
    "train": [RECIPE, "--runs-dir", "RUNS", "--run", "it", "--no-progress", "--wandb", "off", "--threads", "1"],
    "predict": ["PLACE", "0.5"],
    "evaluate": ["PLACE"],
    "export": ["PLACE", "--to", "safetensors", "--output", "OUTPUT"],
    "report": ["PLACE"],
    "checkpoint": ["verify", "PLACE"],
    "sync": ["PLACE", "--offline"],
    "replay": ["PLACE", "--step", "12"],
    "audit": ["PLACE"],
}


HARMS = [a_pipe, endless, nested, many, of_another_type, gone]
CASES = [(command, harm) for command in COMMANDS for harm in HARMS]
CASES.remove(("report", of_another_type))  # a page shows what it can


@pytest.mark.parametrize("command, harm", CASES)
def test_every_command_names_what_is_wrong_in_one_line(place, tmp_path, capfd, command, harm):
    named = "manifest.json" if command == "checkpoint" else "run.json"
    for path in place.rglob(named):
        harm(path)
    names = {"RUNS": tmp_path, "PLACE": place, "OUTPUT": tmp_path / "out.safetensors"}
    with pytest.raises(SystemExit) as stop:
        main([command, *(str(names.get(word, word)) for word in COMMANDS[command])])
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    if command == "checkpoint":
        lines = printed.out.splitlines()
        assert stop.value.code == 1 and len(lines) == 2 and all("DAMAGED" in one and named in one for one in lines)
        return
    said = [line for line in (printed.out + printed.err).splitlines() if named in line or "error:" in line]
    assert stop.value.code in (1, 2) and len(said) == 1, printed
    assert len(said[0]) < 400 and "Error:" not in said[0], said


@pytest.mark.parametrize("harm", HARMS)
def test_whatever_the_newest_manifest_is_the_checkpoint_before_it_is_used(place, capfd, tmp_path, harm):
    before, newest = sorted((place / "checkpoints").iterdir())
    harm(newest / "manifest.json")
    run = load_run(place)
    assert run.weights("last").step == int(before.name[5:]) < 21
    assert run.notes[0].startswith(f"damaged checkpoint: {newest.name}/manifest.json: ")
    again = nndist.train(RECIPE, runs_dir=tmp_path, figures=False, **QUIET)
    assert again.steps == 21 and f"damaged checkpoint: {newest.name}" in capfd.readouterr().out
    assert load_run(place).weights("last").step == 21


@pytest.mark.parametrize("harm", [a_pipe, endless, nested, many, gone, lambda path: digit_changed(path)])
def test_a_comparison_names_the_records_that_are_wrong(place, whole, capsys, harm):
    harm(place / "metrics.jsonl")
    with contextlib.suppress(SystemExit):  # where no score is left
        main(["compare", str(place), str(whole)])
    printed = capsys.readouterr()
    (line,) = [line for line in (printed.out + printed.err).splitlines() if "metrics.jsonl: " in line]
    assert line.startswith(("error: ", "note     it: "))


def digit_changed(path):
    path.write_text(path.read_text().replace('"test/loss": 0.', '"test/loss": 0.0', 1))


# JSON that takes a hundred times its text.


def test_json_of_very_many_values_is_refused_before_it_is_parsed():
    text = b"[" + b"[]," * files.MAX_JSON_VALUES + b"[]]"
    with pytest.raises(ValueError, match="more than the limit of 5,000,000"):
        files.parse_json(text)
    assert files.parse_json(b"[[], {}, 1]") == [[], {}, 1]


def test_a_state_that_could_not_be_read_again_is_not_published(tmp_path, monkeypatch):
    before = checkpoint_writer.publish(tmp_path, checkpoint.Checkpoint(1, {"model.safetensors": {}}, {"a": 1}))
    monkeypatch.setattr(files, "MAX_JSON_VALUES", 1000)
    large = checkpoint.Checkpoint(2, {"model.safetensors": {}}, {"python": list(range(2000))})
    with pytest.raises(
        OSError, match=r"manifest.json has up to 2,0\d\d values, more .*: keep large lists and texts out"
    ):
        checkpoint_writer.publish(tmp_path, large)
    assert list(tmp_path.iterdir()) == [before]


# What data() found, and the fields: run.json has no hash, the checkpoint's manifest has.


class Finding:
    """`keeping` with a tensor and a number that its data find."""

    @staticmethod
    def of(tmp_path):
        text = RECIPE.read_text().replace(
            "    def score",
            "    def data(self, config):\n        self.known, self.half = torch.full((2,), 0.5), 0.5\n"
            "        return super().data(config)\n\n    def score",
            1,
        )
        (tmp_path / "finding.py").write_text(text)
        return nndist.train(tmp_path / "finding.py", runs_dir=tmp_path, figures=False, max_steps=3, **QUIET).folder


@pytest.fixture
def finding(tmp_path):
    return Finding.of(tmp_path)


def test_what_data_found_is_read_as_it_was(finding):
    run = load_run(finding)
    run.weights()
    assert torch.equal(run.recipe.known, torch.full((2,), 0.5)) and run.recipe.half == 0.5 and not run.notes


@pytest.mark.parametrize("harm", [a_pipe, endless, lambda path: os.truncate(path, 2**40), lambda path: flip(path)])
def test_tensors_that_data_found_and_that_are_damaged_are_named(finding, harm):
    harm(finding / "found.safetensors")
    with pytest.raises(UserError, match=r"found.safetensors: can't be read .*restore it from a copy"):
        print(load_run(finding).recipe)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda about: about["fields"].update(lr=0.25),
            "run.json: the field lr is 0.25, but in the newest checkpoint 0.05; ",
        ),
        (lambda about: about["fields"].pop("lr"), "run.json: the field lr is missing, but"),
        (lambda about: about["found"].update(half=0.25), r"run.json: what data\(\) set is not"),
        (lambda about: about.pop("found"), r"run.json: what data\(\) set is not"),
    ],
)
def test_a_description_that_its_checkpoint_contradicts_is_noted(finding, change, said):
    path = finding / "run.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))
    run = load_run(finding)
    run.weights()
    (note,) = run.notes
    assert re.match(said, note)


# Texts and figures.


@pytest.mark.parametrize("harm", [a_pipe, endless, lambda path: os.truncate(path, 2**40)])
def test_a_headline_that_is_no_text_is_left_out(place, harm):
    (place / "figures").mkdir()
    about = json.loads((place / "run.json").read_text())
    (place / "run.json").write_text(json.dumps({**about, "headline": ["remark"]}))
    path = place / "figures/remark.txt"
    path.write_text("ten of ten\n")
    assert read_run(place).headline_texts == {"remark": "ten of ten"}
    harm(path)
    assert read_run(place).headline_texts == {}


def test_figures_that_wandb_must_not_be_given_are_left_out(tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(subprocess, "check_call", lambda *arguments, **named: pytest.fail("Ghostscript was started"))
    Image.new("L", (20, 20)).save(tmp_path / "good.png")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "text.txt").write_text("<b>")
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (20_000).to_bytes(4) * 2)
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\0")
    assert set(wandb.figures(tmp_path)) == {"figures/good", "figures/table", "figures/text"}
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in said] == [
        f"figures/{name}" for name in ("binary.csv", "endless.txt", "eps.png", "large.png", "pipe.csv")
    ]


@pytest.mark.parametrize("harm", ["a file for its folder", "a pipe for its log"])
def test_a_sink_that_can_not_be_started_costs_one_line(tmp_path, capsys, harm):
    place = nndist.train(RECIPE, runs_dir=tmp_path, figures=False, max_steps=2, **QUIET).folder
    if harm == "a pipe for its log":
        (place / "wandb").mkdir()
        os.mkfifo(place / "wandb/sink.log")
    else:
        (place / "wandb").write_text("")
    flags = {**QUIET, "wandb": "offline"}
    assert nndist.train(RECIPE, runs_dir=tmp_path, figures=False, max_steps=4, **flags).steps == 4
    assert capsys.readouterr().out.count("W&B: can't be started") == 1


# A folder that goes at the very end.


def test_a_folder_that_goes_while_figures_are_drawn_is_no_finished_run(tmp_path):
    from workers.keeping import Keeping

    class Gone(Keeping):
        def figures(self, networks, data, history):
            shutil.rmtree(tmp_path / self.name / "it")
            return {}

    with pytest.raises(TrainingError, match="the run's folder was removed"):
        nndist.train(Gone(), runs_dir=tmp_path, max_steps=2, **QUIET)
    assert not (tmp_path / "test_hostile_folders/it").exists()

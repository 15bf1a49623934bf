"""Whatever becomes of a file of a run's folder: the same result as before, or one clear error, at once.

Each example changes one file of a copy: bits, length, kind (a pipe, a link to an endless device, a folder), or values
in JSON, with the manifest's hash put right again or not; then all that reads a run reads it, in this process.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launching import ROOT
from safetensors.torch import save

import nndist
from nndist import report
from nndist.config import RunConfig
from nndist.errors import TrainingError, UserError
from nndist.recipe.loading import load_recipe
from nndist.runs import checkpoint, inspection
from nndist.runs.tracking import Tracker
from nndist.trained.loaded_run import load_run
from nndist.training.folder import lock
from nndist.training.resume import resume
from nndist.training.run import begin

RECIPE = (ROOT / "tests/workers/keeping.py").read_text()
SECONDS = 5  # for all that reads a run; it takes about a tenth of one
VALUES = [None, True, "", "x", "nul\0", "\ud800", 0, -1, 2**31, 2**62, 2**70, 10**400, 0.5, 1e308, [], {}, [[]]]


def digest(tensors) -> str:
    return hashlib.sha256(save(dict(tensors))).hexdigest()


@dataclass(repr=False)
class Whole:
    """The run before anything was changed, and what reading it gives."""

    folder: Path
    recipe: Path
    trainer: object
    files: list[str]
    about: dict
    weights: dict[str, set[str]]
    records: list
    snapshots: list

    def _repr_pretty_(self, printer, cycle):
        printer.text("the whole run")


MEMORY = Path("/dev/shm")  # where files cost the least


@pytest.fixture(scope="module")
def whole():
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as where:
        yield made_whole(Path(where))


def made_whole(where: Path) -> Whole:
    recipe = where / "keeping.py"
    recipe.write_text(with_a_helper_and_a_tensor(RECIPE))
    (where / "beside.py").write_text("HALF = 0.5\n")
    flags = {"progress": False, "threads": 1, "save_every": "5 steps", "run": "it", "runs_dir": where}
    result = nndist.train(recipe, **flags)
    place = result.folder
    assert result.best["step"] == 7, "so that a checkpoint besides the newest is in use"
    saved = {path.name: checkpoint.read(path) for _, path in checkpoint.checkpoints_in(place / "checkpoints")}
    assert len(saved) == 3
    weights = {
        file: {digest(found.tensors[file]) for found in saved.values()}
        for file in ("model.safetensors", "ema.safetensors")
    }
    config = RunConfig(**flags)
    trainer = begin(load_recipe(recipe)(), config)
    names = sorted(str(path.relative_to(place)) for path in place.rglob("*"))
    run = load_run(place)
    snapshots = [(step, digest(tensors)) for step, tensors in run.history.snapshots]
    assert len(snapshots) == 3 and {"figures/scores.csv", "figures/remark.txt", "recipe.py", "run.json"} <= set(names)
    assert {"modules/beside.py", "found.safetensors"} <= set(names)
    about = {name: run.about[name] for name in ("fields", "found")}
    return Whole(place, recipe, trainer, names, about, weights, run.history.records, snapshots)


def with_a_helper_and_a_tensor(text: str) -> str:
    """The recipe with a module beside it, and with a tensor that its data finds: files of their own in the folder."""
    text = text.replace("from toys", "from beside import HALF\nfrom toys", 1).replace("0.5)", "HALF)", 1)
    known = "        self.known = torch.full((2,), HALF)\n"
    found = f"    def data(self, config):\n{known}        return super().data(config)\n\n"
    assert text.count("HALF") == 2
    headline = '    headline = ("remark",)\n\n'  # the index shows this text
    return text.replace("    def score", f"{headline}{found}    def score", 1)


@contextlib.contextmanager
def at_once():
    """Fails, wherever it waits, where what is in it takes too long."""

    def late(number, frame):
        raise AssertionError(f"still not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# What befalls a file.


def flipped(path, draw):
    data = bytearray(path.read_bytes())
    for place in draw(st.lists(st.integers(0, max(0, 8 * len(data) - 1)), min_size=1, max_size=4)):
        if data:
            data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def cut(path, draw):
    os.truncate(path, draw(st.integers(0, path.stat().st_size)))


def lengthened(path, draw):
    with path.open("ab") as file:
        file.write(draw(st.sampled_from([b"\0", b"{}\n", b"x" * 5000, b"\n\n", b'{"step": 99, "epoch": 1.0}\n'])))


def grown_beyond_memory(path, draw):
    os.truncate(path, 2**40)  # a sparse file


def line_changed(path, draw):
    lines = path.read_bytes().split(b"\n")
    place = draw(st.integers(0, len(lines) - 1))
    how = draw(st.sampled_from(["out", "twice", "swapped", "digit"]))
    if how == "out":
        del lines[place]
    elif how == "twice":
        lines.insert(place, lines[place])
    elif how == "swapped":
        lines[place], lines[0] = lines[0], lines[place]
    else:
        lines[place] = lines[place].replace(b"1", b"2", 1)
    path.write_bytes(b"\n".join(lines))


def removed(path, draw):
    path.unlink()


def a_pipe(path, draw):
    path.unlink()
    os.mkfifo(path)


def endless(path, draw):
    path.unlink()
    path.symlink_to(draw(st.sampled_from(["/dev/zero", "/dev/full", "nowhere"])))


def a_folder(path, draw):
    path.unlink()
    path.mkdir()


def nested(path, draw):
    depth = draw(st.sampled_from([70, 900, 100_000]))
    opening = draw(st.sampled_from(['{"step": 1, "a": ', "[", '{"state": {"a": ', '{"records": ']))
    path.write_text(opening + "[" * depth + "]" * depth * draw(st.integers(0, 1)) + "}")


def value_changed(path, draw):
    """Another value, or none, somewhere in JSON; half of the manifests then have their hash put right."""
    lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
    place = draw(st.integers(0, len(lines) - 1))
    value = json.loads(lines[place])
    inner = value
    for _ in range(draw(st.integers(0, 6))):
        keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
        key = draw(st.sampled_from(keys))
        if not isinstance(inner[key], dict | list) or not inner[key]:
            break
        inner = inner[key]
    keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
    key = draw(st.sampled_from(keys))
    if draw(st.integers(0, 3)) == 0:
        del inner[key]
    else:
        inner[key] = draw(st.sampled_from(VALUES))
    if path.name == "manifest.json" and draw(st.booleans()):
        with contextlib.suppress(ValueError):  # numbers that no manifest can hold
            value["sha256"] = checkpoint.own_hash(value)
    lines[place] = dumped(value)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def dumped(value) -> str:
    """JSON of numbers that have too many digits to be printed, too."""
    return json.dumps(value) if value is not None else "null"


def changes_of(path: Path):
    kinds = [flipped, cut, lengthened, grown_beyond_memory, removed, a_pipe, endless, a_folder, nested]
    if path.suffix in (".json", ".jsonl"):
        kinds += [value_changed] * 6
    if path.suffix in (".jsonl", ".csv"):
        kinds += [line_changed] * 3
    return kinds


# What reads it.


def check_resume(whole, place, change):
    """The run goes on from weights that were saved, or one line says why not; nothing is lost unsaid."""
    trainer = whole.trainer
    trainer.folder, trainer.step = place, 0
    try:
        with lock(place):
            resumed = resume(trainer)
            tracker = Tracker(
                place, title="", steps=21, done=trainer.step, metrics_bytes=resumed.metrics_bytes, progress=False
            )
    except (UserError, TrainingError) as error:
        assert one_line(error)
        return
    try:
        if trainer.step:
            held = checkpoint.network_tensors({name: net.state_dict() for name, net in trainer.networks.items()})
            assert digest(held) in whole.weights["model.safetensors"]
        if trainer.step != 21:
            assert any("damaged" in note or "no checkpoint" in note or "is gone" in note for note in resumed.notes)
        if trainer.best.record is not None and trainer.step:
            checkpoint.read(
                place / "checkpoints" / checkpoint.folder_name(trainer.best.record["step"])
            )  # as is promised
        if trainer.step == 21 and trainer.config.resume == "auto":
            assert tracker.history.records == whole.records
    finally:
        tracker.close()


def check_use(whole, place, change):
    """The run as predict, evaluate and export have it."""
    try:
        run = load_run(place)
        run.config()
        networks = run.networks
        held = digest(checkpoint.network_tensors({name: network.state_dict() for name, network in networks.items()}))
        assert held in whole.weights["ema.safetensors"] | whole.weights["model.safetensors"]
        if held != digest(checkpoint.read(whole.folder / "checkpoints/step-00000007").tensors["ema.safetensors"]):
            assert run.notes, "other weights than before, unsaid"
        assert isinstance(run.scores, dict) and isinstance(run.classes, list) and run.name and run.data
        same = json.dumps(whole.about) == json.dumps({name: run.about.get(name) for name in whole.about})
        assert same or any("run.json: " in note for note in run.notes), "other fields than before, unsaid"
        assert not same or torch.equal(run.recipe.known, torch.full((2,), 0.5))
        history = run.history
        history.series("train/loss")
        if not {(step, digest(tensors)) for step, tensors in history.snapshots} <= set(whole.snapshots):
            raise AssertionError("other snapshots than before")
        if history.records != whole.records and (place / "metrics.jsonl").exists():
            assert any("metrics.jsonl" in note for note in run.notes), "other records than before, unsaid"
    except UserError as error:
        assert one_line(error)


def check_pages(whole, place, change):
    """report.html and index.html."""
    try:
        written = list(report.write_pages(place if change else place.parent.parent))
    except (UserError, OSError) as error:  # a folder where the page should be
        assert one_line(error)
    else:
        assert all(page.stat().st_size > 1000 for page in written)


def check_inspection(whole, place, change):
    """What launch/checkpoint.py shows and converts."""
    try:
        lines, _ = inspection.show(place, verify=True)
        assert lines and all(one_line(line) for line in lines)
        inspection.convert(place, place.parent / "weights.safetensors")
        assert (
            digest(checkpoint.read_tensors(place.parent / "weights.safetensors")) in whole.weights["model.safetensors"]
        )
    except UserError as error:
        assert one_line(error)


def one_line(error) -> bool:
    said = str(error)
    said.encode()
    return 0 < len(said) < 1000 and "\n" not in said


def examine(whole, scratch, draw):
    shutil.rmtree(scratch, ignore_errors=True)
    place = scratch / "runs/keeping/it"
    name = draw(st.sampled_from(whole.files))
    path = place / name
    own = {str(whole.folder / one) for one in (name, "metrics.jsonl", "lock")}  # the others are only ever replaced

    def copy(source, to):
        (shutil.copyfile if source in own else os.link)(source, to)

    shutil.copytree(whole.folder, place, copy_function=copy)
    if path.is_dir():
        shutil.rmtree(path)
        if draw(st.booleans()):
            path.write_text("no folder")
        change = None
    else:
        change = draw(st.sampled_from(changes_of(path)))
        with contextlib.suppress(UnicodeDecodeError):
            change(path, draw)
    whole.trainer.config.resume = draw(st.sampled_from(["auto", "rebuild"]))
    aside = whole.recipe.with_suffix(".aside")
    if draw(st.booleans()):  # then the run has to make do with its own copy
        whole.recipe.rename(aside)
    readers = [check_use, check_pages, check_inspection, check_resume]  # the last one writes
    began = time.monotonic()
    try:
        with at_once():
            for reader in readers:
                reader(whole, place, change)
    finally:
        if aside.exists():
            aside.rename(whole.recipe)
    assert time.monotonic() - began < SECONDS


def examined(num: int):
    """A test of so many examples."""

    @settings(
        max_examples=num,
        deadline=None,
        database=None,
        derandomize=num <= 500,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(data=st.data())
    def test(whole, data):
        examine(whole, whole.recipe.with_name("mutated"), data.draw)

    return test


test_sixty_changes = examined(60)
test_ten_thousand_changes = pytest.mark.nightly(examined(10_000))

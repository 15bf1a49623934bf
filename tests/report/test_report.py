"""report.html and index.html: what they say of a run's folder, and what a real browser makes of them."""

import base64
import html.parser
import json
import os
import re
import shlex
import struct
import threading
import time
from dataclasses import dataclass

import pytest
import torch
from browser import EXECUTABLE, Browser
from conftest import ROOT
from launching import command, python, succeeded
from made_runs import FASTER, VISIBLE, make_run, png, records
from PIL import Image
from toys import Line

import nndist
from nndist import figures, files, report
from nndist.cli import train as cli
from nndist.errors import UserError
from nndist.report import run_figures, run_tables
from nndist.runs import reading
from nndist.training import showing

HOSTILE = "<script>alert(1)</script></script>\"'&amp;\u2028中文 {x}"


class Reader(html.parser.HTMLParser):
    """What an HTML parser finds: elements with their attributes, the text, and what stands in scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.text = [], [], ""
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def data(self):
        return json.loads(self.scripts[0])


def read(path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


# What the pages say.


def test_a_page_says_what_was_trained_on_what_and_how_well(tmp_path):
    page = read(report.write_run(make_run(tmp_path)))
    for said in (
        *("digits", "first", "Digits with two convolutions", "document 000, section 2", "finished"),
        *("97.959 % of the test set", "89.10 %", "MNIST", "60,000 examples to train on", "100 of 100", "1 min 16 s"),
        *("model 1,199,882 parameters", "lr", "2.11.0", "CPU x 1 process x 2 threads", "one, two"),
        "python launch/train.py recipes/digits.py --run first",
        "load_file('checkpoints/step-00000100/model.safetensors')",
    ):
        assert said in page.text, said
    panels = {panel["title"]: [series["name"] for series in panel["series"]] for panel in page.data()["panels"]}
    assert panels == {
        "loss": ["train/loss", "test/loss"],
        "accuracy": ["test/accuracy"],
        "learning rate": ["lr"],
        "gradient norm before clipping": ["gradient_norm"],
        "examples per second": ["examples_per_second"],
    }
    train, test = page.data()["panels"][0]["series"]
    assert train["step"] == list(range(1, 101)) and train["value"][0] == 2.01 and train["thin"]
    assert test["step"] == [25, 50, 75, 100] and test["epoch"] == [1, 2, 3, 4] and not test["thin"]


@pytest.mark.parametrize("per_epoch, said", [(100, "1 epoch"), (50, "2 epochs"), (200, "0.5 epochs")])
def test_one_epoch_is_no_plural(tmp_path, per_epoch, said):
    lines = [json.dumps(record) for record in records(per_epoch=per_epoch)]
    page = report.write_run(make_run(tmp_path, lines=lines)).read_text()
    assert f"</progress>{said}</dd>" in page


def test_a_sample_is_not_taken_for_the_set(tmp_path):
    sample = {"source": "MNIST sample", "train": 4000, "test": 1000}
    page = read(report.write_run(make_run(tmp_path, data=sample)))
    assert "A small sample, not MNIST: its scores must not be compared" in page.text
    assert "A small sample" not in read(report.write_run(make_run(tmp_path, "digits", "whole"))).text


def test_the_documents_figure_is_shown_where_there_is_one(tmp_path):
    page = read(report.write_run(make_run(tmp_path)))
    assert "The document's figure" in page.text and "97.959 % of the test set" in page.text


@pytest.mark.parametrize("nothing", ["", None])
def test_nothing_is_said_of_documents_where_a_recipe_follows_none(tmp_path, nothing):
    folder = make_run(tmp_path, document=nothing, documented=nothing)
    for path in (report.write_run(folder), report.write_index(tmp_path)):
        assert "document" not in read(path).text.lower()


@pytest.mark.parametrize(
    "headline, said", [(["test/loss", "test/accuracy"], "nothing has been evaluated"), (["samples_text"], "not drawn")]
)
def test_a_run_that_failed_before_its_first_evaluation(tmp_path, headline, said):
    folder = make_run(tmp_path, lines=[], checkpoints=(), status="failed", headline=headline)
    text = read(report.write_run(folder)).text
    assert said in text and "The same command starts it again" in text and "newest checkpoint, to" not in text


@pytest.mark.parametrize(
    "name, fields, values, best",
    [
        ("test/accuracy", {}, [0.5, 0.9, 0.8], "highest 90.00 % at step 2"),
        ("test/loss", {}, [0.5, 0.1, 0.3], "lowest 0.1 at step 2"),
        ("test/perplexity", {}, [5.0, None, 7.0], "lowest 5 at step 1"),
        ("test/likeness", {"best": "test/likeness", "best_is": "lowest"}, [0.5, 0.9, 0.8], "lowest 0.5 at step 1"),
    ],
)
def test_best_scores(tmp_path, name, fields, values, best):
    lines = [json.dumps({"step": step, "epoch": step, name: value}) for step, value in enumerate(values, 1)]
    assert best in read(report.write_run(make_run(tmp_path, fields=fields, lines=lines))).text


def test_no_score_is_called_best_where_its_direction_is_not_known(tmp_path):
    lines = [json.dumps({"step": step, "epoch": step, "test/likeness": step / 8}) for step in (1, 2, 3)]
    said = read(report.write_run(make_run(tmp_path, lines=lines))).text
    assert "0.375" in said and "the highest" not in said and "; highest" not in said


def test_figures_are_embedded(tmp_path):
    images = {"matrix.png": png(), "film.gif": b"GIF89a" + struct.pack("<HH", 20, 10) + b"\0;", "training.png": png(90)}
    texts = {"sums.txt": b"1 < 2 & 3", "list.csv": b"label,given\n1,<b>\n2,7\n"}
    other = {".part.png": b"half", "notes.bin": b"?"}
    page = read(report.write_run(make_run(tmp_path, figures=images | texts | other)))
    found = [attributes for tag, attributes in page.elements if tag == "img"]
    contents = [base64.b64decode(attributes["src"].split(",")[1]) for attributes in found]
    assert contents == [images["film.gif"], images["matrix.png"], images["training.png"]]
    assert [(a["width"], a["height"]) for a in found] == [("20", "10"), ("40", "30"), ("90", "30")]
    assert "1 < 2 & 3" in page.text and "<b>" in page.text and "half" not in page.text
    assert not any(tag == "b" for tag, _ in page.elements)


def test_an_image_that_is_too_large_is_linked(tmp_path, monkeypatch):
    monkeypatch.setattr(run_figures, "MAX_IMAGE_BYTES", 10)
    page = read(report.write_run(make_run(tmp_path, figures={"a b.png": png()})))
    assert ("a", {"href": "./figures/a%20b.png"}) in page.elements
    assert not any(tag == "img" for tag, _ in page.elements)


def test_launches_tell_the_history(tmp_path):
    text = " ".join(read(report.write_run(make_run(tmp_path))).text.split())
    assert re.search(r"Launches.*1.*0.*40.*30.0 s.*2.*one.*stopped.*2.*40.*100.*45.5 s.*1.*two.*finished", text)


@pytest.mark.parametrize(
    "about, words",
    [
        ({}, "python launch/train.py r.py --run first"),
        ({"command": ["launch/train.py", "r.py", "--run=first"]}, "python launch/train.py r.py --run=first"),
        ({"command": ["launch/train.py", "r.py"]}, "python launch/train.py r.py --run first"),
        ({"command": ["/x/nndist/__main__.py", "r.py"]}, "python -m nndist r.py --run first"),
        ({"command": ["launch/train.py", "a b.py"]}, "python launch/train.py 'a b.py' --run first"),
        (
            {"world_size": 3},
            "accelerate launch --config_file launch/accelerate/cpu_ddp.yaml --num_processes 3 launch/train.py r.py "
            "--run first",
        ),
        (
            {"world_size": 8, "device": "NVIDIA H100 x 8 processes"},
            "accelerate launch --config_file launch/accelerate/gpu_ddp.yaml --num_processes 8 launch/train.py r.py "
            "--run first",
        ),
        ({"command": ["/x/ipykernel_launcher"]}, ""),
        ({"command": "launch/train.py"}, ""),
    ],
)
def test_the_command_that_goes_on(tmp_path, about, words):
    folder = make_run(
        tmp_path, **{"command": ["launch/train.py", "r.py", "--run", "first"], "status": "failed"} | about
    )
    run = reading.read_run(folder)
    assert " ".join(shlex.join(run_tables.command(run.about, run.name)).split()) == words
    assert words in read(report.write_run(folder)).text


def test_long_curves_keep_their_peaks_and_say_that_they_are_thinned(tmp_path):
    losses = {n: 1000.0 if n == 7777 else 1 + n % 7 for n in range(1, 10001)}
    lines = [json.dumps({"step": n, "epoch": n, "train/loss": loss}) for n, loss in losses.items()]
    page = read(report.write_run(make_run(tmp_path, lines=lines)))
    (panel,) = page.data()["panels"]
    (series,) = panel["series"]
    assert 1900 <= len(series["step"]) <= 2002
    assert series["value"][series["step"].index(7777)] == 1000.0
    assert (series["step"][0], series["step"][-1]) == (1, 10000) and series["step"] == sorted(series["step"])
    assert panel["notes"] == ["Drawn as the lowest and highest of each stretch: train/loss (10,000 records)."]


# Names and values that are HTML.


def test_every_name_and_value_shows_as_text(tmp_path):
    lines = [
        json.dumps({"step": step, "epoch": step, f"test/{HOSTILE}": step, f"{HOSTILE}": step, "data": HOSTILE})
        for step in (1, 2)
    ]
    everywhere = {
        **{key: HOSTILE for key in ("recipe", "title", "document", "documented", "device", "updated", "status")},
        **{key: {HOSTILE: HOSTILE} for key in ("plan", "fields", "settings", "versions")},
        "data": {"source": HOSTILE, HOSTILE: 3},
        "command": ["launch/train.py", HOSTILE],
        "launches": [{"began": HOSTILE, "status": HOSTILE, "host": HOSTILE, "from_step": HOSTILE}],
    }
    name = HOSTILE.replace("/", "∕")
    figures = {f"{name}.txt": HOSTILE.encode(), f"{name}.png": png(), f"{name}.csv": f'"{HOSTILE}"\n1'.encode()}
    folder = make_run(tmp_path, name, name, lines=lines, figures=figures, **everywhere)
    for path in (report.write_run(folder), report.write_index(tmp_path)):
        text = path.read_text(encoding="utf-8")
        page = Reader(text)
        assert [tag for tag, _ in page.elements].count("script") == 2 == text.count("<script")
        assert page.text.count(HOSTILE) >= 4
        raw = page.scripts[0]
        assert not set("<>&\u2028\u2029") & set(raw)
        assert HOSTILE in json.dumps(page.data(), ensure_ascii=False).replace('\\"', '"')
        assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    run = read(folder / "report.html")
    assert run.text.count(HOSTILE) >= 20
    assert next(attributes["alt"] for tag, attributes in run.elements if tag == "img") == name.replace("_", " ")


def test_half_of_a_surrogate_pair_is_no_reason_to_fail(tmp_path):
    assert "</html>" in report.write_run(make_run(tmp_path, title="\ud800")).read_text(encoding="utf-8")


# Whatever a folder holds.


@pytest.mark.parametrize(
    "about",
    [
        dict.fromkeys(["title", "documented", "plan", "seconds", "launches"]),
        {key: 7 for key in ("plan", "fields", "settings", "data", "versions", "command", "launches", "title", "best")},
        {key: [None] for key in ("step", "total_steps", "seconds", "world_size", "updated", "launches", "documented")},
        {"total_steps": 0, "step": -1, "seconds": 1e300, "updated": "9999-99-99"},
        {"total_steps": 10**400, "seconds": 10**400},
        {"fields": {"best": "test/nothing"}, "scores": None, "best": {"step": "?"}},
    ],
)
def test_descriptions_of_other_versions(tmp_path, about):
    page = read(report.write_run(make_run(tmp_path, **about)))
    assert "89.10 %" in page.text
    report.write_index(tmp_path)


def test_a_run_of_nothing_but_a_description(tmp_path):
    folder = tmp_path / "digits/empty"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    page = read(report.write_run(folder))
    assert "none yet" in page.text and "Nothing has been recorded yet" in page.text and page.data()["panels"] == []
    assert "No checkpoint has been saved yet" in page.text
    assert "empty" in read(report.write_index(tmp_path)).text


def test_records_that_are_null_cut_short_or_no_records(tmp_path):
    lines = ['{"step": 1, "epoch": 0.5, "train/loss": 1.5}', '{"step": 2, "epoch": 1.0, "train/loss": null}']
    lines += ["7", "not JSON", '{"epoch": 3}', '{"step": 3, "train/loss": NaN, "test/x": "text", "test/y": true}']
    folder = make_run(tmp_path, lines=lines)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "epoch": 2.0, "train/lo')
    (panel,) = read(report.write_run(folder)).data()["panels"]
    (series,) = panel["series"]
    assert (series["step"], series["value"]) == ([1, 2, 3], [1.5, None, None])
    assert panel["notes"] == ["Not finite, and left out: train/loss (2)."]


def test_a_run_that_lives_says_where_it_is(tmp_path):
    lines = [json.dumps(record) for record in records(steps=60)]
    folder = make_run(tmp_path, lines=lines, status="running", step=0, total_steps=100)
    page = read(report.write_run(folder))
    assert "60 of 100" in page.text and "is being trained" in page.text and "Latest test accuracy" in page.text
    assert page.data()["running"] and abs(page.data()["updated"] - time.time()) < 60  # metrics.jsonl is newer
    assert [a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv") == "refresh"] == ["10"]
    ended = read(report.write_run(make_run(tmp_path, "digits", "ended")))
    assert not ended.data()["running"] and not any(a.get("http-equiv") == "refresh" for _, a in ended.elements)


# Writing.


def test_a_reader_never_sees_half_a_page(tmp_path):
    folder = make_run(tmp_path, figures={"a.png": png(300, 300)})
    path = report.write_run(folder)
    stop, wrong, num_read = threading.Event(), [], 0

    def write():
        while not stop.is_set():
            report.write_run(folder)
            report.write_index(tmp_path)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        num_read += 1
        for page in (path, tmp_path / "index.html"):
            if page.exists() and not page.read_bytes().endswith(b"</html>\n"):
                wrong.append(page)
    stop.set()
    for writer in writers:
        writer.join()
    assert num_read > 20 and not wrong
    assert not [left for left in tmp_path.rglob(".*")]


def test_a_page_that_can_not_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    folder = make_run(tmp_path)
    before = report.write_run(folder).read_bytes()

    def full(part, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        report.write_run(folder)
    assert (folder / "report.html").read_bytes() == before and not list(folder.glob(".*"))


def test_what_a_page_costs(tmp_path):
    """It is written at each evaluation: 10,000 records and six figures, a fifth of a second of one core."""
    lines = [json.dumps(record) for record in records(steps=9600)]
    figures = {f"{n}.png": png() + bytes(150_000) for n in range(6)}
    folder = make_run(tmp_path, lines=lines, figures=figures)
    assert len(lines) == 9984
    seconds = []
    for _ in range(5):
        began = time.thread_time()
        report.write_run(folder)
        seconds.append(time.thread_time() - began)
    assert min(seconds) < 0.2, seconds


def test_importing_it_loads_nothing_heavy():
    heavy = ["torch", "numpy", "matplotlib", "tyro", "accelerate"]
    done = succeeded(python("-c", f"import nndist.report, sys; print([m for m in {heavy} if m in sys.modules])"))
    assert done.stdout.strip() == "[]"


# A training writes its page.

QUIET = {"progress": False, "figures": False, "threads": 1, "wandb": "off"}


class Clock:
    """Stands where a module has `time`: it goes on only where a test says so."""

    now = 0.0

    def perf_counter(self):
        return self.now


def watched(monkeypatch, runs_dir, *, seconds_to_write=0.0, **settings):
    """Trains 21 steps with three evaluations, 1,000 s apart; gives the result and each page as it was written."""
    clock, pages, write = Clock(), [], report.write_run

    @dataclass(kw_only=True)
    class Timed(Line):
        def score(self, networks, batch):
            clock.now += 1000
            return super().score(networks, batch)

    def write_slowly(folder):
        pages.append(read(write(folder)))
        clock.now += seconds_to_write
        return folder / "report.html"

    monkeypatch.setattr(showing, "time", clock)
    monkeypatch.setattr(report, "write_run", write_slowly)
    return nndist.train(Timed(), runs_dir=runs_dir, **QUIET | settings), pages


def evaluated(page):
    """The steps whose test loss a page shows."""
    return next(series["step"] for series in page.data()["panels"][0]["series"] if series["name"] == "test/loss")


def test_a_training_writes_its_page_at_each_evaluation_and_once_more_at_its_end(tmp_path, monkeypatch):
    result, pages = watched(monkeypatch, tmp_path, figures=True)
    assert [evaluated(page) for page in pages] == [[7], [7, 14], [7, 14, 21], [7, 14, 21]]
    assert [page.data()["running"] for page in pages] == [True, True, True, False]
    for step, page in zip((7, 14, 21), pages, strict=False):
        assert "is being trained" in page.text and f"{step} of 21" in page.text
    *_, last = pages
    assert "has finished training" in last.text and "21 of 21" in last.text
    assert [tag for tag, _ in last.elements].count("img") == 1, "the figures are drawn by then"
    assert read(result.folder / "report.html").elements == last.elements


def test_a_page_that_takes_long_to_write_is_written_more_seldom(tmp_path, monkeypatch):
    """15 s of writing: a hundred times that pass before it is written anew, but for the end."""
    _, pages = watched(monkeypatch, tmp_path, seconds_to_write=15.0)
    assert [(evaluated(page)[-1], page.data()["running"]) for page in pages] == [(7, True), (21, True), (21, False)]


@pytest.mark.parametrize("flags, count", [([], 1), (["--no-report"], 0)])
def test_a_training_that_is_asked_for_no_page_writes_none(tmp_path, capsys, flags, count):
    settings = ["--runs-dir", str(tmp_path), "--no-progress", "--no-figures", "--threads", "1", "--wandb", "off"]
    with pytest.raises(SystemExit) as ended:
        cli.train_command([str(ROOT / "recipes/two_clusters.py"), "--epochs", "20", *settings, *flags])
    assert not ended.value.code
    assert len([*tmp_path.rglob("metrics.jsonl")]) == 1
    assert len([*tmp_path.rglob("report.html")]) == count == capsys.readouterr().out.count("report.html")


def test_a_page_that_can_not_be_written_costs_a_training_one_line(tmp_path, monkeypatch, capsys):
    undisturbed = nndist.train(Line(), runs_dir=tmp_path, **QUIET)
    capsys.readouterr()

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_run", full)
    result = nndist.train(Line(), runs_dir=tmp_path, **QUIET)
    assert json.loads((result.folder / "run.json").read_text())["status"] == "finished"
    assert result.steps == 21 and result.scores == undisturbed.scores
    assert result.history.series("test/loss") == undisturbed.history.series("test/loss")
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if "report" in line]
    assert lines == ["report.html can't be written (OSError: [Errno 28] No space left on device); the run continues"]
    assert "Traceback" not in said.out + said.err


# The index.


def test_the_index_lists_all_runs_and_says_what_is_wrong_with_one(tmp_path):
    report.write_run(make_run(tmp_path, "digits", "a b#c"))
    make_run(tmp_path, "digits", "second", data={"source": "MNIST sample"})
    (make_run(tmp_path, "sums", "broken") / "run.json").write_text("{")
    (make_run(tmp_path, "sums", "gone") / "run.json").unlink()
    (make_run(tmp_path, "sums", "list") / "run.json").write_text("[]")
    make_run(tmp_path, "digits", ".check-x")
    (tmp_path / "digits" / "notes").mkdir()
    page = read(report.write_index(tmp_path))
    rows = [attributes for tag, attributes in page.elements if tag == "tr"]
    assert len(rows) == 1 + 5
    assert ("a", {"href": "./digits/a%20b%23c/report.html"}) in page.elements
    assert "MNIST sample" in page.text and "89.10 %" in page.text
    for reason in ("not JSON", "No such file or directory", "holds no description of a run"):
        assert f"unreadable: run.json: {reason}" in page.text
    assert [run["name"] for run in page.data()["runs"]] == ["digits / a b#c", "digits / second"]
    assert page.data()["metrics"][:3] == ["test/accuracy", "test/loss", "train/loss"]
    assert page.data()["percent"] == ["test/accuracy"]


def test_the_index_of_many_long_runs_stays_small(tmp_path):
    more = {f"test/score/{number}": 0.123456 + number for number in range(14)}
    lines = [json.dumps(record | more) for record in records(steps=1000)]
    for number in range(40):
        make_run(tmp_path, "digits", f"run-{number}", lines=lines, checkpoints=())
    assert report.write_index(tmp_path).stat().st_size < 2_400_000


@pytest.mark.parametrize("where", ["nowhere", "", "recipe"])
def test_an_index_needs_runs(tmp_path, where):
    if where == "recipe":
        make_run(tmp_path, "recipe")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / where))):
        report.write_index(tmp_path / where)


# The command.


def test_the_command_writes_one_page_or_all(tmp_path):
    folder = make_run(tmp_path)
    script = ROOT / "launch/report.py"
    done = succeeded(command(script, folder))
    assert done.stdout.split() == [str(folder / "report.html")]
    (make_run(tmp_path, "digits", "broken") / "run.json").write_text("{")
    done = succeeded(command(script, tmp_path))
    assert done.stdout.split() == [str(folder / "report.html"), str(tmp_path / "index.html")]
    assert "nndist report runs" in succeeded(command(script, "--help")).stdout.splitlines()[2]


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["tests"], ["a", "b"], ["--nonsense"]])
def test_a_mistake_is_one_line(arguments):
    done = command(ROOT / "launch/report.py", *arguments, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# A real browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium; `.ci/run` installs it, so that these tests can't be skipped there."""
    if EXECUTABLE is None:
        pytest.skip("there is no chromium; apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def quiet(page, path) -> None:
    """Asserts that nothing went wrong in the page, and that it asked for nothing but itself."""
    assert page.complaints == []
    assert {address for address in page.requests if not address.startswith("data:")} == {path.resolve().as_uri()}


def test_curves_in_a_browser(browser, tmp_path):
    path = report.write_run(make_run(tmp_path, figures={"a.png": png()}))
    page = browser.open(path)
    assert page.js("document.querySelectorAll('.panel').length") == 5
    assert page.js(VISIBLE.format(0)) == ["train/loss", "test/loss"]
    assert page.js("document.querySelector('img').naturalWidth") == 40

    page.click(".panel .legend li:nth-child(2) button")
    assert page.js(VISIBLE.format(0)) == ["train/loss"]
    assert page.js("document.querySelector('.legend li:nth-child(2) button').ariaPressed") == "false"
    page.press("Enter")  # the button has the focus
    assert page.js(VISIBLE.format(0)) == ["train/loss", "test/loss"]

    before = page.js("document.querySelector('.plot path').getAttribute('d')")
    page.click(".panel .toggle")
    assert page.js("document.querySelector('.plot path').getAttribute('d')") != before

    assert page.js("document.querySelector('.readout').hidden")
    page.hover(".plot svg", 0.99, 0.5)
    said = page.js("document.querySelector('.readout').innerText")
    assert not page.js("document.querySelector('.readout').hidden")
    assert said.split("\n")[0] == "step 100, epoch 4"
    assert re.search(r"train/loss\s+0.03\s+test/loss\s+0.022", said)
    page.hover("h1")
    assert page.js("document.querySelector('.readout').hidden")

    page.js("document.querySelector('.plot svg').focus()")
    page.press("End")
    page.press("ArrowLeft")
    said = page.js("document.querySelector('.readout').innerText")
    assert said.startswith("step 99, epoch 3.96") and "at step 100" in said
    quiet(page, path)
    assert page.js("fetch('data:,x').then(() => 'loaded', () => 'refused')") == "refused"  # by the page's policy
    page.close()


def test_sorting_filtering_and_comparing_in_a_browser(browser, tmp_path):
    for number, (run, speed) in enumerate([("b", 0.5), ("C", 10000.0), ("a", 0.25), ("d", None)]):
        lines = [json.dumps(record) for record in records(speed=speed, accuracy=0.9 - 0.1 * number)]
        make_run(tmp_path, "digits" if number < 3 else "sums", run, lines=lines)
    (make_run(tmp_path, "digits", "broken") / "run.json").write_text("{")
    path = report.write_index(tmp_path)
    page = browser.open(path)
    names = "[...document.querySelectorAll('.runs tbody tr')].filter(r => !r.hidden).map(r => r.cells[2].innerText)"
    column = ".runs thead th:nth-child({}) button".format
    sorted_by = "[...document.querySelectorAll('th[aria-sort]')].map(h => [h.innerText, h.ariaSort])"
    assert page.js(sorted_by) == [["when", "descending"]]
    page.click(column(9))
    assert page.js(names) == ["C", "b", "a", "broken", "d"] or page.js(names) == ["C", "b", "a", "d", "broken"]
    assert page.js(sorted_by) == [["examples/s", "descending"]]
    page.press("Enter")
    assert page.js(names)[:3] == ["a", "b", "C"] and page.js(sorted_by) == [["examples/s", "ascending"]]
    page.click(column(3))
    assert page.js(names) == ["a", "b", "broken", "C", "d"] and page.js(sorted_by) == [["run", "ascending"]]
    page.click(column(3))
    assert page.js(names) == ["d", "C", "broken", "b", "a"] and page.js(sorted_by) == [["run", "descending"]]

    assert sorted(page.js(VISIBLE.format(0))) == ["digits / C", "digits / a", "digits / b", "sums / d"]
    page.click(".runs tbody tr:nth-child(2) input")
    assert sorted(page.js(VISIBLE.format(0))) == ["digits / a", "digits / b", "sums / d"]
    page.click("#comparison .legend li:first-child button")
    assert len(page.js(VISIBLE.format(0))) == 2
    page.click("#none")
    assert page.js(VISIBLE.format(0)) == []
    page.js("document.getElementById('filter').focus()")
    page.send("Input.insertText", text="SUMS")
    assert page.js(names) == ["d"] and page.js("document.getElementById('count').innerText") == "1 of 5 runs"
    page.click("#all")
    assert page.js(VISIBLE.format(0)) == ["sums / d"]
    choose = (
        "(() => {{ const e = document.getElementById('{}'); e.value = '{}'; e.dispatchEvent(new Event('change')) }})()"
    )
    page.js(choose.format("metric", "train/loss"))
    page.js(choose.format("axis", "epoch"))
    page.hover("#comparison svg", 0.99, 0.5)
    said = page.js("document.querySelector('.readout').innerText")
    assert said.split() == ["step", "100,", "epoch", "4", "sums", "/", "d", "0.03"]
    quiet(page, path)
    page.close()


@pytest.mark.parametrize(
    "name", [HOSTILE.replace("/", "∕"), "__proto__", "</title><img src=x onerror=alert(1)>".replace("/", "∕")]
)
def test_markup_in_names_shows_as_text_in_a_browser(browser, tmp_path, name):
    lines = [json.dumps({"step": n, "epoch": n, f"test/{name}": n, f"train/{HOSTILE}": n}) for n in (1, 2, 3)]
    folder = make_run(tmp_path, name, name, title=name, lines=lines, status=name, figures={f"{name}.png": png()})
    for path in (report.write_run(folder), report.write_index(tmp_path)):
        page = browser.open(path, script="window.ran = 0; window.alert = () => { window.ran++ }")
        page.hover(".plot svg", 0.99, 0.5)
        shown = page.js("document.body.innerText")
        assert shown.count(" ".join(name.split())[:8]) >= 4
        assert (
            f"test/{name}"[:12] in page.js("document.querySelector('.legend, .readout').innerText")
            or "index" in path.name
        )
        assert page.js("window.ran") == 0 and page.js("document.scripts.length") == 2
        quiet(page, path)
        page.close()


def test_a_page_reloads_while_the_run_lives_and_keeps_what_was_chosen(browser, tmp_path):
    folder = make_run(tmp_path, status="running", figures={"a.png": png(400, 900)})
    path = report.write_run(folder)
    page = browser.open(path, script=FASTER)
    page.click(".panel .legend button")
    page.js("window.scrollTo(0, 700)")
    page.wait("document.getElementById('age').innerText.includes(' ago)')")
    page.until(lambda: page.loads >= 3)
    page.wait("document.readyState === 'complete'")
    assert page.js(VISIBLE.format(0)) == ["test/loss"] and page.js("window.scrollY") == 700

    about = json.loads((folder / "run.json").read_text()) | {"status": "finished"}
    (folder / "run.json").write_text(json.dumps(about))
    report.write_run(folder)
    page.wait("document.querySelector('.status').innerText === 'finished' && document.readyState === 'complete'")
    time.sleep(0.2)
    loads = page.loads
    time.sleep(1.2)
    assert page.loads == loads
    quiet(page, path)
    page.close()


def test_a_run_that_was_killed_long_ago_is_said_to_be(browser, tmp_path):
    folder = make_run(tmp_path, status="running")
    os.utime(folder / "metrics.jsonl", (1.7e9, 1.7e9))
    page = browser.open(report.write_run(folder))
    page.wait("document.getElementById('age').innerText")
    assert "Nothing was written since: it may have been killed." in page.js("document.getElementById('age').innerText")
    page.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(browser, tmp_path, width):
    figures = {"a.png": png(2000, 300), "long.txt": b"x" * 500, "list.csv": b"a,b\n" + b"1," + b"2" * 300}
    folder = make_run(tmp_path, "a_recipe_with_a_rather_long_name", "r" * 120, figures=figures, documented="d" * 200)
    for path in (report.write_run(folder), report.write_index(tmp_path)):
        page = browser.open(path, width=width)
        assert page.js("document.documentElement.scrollWidth") <= width
        page.close()


@pytest.mark.parametrize("width", [400, 1000, 1300, 2000])
def test_each_run_of_the_index_is_seen_whole(browser, tmp_path, width):
    for number in range(4):
        about = {"seconds": 20_000.0, "device": "NVIDIA H200 x 8 processes", "world_size": 8} if number % 2 else {}
        about |= {"status": "cut", "ended": "stopped at --max-steps 100 of 30,000"} if number == 2 else {}
        name = f"{number}-lr-0.001-batch-256-warmup-cosine-seed"
        report.write_run(make_run(tmp_path, "simple_cnn_of_a_long_name", name, **about))
    page = browser.open(report.write_index(tmp_path), width=width)
    cells = "[...document.querySelectorAll('.runs tbody td, .runs thead button')].filter(cell => cell.innerText)"
    assert page.js(f"Math.max(...{cells}.map(cell => cell.getBoundingClientRect().right))") <= width
    assert page.js("[...document.querySelectorAll('.runs .date')].every(cell => cell.innerText.length === 16)")
    height = page.js(
        "Math.max(...[...document.querySelectorAll('.runs a')].map(a => a.getBoundingClientRect().height))"
    )
    assert 0 < height < 3 * 21, "a run's name takes more than two lines"
    page.close()


def test_a_list_stands_beside_its_picture_and_no_half_of_a_row_is_empty(browser, tmp_path):
    texts = {"prediction_list.csv": b"label,given\n" + b"1,7\n" * 40, "short.txt": b"x", "long.txt": b"x " * 60}
    images = {"confusion_matrix.png": png(600, 560), "grid.png": png(900, 300), "large.png": png(1200, 1100)}
    folder = make_run(tmp_path, figures=images | texts | {"training.png": png(1300, 700)})
    page = browser.open(report.write_run(folder), width=1300)
    boxes = page.js(
        "Object.fromEntries([...document.querySelectorAll('figure')].map(f => [f.querySelector('figcaption').innerText"
        ".split(':')[0], (({left, right, top}) => ({left, right, top}))(f.getBoundingClientRect())]))"
    )
    middle = (boxes["large"]["left"] + boxes["large"]["right"]) / 2
    halves = {name: box for name, box in boxes.items() if box["right"] < middle or box["left"] > middle}
    assert set(halves) == {"confusion matrix", "prediction list", "short", "training"}
    assert boxes["prediction list"]["top"] == boxes["confusion matrix"]["top"]
    assert sorted(list(box["top"] for box in halves.values()).count(box["top"]) for box in halves.values()) == [2] * 4
    page.close()
    (folder / "figures/short.txt").unlink()
    page = browser.open(report.write_run(folder), width=1300)
    assert page.js("[...document.querySelectorAll('figure')].at(-1).className") == "full"
    page.close()


def test_in_dark_mode_plots_are_dark_and_photographs_keep_their_colours(browser, tmp_path):
    folder = make_run(tmp_path, figures={"other.png": png(300, 300)})
    red = torch.zeros(4, 3, 8, 8)
    red[:, 0] = 1.0
    matrix = figures.confusion_matrix(torch.eye(3, dtype=torch.int64), ["a", "b", "c"], "matrix")
    drawn = {"matrix": matrix, "digits": figures.image_grid(torch.zeros(4, 8, 8), [""] * 4, "")}
    figures.save(drawn | {"photographs": figures.image_grid(red, [""] * 4, "")}, folder / "figures")
    path = report.write_run(folder)

    def colours(dark):
        page = browser.open(path, dark=dark)
        page.screenshot(tmp_path / "page.png")
        box = "(e => {const b = e.getBoundingClientRect(); return [b.x + scrollX, b.y + scrollY, b.width, b.height]})"
        found = {}
        with Image.open(tmp_path / "page.png") as shot:
            for name in ("matrix", "digits", "photographs", "other"):
                x, y, width, height = page.js(f"{box}(document.querySelector('img[alt={name}]'))")
                image = shot.convert("RGB").crop((x, y, x + width, y + height))
                found[name] = image.getpixel((width // 2, 12)), {colour for _, colour in image.getcolors(10**6)}
        page.close()
        return found

    light, dark = colours(False), colours(True)
    assert all(min(light[name][0]) > 240 for name in ("matrix", "digits", "photographs"))
    assert max(dark["matrix"][0]) < 40 and max(dark["digits"][0]) < 40
    assert min(dark["photographs"][0]) > 240
    for shown in (light, dark):
        assert (255, 0, 0) in shown["photographs"][1]
        assert (0x99, 0x99, 0x99) in shown["other"][1]  # nothing is known of it


def processes(*busy):
    """Rows of run.json's "processes": milliseconds of work, the rest waiting."""
    longest = max(busy)
    return [
        {
            "host": f"node{rank}",
            "seconds_per_step": {"data": 0.001, "passes": (b - 2) / 1000, "sum": (longest - b) / 1000, "update": 0.001},
            "slowest_in": 9 * (b == longest),
        }
        for rank, b in enumerate(busy)
    ]


def test_a_straggler_is_named_with_its_host_and_an_even_run_names_nobody(tmp_path):
    page = read(report.write_run(make_run(tmp_path, processes=processes(10, 10, 15)))).text
    assert "process 2, whose own work takes 1.50 times the median's" in page and "node2" in page
    even = read(report.write_run(make_run(tmp_path, "net", "even", processes=processes(10, 10, 10.4)))).text
    assert "all take about as long" in even
    alone = read(report.write_run(make_run(tmp_path, "net", "alone", processes=processes(10)))).text
    assert "Time per step" in alone and "data's share" in alone and "waits for" not in alone
    for number, odd in enumerate(([], [{}], {"a": 1}, [{"seconds_per_step": {"data": "x"}}], None)):
        page = report.write_run(make_run(tmp_path, "net", f"odd{number}", processes=odd))
        assert "Time per step" not in read(page).text

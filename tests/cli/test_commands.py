"""launch/checkpoint.py and launch/verify.py, as a user runs them."""

import contextlib
import io
import json
import random
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from launching import command
from safetensors.torch import load_file
from toys import Line

import nndist
from nndist import experiments
from nndist.cli.commands import verify_command
from nndist.experiments.verify import LOADERS, Row, Verification, table
from nndist.runs import checkpoint, checkpoint_writer

CHECKPOINT = ROOT / "launch/checkpoint.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with three checkpoints and a moving average."""
    recipe = Line(ema_decay=0.9)
    settings = {"progress": False, "figures": False, "save_every": "7 steps", "keep": 3, "run": "it"}
    return nndist.train(recipe, runs_dir=tmp_path_factory.mktemp("runs"), threads=1, **settings)


def test_show_lists_every_checkpoint(run):
    done = command(CHECKPOINT, "show", run.folder)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["7", "14", "21"]
    assert f"test/loss {run.scores['test/loss']:.4g}" in lines[-1] and "MiB" in lines[-1]


def test_convert_gives_plain_weights(run, tmp_path):
    done = command(CHECKPOINT, "convert", run.folder, tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out.safetensors")
    state = run.networks["model"].state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in found)
    command(CHECKPOINT, "convert", run.folder, tmp_path / "ema.safetensors", "--ema", "--step", "14")
    average = load_file(tmp_path / "ema.safetensors")
    assert average.keys() == state.keys() and not torch.equal(average["0.weight"], state["0.weight"])


def test_verify_names_what_is_damaged_and_exits_with_1(run, tmp_path):
    assert command(CHECKPOINT, "verify", run.folder).returncode == 0
    file = run.folder / "checkpoints/step-00000014/optimizer.safetensors"
    data = file.read_bytes()
    try:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        done = command(CHECKPOINT, "verify", run.folder)
    finally:
        file.write_bytes(data)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if "DAMAGED" in line]
    assert "step-00000014/optimizer.safetensors" in line


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["show", "nowhere"], "nowhere: holds no checkpoints"),
        (["show", "RUN", "--step", "8"], "--step 8"),
        (["convert", "RUN"], "say which file to write"),
        (["convert", "RUN", "no/such/folder/out.safetensors"], "can't be written"),
    ],
)
def test_what_cannot_be_done_is_one_line(run, arguments, expected):
    done = command(CHECKPOINT, *[run.folder if argument == "RUN" else argument for argument in arguments])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1 and expected in done.stderr


def verified(scratch, *, left_out=()):
    """(verification, exit code, what was printed) of the command, whose scratch folder is kept for a closer look.

    left_out: calls of `Verification`, each (method, *arguments), that are not made.
    """
    made: list[Verification] = []

    class Kept(Verification):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

        def _kept(self, name, *given):
            if (name, *given) not in left_out:
                getattr(super(), name)(*given)

        def parity(self, *given):
            self._kept("parity", *given)

        def elastic(self):
            self._kept("elastic")

    remove = shutil.rmtree

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as left:
        patch.setattr(experiments.verify, "Verification", Kept)
        patch.setattr(tempfile, "mkdtemp", lambda prefix: str(scratch))
        patch.setattr(shutil, "rmtree", lambda folder, **how: folder == scratch or remove(folder, **how))
        verify_command([str(ROOT / "recipes/two_clusters.py"), "--kills", "1", "--steps", "30"])
    return made[0], left.value.code, printed.getvalue()


@pytest.mark.parametrize(
    "left_out",
    [
        pytest.param([], marks=pytest.mark.nightly),
        pytest.param([("parity", 2), ("elastic",)], marks=pytest.mark.long),
    ],
    ids=lambda left_out: "most" if left_out else "all",
)
def test_verify_proves_a_recipe(tmp_path, left_out):
    verification, code, printed = verified(tmp_path, left_out=left_out)
    rows_made = 9 - len(left_out)
    assert code == 0 and f"{rows_made} of {rows_made} promises kept" in printed and "BROKEN" not in printed, printed
    lines = printed.splitlines()
    rows = lines[next(n for n, line in enumerate(lines) if line.startswith("kept")) :]
    assert max(map(len, lines)) <= 80 and len(rows) <= 24, "a screen of the least terminal"
    words = " ".join(" ".join(rows).split())
    assert words.count("bit-identical") == 6 and "by kill -9 at step" in words
    assert ("4, 2, 3 processes, no dropout" in words) == (not left_out)
    assert re.search(r"object store, file://: bit-identical: .* by SIGTERM at step \d+ and kill -9 at step \d+;", words)
    assert "  1 of 20  uninterrupted1: 1 process to the end" in printed
    assert left_out or "  19 of 20  audit" in printed
    assert "every 5th step computed twice, on another of 3 processes" in words
    weights_in_the_store_that_are_not_the_runs_are_noticed(verification)


def test_no_training_of_verify_is_sent_to_wandb_or_makes_a_report(tmp_path, monkeypatch):
    words = []
    monkeypatch.setattr(experiments.verify.subprocess, "Popen", lambda arguments, **_: words.extend(arguments))
    made = Verification(Path("it.py"), [], 20, print, tmp_path, random.Random(0))
    made._launch("one", 1)
    assert words[words.index("--wandb") + 1] == "off" and "--no-report" in words


def weights_in_the_store_that_are_not_the_runs_are_noticed(verification):
    there = verification.scratch / "store/two_clusters/stored/checkpoints"
    row = next(row for row in verification.rows if row.promise.startswith("object store"))
    assert row.injected.endswith("; folder deleted twice"), row
    assert not verification._row_of_the_store("resumed from step 8").kept, "from what was left here"
    saved = checkpoint.read(there / "step-00000030")
    saved.tensors["model.safetensors"] = {name: 2 * value for name, value in saved.tensors["model.safetensors"].items()}
    shutil.rmtree(there / "step-00000030")
    checkpoint_writer.publish(there, saved)
    row = verification._row_of_the_store("step 8 was fetched from file://")
    assert not row.kept and "model.safetensors: " in row.outcome and "differs" in row.outcome, row


def test_the_table_of_verify_is_one_screen():
    """Of 80 columns and 24 lines, the last of which counts the promises, with the texts that a run gives."""
    same = "bit-identical: 13 tensors, 44 records"
    near = "weights differ by 8.4e-08 of the largest"
    taken = "the examples of all 20 steps are the same, in the same order"
    steps = "14, 28, 28, 34"
    texts = [
        ("exact resume, 1 process", f"kill -9 at steps {steps}, in the middle of a save", same),
        ("exact resume, 3 processes", "kill -9 at steps 24 of process 0, 39 of process 2", same),
        ("damaged checkpoint", "one flipped bit of 12,345,678 bytes", f"noticed, {same}"),
        ("world size, 1 and 2", f"20 steps without dropout, {LOADERS}", f"{near}; {taken}"),
        ("world size, 1 and 3", f"20 steps without dropout, {LOADERS}", f"{near}; {taken}"),
        (
            "elastic",
            "kill -9 at steps 15, 16; 4, 2, 3 processes, no dropout",
            f"{near}, the 20 recorded losses by 3.5e-08; {taken}",
        ),
        ("audit", "stretches trained again", "bit-identical: steps 32 to 36, 36 to 40; every hash agrees"),
        ("recheck", "every 5th step computed twice, on another of 3 processes", same),
        (
            "object store, file://",
            "SIGTERM at step 10 and kill -9 at step 31; folder deleted twice",
            same,
        ),
    ]
    lines = list(table([Row(promise, done, outcome, True) for promise, done, outcome in texts]))
    assert len(lines) <= 23 and max(map(len, lines)) <= 80, "\n".join(lines)
    (row, by, why) = table([Row("audit", "stretches trained again", "differs", False, "the time")])
    assert (row, by.strip(), why.strip()) == (
        "BROKEN  audit: differs",
        "by stretches trained again",
        "likely cause: the time",
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "module, noise, cause",
    [
        ("", "time.time() % 1", "two uninterrupted runs differ too"),
        ("COUNTER = iter(range(10**6))", "next(COUNTER) % 5", "can't be saved without pickle"),
    ],
)
def test_verify_says_when_a_promise_is_broken_and_why(tmp_path, monkeypatch, capsys, module, noise, cause):
    """Losses that depend on the time or an iterator can't be resumed exactly; of all promises this one."""
    text = (ROOT / "tests/toys.py").read_text()
    text = text.replace("import torch\n", f"import time\nimport torch\n{module}\n", 1)
    text = text.replace("        x, y = batch\n", f"        x, y = batch\n        y = y + {noise}\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clock.py").write_text(text)
    exact_resume = Verification.exact_resume
    for name in ("damaged_checkpoint", "parity", "elastic", "audited", "rechecked", "into_a_store", "from_the_store"):
        monkeypatch.setattr(Verification, name, lambda *arguments: None)
    monkeypatch.setattr(
        Verification, "exact_resume", lambda self, size, kills: size > 1 or exact_resume(self, 1, kills)
    )
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    with pytest.raises(SystemExit) as stopped:
        verify_command([str(tmp_path / "clock.py"), "--kills", "1", "--epochs", "9", "--json"])
    assert stopped.value.code == 1
    printed = json.loads(capsys.readouterr().out)
    (row,) = printed["promises"]
    assert not printed["kept"] and row["promise"].startswith("exact resume") and "differs" in row["outcome"]
    assert cause in row["cause"]


def test_verify_refuses_what_is_no_recipe(tmp_path):
    done = command(ROOT / "launch/verify.py", "nothing.py", cwd=tmp_path)
    assert done.returncode == 2 and "nothing.py: no such file" in done.stderr
    assert json.dumps(done.stderr).count("error:") == 1

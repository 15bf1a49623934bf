"""A run with a million records: resumed, loaded, shown and sent in bounded memory.

Memory is asserted and time is not; the whole takes about 20 s.
"""

import contextlib
import gc
import json

import pytest
from launching import ROOT

import nndist
from nndist import machine, report
from nndist.runs import checkpoint
from nndist.runs.records import FILE, link
from nndist.runs.wandb import records as records_to_send
from nndist.trained.loaded_run import load_run

RECIPE = ROOT / "tests/workers/keeping.py"
COUNT = 1_000_000
MIB = 1 << 20


@contextlib.contextmanager
def at_most(num_bytes: int):
    """Fails if more memory than this is needed at any time."""
    gc.collect()
    machine.give_back_memory()
    machine.reset_peak_memory()
    before = machine.used_memory()
    yield
    used = machine.peak_memory() - before
    assert used < num_bytes, f"{used / MIB:,.0f} MiB"


def write_records(path) -> str:
    """A million records, faster than a training would write them; returns the chain after them."""
    chain = ""
    with path.open("wb") as file:
        for number in range(1, COUNT + 1):
            text = b'{"step": %d, "epoch": %.4f, "train/loss": %.6f, "lr": 0.05' % (number, number / 9, 1 / number)
            chain = link(chain, text + b"}")
            file.write(b'%b, "chain": "%b"}\n' % (text, chain.encode()))
    return chain


def sign_anew(path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    if path.name == checkpoint.MANIFEST:
        value["sha256"] = checkpoint.own_hash(value)
    path.write_text(json.dumps(value))


class Ended:
    """A training that has ended."""

    def wait(self, seconds):
        return True


@pytest.mark.long
def test_a_million_records_are_resumed_loaded_shown_and_sent(tmp_path):
    flags = {"runs_dir": tmp_path, "run": "it", "progress": False, "figures": False, "report": False, "threads": 1}
    place = nndist.train(RECIPE, **flags, max_steps=12).folder
    chain = write_records(place / FILE)
    size = (place / FILE).stat().st_size
    (newest,) = (place / "checkpoints").glob("*-00000012")
    sign_anew(newest / "manifest.json", lambda it: it["state"].update(metrics_bytes=size, metrics_chain=chain))
    sign_anew(place / "run.json", lambda it: it.update(metrics_chain=chain))

    with at_most(60 * MIB):
        result = nndist.train(RECIPE, **flags)
    assert result.steps == 21 and (place / FILE).stat().st_size > size
    with at_most(60 * MIB):
        sent = sum(1 for _ in records_to_send(place / FILE, Ended()))
    with at_most(300 * MIB):  # of 1.1 GB as dicts
        run = load_run(place)
        steps, losses = run.history.series("train/loss")
    assert sent > COUNT and len(steps) > COUNT and losses[:2] == [1.0, 0.5] and not run.notes
    del run, steps, losses
    with at_most(400 * MIB):
        page = report.write_run(place)
    assert page.stat().st_size < 2_000_000

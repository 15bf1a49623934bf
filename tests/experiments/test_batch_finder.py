"""--find-batch: what is measured, where it ends, and that it leaves nothing behind."""

import re
import time

import pytest
from conftest import ROOT
from launching import Processes, accelerate, command, succeeded

import nndist
from nndist.config import RunConfig
from nndist.experiments.batch_finder import Speed, conclusion, find_batch, obstacle
from nndist.flags.parse import parse

TRAIN = ROOT / "launch/train.py"
HUNGRY = ROOT / "tests/workers/hungry.py"


def rows(text):
    """Batch size, ms per step, examples per second and MiB of each row of the table."""
    found = re.findall(r"^ +([\d,]+) +([\d.e+-]+) +([\d,]+) +([\d,]+) MiB$", text, re.MULTILINE)
    return [tuple(float(cell.replace(",", "")) for cell in row) for row in found]


def quick(monkeypatch):
    monkeypatch.setattr("nndist.experiments.batch_finder.LEAST_SECONDS", 0.02)


def test_the_table_is_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch)
    recipe = nndist.recipe.loading.load_recipe(HUNGRY)()
    speeds = find_batch(recipe, RunConfig(find_batch=True, threads=1, progress=False))
    said = capsys.readouterr().out
    assert [speed.batch_size for speed in speeds] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert [row[0] for row in rows(said)] == [speed.batch_size for speed in speeds]
    for (size, milliseconds, rate, memory), speed in zip(rows(said), speeds, strict=True):
        assert milliseconds == pytest.approx(1e3 * speed.seconds_per_step, rel=1e-3)
        assert rate == pytest.approx(size / speed.seconds_per_step, abs=0.5)
        assert 100 < memory < 20_000
    assert speeds[-1].examples_per_second > 10 * speeds[0].examples_per_second
    assert "throughput, not learning" in said and "ended    the training set has 200 examples" in said
    assert max(len(line) for line in said.splitlines() if line[:6] != "recipe") <= 80
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_batch_norm_begins_with_two_examples(monkeypatch):
    quick(monkeypatch)
    recipe = nndist.recipe.loading.load_recipe(HUNGRY)(norm=True)
    speeds = find_batch(recipe, RunConfig(find_batch=True, threads=1, progress=False))
    assert [speed.batch_size for speed in speeds] == [2, 4, 8, 16, 32, 64, 128]


def test_a_step_takes_as_long_as_it_takes(monkeypatch):
    quick(monkeypatch)
    kind = nndist.recipe.loading.load_recipe(HUNGRY)

    def slowly(self, networks, batch):
        time.sleep(0.02)
        return (networks["model"](batch[0]) - batch[1]).square().squeeze(1)

    monkeypatch.setattr(kind, "loss", slowly)
    monkeypatch.setattr("nndist.experiments.batch_finder.MOST_SECONDS", 0.5)  # for two or three sizes
    speeds = find_batch(kind(), RunConfig(find_batch=True, threads=1, progress=False))
    assert 1 <= len(speeds) < 8 and all(0.02 < speed.seconds_per_step < 0.2 for speed in speeds)


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_ends_at_the_first_size_without_memory(tmp_path, world_size):
    """The last process fits at most 20 examples: of a batch of 32, two processes have 16 each."""
    flags = ["--find-batch", "--threads", 1, "--no-progress", "--runs-dir", tmp_path / "runs"]
    env = {"HUNGRY": f"{world_size - 1} 20 1"}
    processes = Processes(world_size, [HUNGRY, *flags], folder=tmp_path, env=env)
    assert processes.wait() == [0] * world_size, processes.said()
    said = processes.said()
    assert [row[0] for row in rows(said)] == ([1, 2, 4, 8, 16] if world_size == 1 else [2, 4, 8, 16, 32])
    assert f"ended    batch {32 * world_size} runs out of memory\n" in said, said
    assert said.count("fastest  ") == 1 and not (tmp_path / "runs").exists()


def test_it_ends_before_the_system_would_end_it(monkeypatch):
    class Alone:
        def max(self, values):
            return values

    found = [Speed(1, 0.1, 100), Speed(2, 0.1, 200)]
    monkeypatch.setattr("nndist.experiments.batch_finder.room", lambda runtime: 399)
    assert "batch 4 would take" in obstacle(found, Alone(), float("inf"))
    monkeypatch.setattr("nndist.experiments.batch_finder.room", lambda runtime: 400)
    assert obstacle(found, Alone(), float("inf")) == ""
    assert "are over" in obstacle(found, Alone(), 0.0)
    assert "more than 2 s" in obstacle([Speed(1, 2.1, 100)], Alone(), float("inf"))


def test_the_smallest_size_that_is_nearly_the_fastest_is_named():
    found = [Speed(16, 0.02, 1), Speed(32, 0.0205, 1), Speed(64, 0.04, 1)]
    assert "1,600 examples/s; --batch-size 32 comes within 5%" in conclusion(found, "it ended")[1]
    assert conclusion([], "it ended") == ["ended    it ended"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--find-lr"],
        ["--check"],
        ["--run-name", "x"],
        ["--max-steps", 5],
        ["--resume", "never"],
        ["--wandb-artifact"],
    ],
)
def test_what_does_not_go_together_is_one_line(flags):
    with pytest.raises(nndist.UserError, match=f"--find-batch and {str(flags[0]).removesuffix('-name')}: "):
        parse([str(HUNGRY), "--find-batch", *map(str, flags)])[1].validate()


@pytest.mark.nightly
def test_a_shipped_recipe_with_the_launcher(tmp_path):
    arguments = [TRAIN, ROOT / "recipes/sum_mlp.py", "--find-batch", "--threads", "1"]
    done = succeeded(accelerate(2, *arguments, cwd=tmp_path))
    assert len(rows(done.stdout)) >= 5 and not list(tmp_path.iterdir())
    done = command(TRAIN, ROOT / "recipes/sum_mlp.py", "--find-batch", "--check", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1

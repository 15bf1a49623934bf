"""launch/reproduce.py as a user runs it, and the table of recipes/README.md, which holds only what was recorded."""

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest
from conftest import RECIPES, ROOT
from launching import command, succeeded

from nndist.cli.experiment_commands import reproduce_command, reproduce_recipes
from nndist.cli.recipe_list import entry
from nndist.errors import UserError
from nndist.experiments.reproduction import (
    BEGIN,
    END,
    RESULTS,
    Result,
    read_results,
    read_usage,
    table,
    value_text,
    write_table,
)

REPRODUCE = ROOT / "launch/reproduce.py"


def last_scores(run):
    """The last value of every score in a run's records."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name: value for record in records for name, value in record.items()}


def test_the_pages_table_is_what_was_recorded():
    """`python launch/reproduce.py --write` makes both."""
    results = read_results(ROOT / RESULTS)
    assert f"{BEGIN}\n{table(results.values())}\n{END}" in (ROOT / "recipes/README.md").read_text()
    assert sorted(results) == sorted(path.stem for path in RECIPES) and not any(r.quick for r in results.values())
    for result in results.values():
        assert result.seconds and result.device and result.dates and (result.scores or result.texts)
        assert all(len(values) == len(result.seeds) for values in result.scores.values())
        assert "MNIST sample" not in result.data, "a sample's figures are not MNIST's"


@pytest.mark.parametrize(
    "recipe, score, least, most",
    [
        ("char_bert", "test/accuracy", 0.5, 0.7),  # the most frequent between the same neighbours: 0.39
        ("char_gpt", "test/loss", 0.0, 1.9),
        ("char_rnn", "test/loss", 0.0, 1.6),
        ("date_transformer", "test/exact_match", 0.98, 1.0),
        ("digits_detector", "test/ap", 0.5, 1.0),  # connected pixels: 0.226
        ("digits_embedding", "test/equal_error/network", 0.0, 0.35),  # pixels: 0.373
        ("digits_unet", "test/miou/network", 0.4, 1.0),  # thresholds: 0.082
        ("gan_augment", "test/accuracy/plain", 0.8, 0.86),
        ("gan_augment", "test/accuracy/shifted", 0.88, 1.0),
        ("mnist_autoencoder", "test/reconstruction_error", 0.0, 0.0168 / 2),  # PCA of the same width: 0.0168
        ("mnist_cnn", "test/accuracy", 0.98, 1.0),
        ("mnist_cnn_pool", "test/accuracy", 0.965, 1.0),
        ("mnist_mlp", "test/accuracy", 0.977, 1.0),
        ("mnist_mlp", "train_set/accuracy", 0.9999, 1.0),
        ("mnist_rnn", "test/accuracy", 0.98, 1.0),
        ("mnist_simple_cnn", "test/accuracy", 0.96, 1.0),
        ("mnist_vit", "test/accuracy", 0.98, 1.0),
        ("superres_gan", "test/psnr/network", 17.5, 99.0),  # bicubic interpolation: 14.7
        ("style_transfer", "test/accuracy/network", 0.65, 1.0),  # left as they are: 0.005
        ("style_transfer", "test/error/network", 0.0, 0.12),  # left as they are: 0.148
        ("sum_mlp", "test/loss", 0.0, 0.00005),  # the document's 0.0000
        ("text_classifier_mlp", "test/accuracy", 0.9, 1.0),  # a bag of words: 0.83
        ("two_clusters", "test/accuracy", 0.985, 1.0),
        ("weather_rnn", "test/error_celsius/network", 0.0, 2.2),  # persistence: 2.25
    ],
)
def test_what_was_recorded_is_what_the_recipes_claim(recipe, score, least, most):
    """Complete trainings on real data, too long for a test."""
    values = read_results(ROOT / RESULTS)[recipe].scores[score]
    assert values and all(least <= value <= most for value in values)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_figures_of_a_docstring_are_those_that_were_recorded(path):
    """The sentence after "Measured:", which launch/recipes.py prints, has each final score and the time, rounded."""
    result = read_results(ROOT / RESULTS)[path.stem]
    said = [number.replace(",", "") for number in re.findall(r"\d[\d,]*(?:\.\d+)?", entry(path).measured)]

    def is_said(value: float, digits: int) -> bool:
        return any(
            len(text.replace(".", "").lstrip("0")) >= digits and text == f"{value:.{len(text.partition('.')[2])}f}"
            for text in said
        )

    for name, values in result.scores.items():
        value = statistics.median(values)
        is_share = re.search("accuracy|exact_match", name)
        assert is_said(100 * value if is_share else value, 3 if is_share else 2), (name, value)
    for text in result.texts.values():
        assert all(is_said(float(figure), 1) for figure in re.findall(r"\d+\.\d+", text[0])), text
    seconds = statistics.median(result.seconds)
    assert is_said(seconds, 1) or is_said(seconds / 60, 1)


def test_two_seeds_of_two_recipes_and_nothing_twice(tmp_path):
    arguments = [REPRODUCE, "two_clusters", "optimizers", "--quick", "--seeds", "2", "--runs-dir", tmp_path]
    done = succeeded(command(*arguments, env={"COLUMNS": "80"}))
    assert done.stdout.count("trained  ") == 4
    scores = [last_scores(tmp_path / f"two_clusters/quick-seed{seed}")["test/accuracy"] for seed in (0, 1)]
    shown = f"test/accuracy {100 * statistics.median(scores):.2f} % ({100 * min(scores):.2f} % to "
    assert shown in done.stdout and "test/loss/adam" in done.stdout
    texts, rows = done.stdout.split("| recipe |")
    assert max(map(len, texts.splitlines())) <= 80 and "30 steps only" in texts
    assert [line.split("`")[1] for line in rows.splitlines() if line.startswith("| `")] == [
        "two_clusters",
        "optimizers",
    ]
    weights = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    again = succeeded(command(*arguments, env={"COLUMNS": "80"}))
    assert "trained  " not in again.stdout and again.stdout.split("| recipe |")[1] == rows
    assert weights and weights == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}


def test_what_is_cut_is_saved(tmp_path):
    command = [sys.executable, str(REPRODUCE), "sine_regression", "--runs-dir", str(tmp_path), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "sine_regression/documented-seed0"
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "the same command resumes them" in said
    about = json.loads((run / "run.json").read_text())
    assert about["status"] == "preempted" and 0 < about["step"] < about["total_steps"]


def test_the_figures_are_written_into_the_page_after_each_recipe(tmp_path, capsys):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    options = argparse.Namespace(
        seeds=1, jobs=1, threads=1, runs_dir=tmp_path / "runs", quick=False, write=True, audit=False
    )
    assert reproduce_recipes([ROOT / "recipes/two_clusters.py"], options, tmp_path) == 0
    recorded = read_results(tmp_path / RESULTS)
    (result,) = recorded.values()
    expected = last_scores(tmp_path / "runs/two_clusters/documented-seed0")
    assert result.scores == {"test/accuracy": [expected["test/accuracy"]]}
    assert result.cpu_seconds[0] > result.seconds[0] > 0 and result.documented == "" and result.epochs == 100
    text = (tmp_path / "recipes/README.md").read_text()
    assert (
        text == f"before\n{BEGIN}\n{table(recorded.values())}\n{END}\nafter\n"
        and "| `two_clusters` | test/accuracy " in text
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda one: [],
        lambda one: {**one, "seconds": ["long"]},
        lambda one: {**one, "scores": {"test/loss": 0.5}},
        lambda one: {name: value for name, value in one.items() if name != "dates"},
    ],
)
def test_a_damaged_record_of_what_was_reproduced_is_one_line(tmp_path, change):
    known = json.loads((ROOT / RESULTS).read_text())
    path = tmp_path / "results.json"
    path.write_text(json.dumps({**known, "two_clusters": change(known["two_clusters"])}))
    with pytest.raises(UserError, match=r"results\.json: not a record of reproduced recipes \(.*two_clusters"):
        read_results(path)
    path.write_text(json.dumps({"two_clusters": {**known["two_clusters"], "added_later": 1}}))
    assert read_results(path) == {"two_clusters": read_results(ROOT / RESULTS)["two_clusters"]}


def test_a_damaged_record_of_the_time_is_one_line(tmp_path):
    (tmp_path / "logs").mkdir()
    member = argparse.Namespace(folder=tmp_path / "it")
    assert read_usage(member) == {}
    (tmp_path / "logs/it.json").write_text('{"cpu_seconds": "many"}')
    with pytest.raises(UserError, match=r"it\.json: can't be read .*cpu_seconds is many where a number is expected"):
        read_usage(member)


def test_a_page_without_a_place_for_the_table(tmp_path):
    (tmp_path / "README.md").write_text("nothing\n")
    with pytest.raises(Exception, match="has no lines"):
        write_table(tmp_path / "README.md", "table")
    assert (tmp_path / "README.md").read_text() == "nothing\n"


@pytest.mark.parametrize(
    "name, values, text",
    [
        ("test/accuracy", [0.98765], "test/accuracy 98.77 %"),
        ("test/accuracy", [0.9, 0.8, 0.95], "test/accuracy 90.00 % (80.00 % to 95.00 %)"),
        ("test/loss", [0.0123456], "test/loss 0.012346"),
        ("train_set/accuracy", [0.999967], "train_set/accuracy 99.9967 %"),
        ("test/loss", [1.0, None], "test/loss not finite for 1 of 2 seeds"),
    ],
)
def test_value_text(name, values, text):
    assert value_text(name, values) == text


@pytest.mark.parametrize("others, text", [(0.1, "1 min 30 s"), (0.8, "1 min 30 s (busy machine; CPU time 55.0 s)")])
def test_the_time_says_whether_the_machine_had_other_work(others, text):
    known = {"device": "CPU x 1 process x 1 thread", "machine": "a CPU", "torch": "2", "dates": ["2026-01-02"]}
    result = Result("toy", "", "numbers", 1.0, {"loss": [1.0]}, {}, [0], [90.0], [55.0], [others], **known)
    assert result.time() == text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], r"nothing: not a recipe; name one of char_bert, .*, or a recipe's file"),
        (["sum_mlp", "--seeds", "0"], r"--seeds 0: must be at least 1"),
        (["sum_mlp", "--threads", "-1"], r"--threads -1: must be at least 1"),
        (["--quick", "--write"], r"--quick --write: recipes/README.md holds complete trainings only"),
        (["--lr", "1"], r"unrecognized arguments: --lr"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        reproduce_command(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and re.match(rf"error: {message}", said) and said.count("\n") == 1


@pytest.mark.long
def test_what_was_reproduced_is_audited(tmp_path):
    """A stretch of it is trained again; a run that was changed afterwards fails."""
    from nndist.runs import checkpoint, checkpoint_writer

    arguments = [REPRODUCE, "two_clusters", "--quick", "--audit", "--runs-dir", tmp_path]
    done = succeeded(command(*arguments))
    assert "audit    two_clusters: bit-identical: steps 0 to 30; every hash agrees" in done.stdout
    assert "Audited, a random stretch trained again to the same bits: `two_clusters`." in done.stdout
    root = tmp_path / "two_clusters/quick-seed0/checkpoints"
    saved = checkpoint.read(root / "step-00000030")
    next(iter(saved.tensors["model.safetensors"].values())).view(-1)[0] += 1e-6
    checkpoint_writer.publish(root, saved)
    done = command(*arguments)
    assert done.returncode == 1 and "its audit fails: steps 0 to 30: differs: model.safetensors" in done.stdout

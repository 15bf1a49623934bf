"""A validation set chooses the best model and the end; the test set is looked at once, with the weights so chosen."""

import contextlib
import json
import shutil
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from conftest import RECIPES, ROOT
from launching import Processes
from making import with_few_examples
from toys import Line

import nndist
from nndist.config import RunConfig
from nndist.data import Data, Resident, Streamed
from nndist.data.feed import Feed
from nndist.data.parts import Part, hold_out
from nndist.errors import UserError
from nndist.recipe import load_recipe
from nndist.runs import checkpoint
from nndist.runs.records import without_times
from nndist.trained.loaded_run import load_run

KEEPING = ROOT / "tests/workers/keeping.py"
QUIET = {"progress": False, "figures": False, "report": False, "threads": 1, "wandb": "off"}
# the best is the worst, so that it is the first of the evaluations after 5, 10 and 15 steps
HELD_OUT = {**QUIET, "hold_out": 0.25, "best": "val/loss", "best_is": "highest", "run": "it"}

FLAGS = ["--hold-out", 0.25, "--best", "val/loss", "--best-is", "highest", "--run", "it", "--no-report"]
FLAGS += ["--no-progress", "--no-figures", "--wandb", "off", "--threads", 1]


def numbered(count=100, **more):
    return Data(train=Resident(torch.arange(count)), test=Resident(torch.arange(5)), **more)


def numbers_of(examples):
    (batch,) = examples.batches([torch.arange(len(examples))])
    return (batch[0] if isinstance(batch, tuple) else batch).tolist()


# Which examples are held out.


def test_the_held_out_examples_and_the_rest_are_the_training_set():
    data = hold_out(numbered(), 0.1)
    kept, rest = numbers_of(data.val), numbers_of(data.train)
    assert len(kept) == 10 and sorted(kept + rest) == list(range(100))
    assert kept == sorted(kept) and kept != list(range(90, 100)) and kept != list(range(10))
    assert numbers_of(hold_out(numbered(), 0.1).val) == kept
    assert set(kept) < set(numbers_of(hold_out(numbered(), 0.3).val))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_loss_that_is_not_finite_names_the_example_by_its_number_in_the_whole_set(tmp_path, streamed):
    """Here the only example left whose number is 57, wherever it stands among those that are trained on."""

    class Numbers(Line):
        def data(self, config):
            x = torch.ones(100, 4)
            x[57] = torch.nan
            y = x.sum(1, keepdim=True)
            train = Streamed(list(zip(x, y, strict=True)), 0) if streamed else Resident(x, y)
            return Data(train=train, test=Resident(x[:8], y[:8]))

    held_out = set(numbers_of(hold_out(numbered(), 0.25).val))
    assert 57 not in held_out and min(held_out) < 57, "its place among the rest is another number"
    with pytest.raises(nndist.TrainingError, match=r"training example 57;"):
        nndist.train(Numbers(epochs=1), **QUIET, hold_out=0.25, runs_dir=tmp_path)


def test_of_examples_in_time_the_last_are_held_out():
    data = hold_out(numbered(sequential=True), 0.1)
    assert numbers_of(data.val) == list(range(90, 100)) and numbers_of(data.train) == list(range(90))


def test_a_further_set_that_is_the_training_set_is_the_rest():
    data = numbered()
    data = hold_out(replace(data, more={"train_set": data.train, "other": data.test}), 0.1)
    assert data.more["train_set"] is data.train and numbers_of(data.more["other"]) == list(range(5))
    assert list(data.sets_in_training()) == ["val", "train_set", "other"] and list(data.sets_at_end()) == ["test"]


def test_nested_tensors_stay_nested():
    train = Resident({"x": torch.arange(100), "weights": {"all": torch.ones(100)}})
    data = hold_out(Data(train=train, test=train), 0.1)
    (batch,) = data.val.batches([torch.arange(2)])
    assert batch["x"].shape == (2,) and batch["weights"]["all"].shape == (2,)


def test_what_is_evaluated_can_be_made_of_what_is_held_out():
    data = hold_out(numbered(for_evaluation=lambda some: Resident(-some.tensors[0])), 0.1)
    assert max(numbers_of(data.val)) <= 0 <= min(numbers_of(data.train))


@pytest.mark.parametrize(
    ("data", "fraction", "said"),
    [
        (numbered(), 0.001, "leaves 0 of 100 training examples"),
        (numbered(), 0.999, "leaves 100 of 100 training examples"),
        (numbered(val=Resident(torch.arange(3))), 0.1, "its own validation set"),
        (numbered(more={"val": Resident(torch.arange(3))}), 0.1, "its own validation set"),
    ],
)
def test_what_cannot_be_held_out_is_said(data, fraction, said):
    with pytest.raises(UserError, match=said):
        hold_out(data, fraction)


def test_two_validation_sets_are_refused():
    with pytest.raises(ValueError, match="can't be called 'val'"):
        numbered(val=Resident(torch.arange(3)), more={"val": Resident(torch.arange(3))})


class Squares(torch.utils.data.Dataset):
    fingerprint = "squares"

    def __len__(self):
        return 40

    def __getitem__(self, number):
        return torch.tensor([number]), torch.rand(1)


def test_a_streamed_set_is_read_in_parts():
    streamed = Streamed(Squares(), num_workers=0)
    data = hold_out(Data(train=streamed, test=streamed), 0.25).to(torch.device("cpu"))
    assert isinstance(data.train, Part) and len(data.train) == 30 and len(data.val) == 10
    seen = {
        number.item(): drawn.item()
        for batch in Feed(data.train, batch_size=7, seed=0).epoch(1)
        for number, drawn in zip(*batch.micro_batches[0].raw, strict=True)
    }
    whole = {
        number.item(): drawn.item()
        for batch in Feed(streamed, batch_size=7, seed=0).epoch(1)
        for number, drawn in zip(*batch.micro_batches[0].raw, strict=True)
    }
    kept = {number for (number,) in numbers_of(data.val)}
    assert seen == {number: drawn for number, drawn in whole.items() if number not in kept}
    assert [n for n in whole if n in seen] == list(seen), "the set's own order"
    assert data.train.fingerprint() not in ("", "squares", data.val.fingerprint())


# What is trained with it.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return nndist.train(KEEPING, **HELD_OUT, runs_dir=tmp_path_factory.mktemp("runs"))


def records_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [without_times(line) for line in lines]


def test_every_evaluation_has_the_validation_set_and_the_last_record_the_test(trained):
    records = records_of(trained.folder)
    evaluated = [record for record in records if "val/loss" in record]
    assert [record["step"] for record in evaluated] == [5, 10, 15]
    assert not any(name.startswith("test/") for record in records[:-1] for name in record)
    assert {"test/loss", "test/distance"} < records[-1].keys() and "val/loss" not in records[-1]
    assert set(trained.scores) == {"val/loss", "val/distance", "test/loss", "test/distance"}


def test_the_best_weights_are_tested_and_the_last_ones_are_given_back(trained):
    about = json.loads((trained.folder / "run.json").read_text())
    assert trained.best["step"] < 15, "so that the best weights are others than the last"
    assert about["tested"] == trained.best["step"] == about["best"]["step"]
    run = load_run(trained.folder)
    evaluated = run.evaluate().sets
    assert list(evaluated) == ["val", "test"]
    for name in ("val", "test"):
        assert trained.best["scores"][f"{name}/loss"] == pytest.approx(evaluated[name].scores["loss"], rel=1e-6)
    assert trained.scores["test/loss"] == trained.best["scores"]["test/loss"]
    saved = checkpoint.read(trained.folder / "checkpoints/step-00000015").tensors["model.safetensors"]
    for name, tensor in trained.networks["model"].state_dict().items():
        assert torch.equal(tensor, saved[name]), name


def test_an_uninterrupted_run_takes_the_same_steps_as_one_whose_best_is_the_last(trained, tmp_path):
    other = nndist.train(KEEPING, **{**HELD_OUT, "best": None, "best_is": None}, runs_dir=tmp_path)
    ours, theirs = (records_of(folder)[:-1] for folder in (trained.folder, other.folder))
    assert ours == theirs
    about = json.loads((other.folder / "run.json").read_text())
    assert about["tested"] == 15 and about["best"] is None


@dataclass(kw_only=True)
class Interrupted(load_recipe(KEEPING)):
    """Fails once, after some steps, and keeps a number that its scores depend on."""

    fails_at: ClassVar[int | None] = None
    noticed = 0

    def after_step(self, networks, step):
        self.noticed = step
        if step == self.fails_at:
            raise UserError("now")

    def score(self, networks, batch):
        loss = self.loss(networks, batch)
        return {"loss": loss, "noticed": torch.full((len(loss),), float(self.noticed))}


@pytest.mark.parametrize("fails_at", [3, 10, 14])
def test_a_run_that_was_interrupted_reads_as_one_that_was_not(tmp_path, fails_at):
    settings = {**HELD_OUT, "save_every": "2 steps", "keep": 20}
    whole = nndist.train(Interrupted(), **settings, runs_dir=tmp_path / "whole")
    Interrupted.fails_at = fails_at
    with contextlib.suppress(UserError):
        nndist.train(Interrupted(), **settings, runs_dir=tmp_path / "cut")
    Interrupted.fails_at = None
    again = nndist.train(Interrupted(), **settings, runs_dir=tmp_path / "cut")
    assert records_of(again.folder) == records_of(whole.folder)
    assert again.scores == whole.scores and again.best == whole.best
    assert whole.scores["test/noticed"] == whole.best["step"] < 15, "the values that were saved with the best weights"
    assert again.networks["model"].training is whole.networks["model"].training


@dataclass(kw_only=True)
class Annealed(load_recipe(KEEPING)):
    """Its scores depend on values that change after the best step only."""

    def networks(self):
        self.level, self.levels, self.scale, self.large = 1.0, [1.0], torch.ones(()), torch.ones(200, 100)
        self.loss_of, self.other, self.spare = torch.nn.MSELoss(reduction="none"), torch.nn.Identity(), {"a": 1}
        return super().networks()

    def after_step(self, networks, step):
        if step > 10:
            self.level, self.spare = 0.0, {}
            self.levels.append(5.0)
            self.scale += 1
            self.loss_of, self.other = self.other, self.loss_of

    def score(self, networks, batch):
        seen = (
            self.level,
            len(self.levels),
            float(self.scale),
            len(self.spare),
            isinstance(self.other, torch.nn.Identity),
        )
        assert seen in ((1.0, 1, 1.0, 1, True), (0.0, self.levels.count(5.0) + 1, float(self.scale), 0, False)), seen
        loss = self.loss(networks, batch)
        return {"loss": loss, "level": torch.full((len(loss),), self.level)}


def test_values_that_changed_after_the_best_step_only_are_those_of_the_start_in_its_test(tmp_path, capsys):
    result = nndist.train(Annealed(), **HELD_OUT, runs_dir=tmp_path)
    assert result.best["step"] <= 10 and result.scores["test/level"] == 1.0
    out = capsys.readouterr().out
    assert "present value" not in out, out


def test_a_large_value_that_changed_after_the_best_step_only_is_named(tmp_path, capsys):
    class Larger(Annealed):
        def after_step(self, networks, step):
            if step > 10:
                self.large += 1

    nndist.train(Larger(), **HELD_OUT, runs_dir=tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "present value" in line]
    assert line == "note     recipe.large: changed after step 5, whose weights are tested with the present value"


def test_a_finished_run_that_is_started_again_is_tested_again_with_the_same_result(trained, tmp_path):
    place = tmp_path / "keeping/it"
    shutil.copytree(trained.folder, place)
    before = records_of(place)
    again = nndist.train(KEEPING, **HELD_OUT, runs_dir=tmp_path)
    assert records_of(place) == before and again.scores == trained.scores


def test_a_run_that_goes_on_has_not_seen_the_test_set(tmp_path):
    nndist.train(KEEPING, **HELD_OUT, max_steps=10, runs_dir=tmp_path)
    assert "test/loss" in records_of(tmp_path / "keeping/it")[-1]
    nndist.train(KEEPING, **HELD_OUT, runs_dir=tmp_path)
    tested = [record["step"] for record in records_of(tmp_path / "keeping/it") if "test/loss" in record]
    assert tested == [15]


@pytest.mark.parametrize("where", ["networks", "class", "hook"])
def test_the_best_value_so_far_under_the_name_of_best_is_one_line(tmp_path, where):
    class Kept(Line):
        """As tutorials write early stopping."""

        if where == "class":
            best = float("inf")

        def networks(self):
            if where == "networks":
                self.best = 0.0
            return super().networks()

        def after_step(self, networks, step):
            if where == "hook":
                self.best = 0

    with pytest.raises(
        UserError, match=r"best = (inf|0|0\.0): names a score, such as 'val/accuracy', or is None"
    ) as error:
        nndist.train(Kept(), **QUIET, run="it", runs_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_patience_follows_the_validation_set(tmp_path):
    result = nndist.train(KEEPING, **HELD_OUT, patience=1, epochs=20, runs_dir=tmp_path)
    steps, losses = result.history.series("val/loss")
    assert len(steps) == 2 and losses[-1] <= losses[-2] == max(losses)
    assert result.best["step"] == steps[-2] and result.history.series("test/loss")[0] == [steps[-1]]


@pytest.mark.parametrize("best", ["test/loss", "test/accuracy", "no/loss"])
def test_the_best_cannot_be_chosen_by_the_test_set(tmp_path, best):
    with pytest.raises(UserError, match="val/") as error:
        nndist.train(Line(), **{**HELD_OUT, "best": best}, runs_dir=tmp_path)
    assert ("scored only at the end" in str(error.value)) == best.startswith("test/")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_that_is_none_is_refused(tmp_path, share):
    with pytest.raises(UserError, match="--hold-out"):
        nndist.train(Line(), **{**HELD_OUT, "hold_out": share}, runs_dir=tmp_path)


def test_another_share_is_a_change_that_is_named(trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "keeping/it")
    with pytest.raises(UserError, match="the training examples of 'generated' have changed"):
        nndist.train(KEEPING, **{**HELD_OUT, "hold_out": 0.5}, runs_dir=tmp_path)


def test_figures_have_the_outputs_of_the_test_set(tmp_path):
    outputs = []

    @dataclass(kw_only=True)
    class Drawn(load_recipe(ROOT / "recipes/two_clusters.py")):
        def figures(self, networks, data, history):
            outputs.append((len(history.outputs["logits"]), len(data.test)))
            return {}

    nndist.train(Drawn(epochs=2), **{**QUIET, "figures": True}, hold_out=0.2, runs_dir=tmp_path)
    assert outputs and outputs[0][0] == outputs[0][1]


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_same_choice_and_the_same_test_on_several_processes(trained, tmp_path, world_size):
    flags = [*FLAGS, "--run", "it", "--runs-dir", tmp_path]
    launched = Processes(world_size, [KEEPING, *flags], folder=tmp_path)
    assert not any(launched.wait()), launched.said()
    ours, alone = records_of(tmp_path / "keeping/it"), records_of(trained.folder)
    assert len(ours) == len(alone)
    for record, expected in zip(ours, alone, strict=True):
        assert record.keys() == expected.keys()
        for name in record.keys() - {"data"}:
            assert record[name] == pytest.approx(expected[name], rel=1e-4), name


def test_split_networks_are_tested_with_their_best_weights(tmp_path):
    flags = [*FLAGS, "--run", "it", "--runs-dir", tmp_path, "--shard", "fsdp"]
    launched = Processes(2, [KEEPING, *flags], folder=tmp_path)
    assert not any(launched.wait()), launched.said()
    run = load_run(tmp_path / "keeping/it")
    assert run.best["step"] == run.about["tested"] < 15
    assert run.evaluate().sets["test"].scores["loss"] == pytest.approx(run.scores["test/loss"], rel=1e-5)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_hold_out_examples(path, tmp_path, quick_reader):
    kind = with_few_examples(load_recipe(path), train=400)
    best = {"best": None} if kind().best else {}
    settings = {**QUIET, **best, "hold_out": 0.2, "max_steps": 1, "data_source": "sample"}
    if kind().data(RunConfig(data_source="sample").data_config(download=False)).val is not None:
        with pytest.raises(UserError, match="has its own validation set"):
            nndist.train(kind(), **settings, runs_dir=tmp_path)
        return
    scores = nndist.train(kind(), **settings, runs_dir=tmp_path).scores
    of_sets = [{name.partition("/")[2] for name in scores if name.startswith(f"{which}/")} for which in ("val", "test")]
    assert of_sets[0] == of_sets[1] != set()


@pytest.mark.parametrize("scored", ["return {'f1': len(self.seen) + 0.5}", "return {'f1': means['loss']}"])
def test_scores_of_a_set_that_differ_between_processes_are_refused(tmp_path, scored):
    text = (ROOT / "tests/toys.py").read_text() + (
        "\n\n@dataclass(kw_only=True)\nclass Kept(Line):\n"
        "    def score(self, networks, batch):\n"
        "        if not hasattr(self, 'seen'):\n            self.seen = []\n"
        "        self.seen += batch[0][:, 0].tolist()  # of this process only\n"
        "        return {'loss': self.loss(networks, batch)}\n"
        f"    def set_scores(self, means, totals):\n        {scored}\n"
    )
    (tmp_path / "kept.py").write_text(text.replace("x[:30]", "x[:31]"))
    flags = ["--max-steps", 2, "--eval-batch-size", 4, "--run", "it", "--runs-dir", tmp_path, *FLAGS[6:]]
    launched = Processes(2, [f"{tmp_path}/kept.py:Kept", *flags], folder=tmp_path)
    codes = launched.wait()
    if "means" in scored:
        assert codes == [0, 0], launched.said()
        return
    assert 2 in codes, launched.said()
    assert "set_scores: 'f1' is " in launched.said() and "on process 0 and " in launched.said(), launched.said()
    assert "Traceback" not in launched.said() and "as a Total" in launched.said()

"""A person's own table: what its columns are, gaps, dates, the split; learned, predicted, compared with baselines."""

import datetime
import math

import pytest
import torch
from making import path_of

import nndist
from nndist.datasets import table_baselines, table_sets, tables
from nndist.errors import UserError
from nndist.prediction import Inputs
from nndist.recipe import load_recipe

QUIET = {"progress": False, "threads": 1, "wandb": "off", "report": False, "figures": False}


def write(folder, lines, header="size;colour;day;id;goal", name="table.csv"):
    path = folder / name
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def table(tmp_path):
    """100 lines with gaps, in which the goal is twice the size, and 30 more for red."""
    draw = torch.Generator().manual_seed(0)
    lines = []
    for number in range(100):
        size = round(torch.rand(1, generator=draw).item() * 10, 2)
        colour = ("red", "blue", "green, dark")[number % 3]
        day = datetime.date(2024, 1, 1) + datetime.timedelta(days=number)
        goal = 2 * size + 30 * (colour == "red")
        cells = ["" if number % 10 == 3 else f"{size}", f'"{colour}"', "NA" if number == 50 else str(day)]
        lines.append(";".join([*cells, f"id{number}", f"{goal:.2f}".replace(".", ".")]))
    return write(tmp_path, lines)


def load(path, target="goal", task="auto", ignore=(), test_share=0.2, in_order=False):
    return table_sets.load(path, target, task, ignore, test_share, in_order)


def refused(*arguments, **named) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_columns_are_what_a_person_would_call_them(table):
    found = load(table)
    assert {c["name"]: c["kind"] for c in found.spec} == {
        "size": "number", "colour": "category", "day": "date", "id": "left out"
    }  # fmt: skip
    assert found.spec[1]["values"] == ["blue", "green, dark", "red"] and not found.classes
    x, y = found.train
    assert x.shape == (80, 1 + 7 + 1) and y.shape == (80, 1) and len(found.test[0]) == 20
    assert set(x[:, 8].tolist()) <= {1.0, 2.0, 3.0} and x[:, 0].isnan().sum() + found.test[0][:, 0].isnan().sum() == 10
    assert (
        found.plan["columns"].startswith("1 number, 1 date, 1 category, 1 left out; ")
        and found.plan["left out"] == "id"
    )


def test_the_scaling_is_that_of_the_known_numbers_of_the_training_lines(table):
    found = load(table, in_order=True)
    known = [c for c in found.train[0][:, 0].tolist() if not math.isnan(c)]
    assert found.x_scaling.mean[0] == pytest.approx(sum(known) / len(known), rel=1e-6)
    assert found.x_scaling.mean[8] == 0 and found.x_scaling.std[8] == 1, "categories stay numbers of places"
    assert found.y_scaling.mean.item() == pytest.approx(found.train[1].mean().item())
    assert found.plan["split"] == "20% of 100 lines to test on, the last"


def test_dates_of_several_styles_and_what_they_become():
    for text in ("2024-03-05", "2024/03/05", "05.03.2024", "2024-03-05T00:00"):
        assert tables.date_of(text) == datetime.datetime(2024, 3, 5)
    year, *circles = tables.date_parts("2024-03-05T12:00")
    assert year == pytest.approx(2024 + 64.5 / 366, abs=2e-3)
    assert [a * a + b * b for a, b in zip(circles[::2], circles[1::2], strict=True)] == pytest.approx([1.0] * 3)
    assert circles[5] == pytest.approx(-1.0), "noon is opposite to midnight"
    assert all(map(math.isnan, tables.date_parts("?")))


def test_a_target_is_classes_or_a_number(tmp_path):
    def kind(cells, task="auto"):
        path = write(tmp_path, [f"{n},{cell}" for n, cell in enumerate(cells)], header="x,goal")
        return load(path, task=task).classes

    assert kind(["yes", "no"] * 10) == ["no", "yes"]
    assert kind([str(n % 12) for n in range(40)]) == [str(n) for n in range(12)], "in the order of numbers"
    assert kind([str(n % 12) for n in range(40)], "numbers") == [] == kind([str(n / 2) for n in range(40)])
    assert kind(["1.5", "2.5"] * 10, "classes") == ["1.5", "2.5"]


def test_decimal_commas_tabs_and_lines_without_a_target(tmp_path):
    path = write(tmp_path, [f"{n},5\t{'' if n == 7 else n % 2}" for n in range(30)], header="x\tgoal")
    found = load(path)
    assert found.spec[0]["kind"] == "number" and found.x_scaling.mean[0] > 5
    assert len(found.train[0]) + len(found.test[0]) == 29 and found.plan["gaps"] == "1 of 30 lines left out: no target"


def test_what_can_not_be_learned_is_one_line(tmp_path, table):
    assert refused(table, target=None).startswith("--target: name a column of")
    assert "size, colour, day, id, goal" in refused(table, target="gaol")
    assert "--ignore x: no other column" in refused(table, ignore=("x",))
    assert "are not classes; name a column" in refused(table, target="id")
    assert "--task numbers, but 'red' is none" in refused(table, target="colour", task="numbers")
    assert "can't be read (No such file" in refused(tmp_path / "nowhere.csv")
    assert "line 3 has 2 cells, the first line has 1" in refused(write(tmp_path, ["1", "1,2"], header="goal"))
    assert "has several columns 'a'" in refused(write(tmp_path, ["1,2"], header="a,a"))
    assert "has 3 lines with a target" in refused(write(tmp_path, ["1,2"] * 3, header="a,goal"))


DAYS = [f"2024-{1 + number // 28:02d}-{1 + number % 28:02d}" for number in range(100)]


@pytest.mark.parametrize(
    "header, column, cell",
    [("size", range(100), "7"), ("day", DAYS, "2024-02-01"), ("colour", ["red", "blue"] * 50, "red")],
)
def test_one_column_is_given_without_a_separator(tmp_path, header, column, cell):
    lines = [f"{value},{number / 7}" for number, value in enumerate(column)]
    spec = load(write(tmp_path, lines, header=f"{header},goal")).spec
    x, missing = tables.given(Inputs([cell], data=dict), spec)
    assert len(x) == 1 and missing == [""]
    with pytest.raises(UserError, match=r"nowhere\.csv: is neither a file nor cells"):
        tables.given(Inputs(["nowhere.csv"], data=dict), spec)


def test_a_network_learns_it_predicts_without_it_and_says_what_is_missing(tmp_path, table):
    kind = load_recipe(path_of("table_mlp"))
    result = nndist.train(
        kind(csv=table, target="goal", epochs=150, dropout=0.0, lr=5e-3), run="it", runs_dir=tmp_path,
        **QUIET | {"figures": True},
    )  # fmt: skip
    assert result.scores["test/absolute_error"] < 4  # a mean has 13
    compared = (result.folder / "figures/compared.txt").read_text()
    assert all(name in compared for name in ("mean", "linear", "gradient boosting", "table_mlp", "RMSE"))
    table.unlink()
    run = nndist.load_run(result.folder)
    other = write(
        tmp_path, ["2024-02-01,9,red,5", "2024-02-02,8,blue,", "?,7,violet,5"], "day,more,colour,size", "b.csv"
    )
    answers = run.predict(str(other))
    red, blue, _ = answers.columns["goal"]
    assert red == pytest.approx(40, abs=6) and blue < 25
    assert answers.columns["missing"] == ["", "size", "day"] and len(answers) == 3
    with pytest.raises(UserError, match=r"has no column colour, day; it needs size, colour, day"):
        run.predict(str(write(tmp_path, ["1,2"], "size,more", "c.csv")))
    commas, semicolons = (run.predict(cells).columns for cells in ("5.5,red,2024-02-01", "5,5;red;2024-02-01"))
    assert commas == semicolons and list(commas) == ["goal"]
    with pytest.raises(UserError, match="is neither a file nor cells"):
        run.predict("5")


def test_baselines_are_what_scikit_learn_makes(tmp_path):
    sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    assert sklearn
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression

    data = load_breast_cancer()
    x, y = torch.tensor(data.data).float(), torch.tensor(data.target)
    wide = table_baselines.features(x, 30, [], x[:400])
    ours = table_baselines.linear(wide[:400], y[:400], wide[400:], 2).argmax(1)
    theirs = LogisticRegression(C=1 / (2 * 400 * table_baselines.RIDGE), max_iter=2000).fit(wide[:400, :30], y[:400])
    assert (ours == torch.from_numpy(theirs.predict(wide[400:, :30].numpy()))).float().mean() > 0.98
    text = table_baselines.compared(torch.zeros(169, 2), (x[:400], y[:400]), (x[400:], y[400:]), 30, [], "net")
    assert f"{(y[400:] == 0).float().mean():.1%}" in text.splitlines()[-1], "a network that always says 0"
    said = {line[:20].strip(): line.split()[-1] for line in text.splitlines()}
    assert (
        float(said["gradient boosting"].rstrip("%")) > 90 and said["majority"] == f"{(y[400:] == 1).float().mean():.1%}"
    )

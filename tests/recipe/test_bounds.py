"""Bounds of fields: what a field's type admits, on a flag and in Python, in a recipe of anyone."""

import dataclasses
import gc
import weakref
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Interval, Le
from conftest import RECIPES
from toys import Line

import nndist
from nndist import Amount, Count, Fraction, Recipe, Share, UserError
from nndist.config import RunConfig
from nndist.recipe.fields import check_fields, from_text, hints_of
from nndist.recipe.loading import load_recipe


@dataclass(kw_only=True)
class Bounded(Recipe):
    batch_size: int = 32  # a plain type: the bounds are the base's
    width: Count = 8
    heads: Count | None = None
    penalty: Amount = 0.0
    dropout: Fraction = 0.0
    test_share: Share = 0.1
    days: Annotated[int, Interval(ge=2, le=250)] = 20
    rate: Annotated[float, Interval(gt=0, le=1)] = 0.5
    scale: Annotated[float, Gt(0), Le(9)] = 1.0
    shift: Annotated[int, Ge(0)] | None = None
    kind: Literal["a", "b"] | None = None
    whole: bool = False
    layers: tuple[Count, ...] = (8, 8)
    crop: tuple[Amount, Share] | None = None


class Narrower(Bounded):
    width: Annotated[int, Interval(ge=4, le=64)] = 8
    days = 30


@pytest.mark.parametrize(
    "fields, line",
    [
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"width": 0}, "--width 0: must be at least 1"),
        ({"heads": -1}, "--heads -1: must be at least 1"),
        ({"penalty": -0.5}, "--penalty -0.5: must be at least 0"),
        ({"dropout": 1.0}, "--dropout 1.0: must be at least 0 and less than 1"),
        ({"test_share": 0.0}, "--test-share 0.0: must lie between 0 and 1"),
        ({"test_share": 1}, "--test-share 1: must lie between 0 and 1"),
        ({"days": 251}, "--days 251: must lie between 2 and 250"),
        ({"rate": 0.0}, "--rate 0.0: must be above 0 and at most 1"),
        ({"scale": 9.5}, "--scale 9.5: must be above 0 and at most 9"),
        ({"scale": float("nan")}, "--scale nan: must be a finite number"),
        ({"shift": -1}, "--shift -1: must be at least 0"),
        ({"kind": "c"}, "--kind 'c': must be one of a, b"),
        ({"layers": (8, 0)}, "--layers 0: must be at least 1"),
        ({"crop": (0.0, 1.0)}, "--crop 1.0: must lie between 0 and 1"),
        ({"lr": float("inf")}, "--lr inf: must be a finite number"),
    ],
)
def test_a_value_outside_is_one_line(fields, line):
    with pytest.raises(UserError) as error:
        Bounded(**fields).validate()
    assert str(error.value) == line


def test_values_at_the_bounds_are_admitted():
    Bounded().validate()
    edges = {"width": 1, "penalty": 0.0, "dropout": 0.0, "test_share": 1e-9, "days": 250, "rate": 1.0, "scale": 9}
    edged = Bounded(**edges, heads=1, shift=0, kind="b", whole=True)
    edged.validate()
    assert edges.items() <= edged.fields().items()


def test_a_subclass_may_have_bounds_of_its_own_and_keeps_the_others():
    Narrower(width=64).validate()
    for fields, line in (({"width": 3}, "between 4 and 64"), ({"days": 1}, "between 2 and 250")):
        with pytest.raises(UserError, match=line):
            Narrower(**fields).validate()


@pytest.mark.parametrize("name", ["keep", "threads", "log_every"])
def test_a_setting_of_the_run(name):
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} 0: must be at least 1$"):
        RunConfig(**{name: 0}).validate()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_size_of_a_shipped_recipe_may_be_negative(path):
    kind = load_recipe(path)
    hints = hints_of(kind)
    signed = {"forget_bias", "vocabulary"}  # a bias; and a size that `data` checks, which knows the bytes
    for field in dataclasses.fields(kind):
        if hints[field.name] in (int, float) and field.name not in signed and not field.name.endswith("seed"):
            with pytest.raises(UserError, match=f"--{field.name.replace('_', '-')} -1"):
                kind(**{field.name: -1}).validate()


def test_bounds_hold_where_a_recipe_of_anyone_does_not_call_the_inherited_check(tmp_path):
    class Own(Line):
        width: Count = 8
        kind: Literal["a", "b"] = "a"

        def validate(self) -> None:
            pass

    for fields, line in (
        ({"width": 0}, "--width 0: must be at least 1"),
        ({"kind": "c"}, "--kind 'c': must be one of"),
    ):
        with pytest.raises(UserError, match=line):
            nndist.train(Own(**fields), runs_dir=tmp_path, threads=1)


def test_a_tuple_of_bounded_numbers_is_read_from_text():
    assert from_text("3 5", hints_of(Bounded)["layers"], (8, 8)) == (3, 5)
    assert hints_of(Bounded)["layers"] == tuple[int, ...] and hints_of(Bounded)["heads"] == int | None


def test_a_recipe_that_is_loaded_anew_does_not_keep_the_load_before(tmp_path):
    """Else each training of a notebook would keep what the recipe's module holds, such as its data."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom enum import Enum\nfrom nndist import Recipe\n\n\n"
        "class Kind(Enum):\n    A = 'a'\n\n    def said(self):\n        return Kind\n\n\n"
        "class Mine(Recipe):\n    kind: Kind = Kind.A\n"
    )
    before = load_recipe(file)
    check_fields(before())
    gone = weakref.ref(before)
    after = load_recipe(file)
    assert hints_of(before)["kind"] is not hints_of(after)["kind"]
    del before
    gc.collect()
    assert gone() is None

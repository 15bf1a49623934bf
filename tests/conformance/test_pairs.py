"""Two habits at once, in one recipe that inherits from both: what neither breaks alone may break with the other.

Pairs of habits of two themes that override different methods, drawn at random: the loop by hand is that of the habit
that writes one. On one process the bits are the loop's, and a resumed run's those of the uninterrupted one; with
accumulation and on three processes they agree up to what a line search or an optimizer makes of roundings.

More of them: `NNDIST_PAIRS=2000 NNDIST_PAIRS_SEED=1 pytest -m nightly tests/conformance/test_pairs.py`.
"""

import os
import random

import pytest
import torch
from conformance import worker
from conformance.habit import ACCUMULATED, ALONE, RESUMED, THREE, Habit, TwoNetworks
from conformance.test_conformance import HABITS, read
from launching import Processes

SETTINGS = {"modes", "refused", "says", "limits", "per_process", "bugs", "stops"}
SETTINGS |= {"rounding", "loss_rounding", "rounding_on_three"}
BY_SIGN = {"optimizers.Rprop", "optimizers.Adafactor"}
"""They take a whole step by a gradient of 1e-17, such as that of a bias before BatchNorm."""
NEAR = {ALONE: 0.0, RESUMED: 0.0, ACCUMULATED: 1e-8, THREE: 1e-6}
BY_HAND = {ALONE: "plain", ACCUMULATED: "plain_accumulated", RESUMED: ALONE, THREE: "plain"}
APART = {
    # what the loop by hand of one habit does not know of the other
    frozenset({"optimizers.Groups", "schedules.Cosine"}),
    frozenset({"optimizers.Groups", "schedules.ByHand"}),
    frozenset({"losses.OneExample", "schedules.FactorPerGroup"}),
    # the loop by hand clips gradients that no optimizer zeroes
    frozenset({"freezing.OnlyHeadInOptimizer", "optimizers.Clipped"}),
    frozenset({"optimizers.Clipped", "parameters.Expanded"}),
    # both set the rate, which is refused
    frozenset({"optimizers.CountingStep", "schedules.Cosine"}),
    # two forward passes a step, of which the second sees a buffer that is not averaged yet, as a note says
    frozenset({"buffers.MeanOfBatchBefore", "optimizers.SharpnessAware"}),
    # a penalty on weights before the forward pass that gives them a shape
    frozenset({"counters.PenaltyByScheduleStep", "modules.LazyLinear"}),
    frozenset({"counters.PenaltyByScheduleStep", "modules.LazyBatchNorm"}),
}


def overridden(kind):
    """The names that a habit defines, without what only the tests use."""
    own = kind.__mro__[: kind.__mro__.index(Habit)]
    return {
        name for base in own for name in vars(base) if not name.startswith("__") or name == "__post_init__"
    } - SETTINGS


def pairs(count, seed):
    """Pairs of habits by name, at random."""
    simple = {
        name: overridden(kind)
        for name, kind in HABITS.items()
        if not (kind.refused or kind.stops or kind.limits or kind.bugs or issubclass(kind, TwoNetworks))
    }
    found = [
        (first, second)
        for first in simple
        for second in simple
        if first < second
        and first.split(".")[0] != second.split(".")[0]
        and not simple[first] & simple[second]
        and {"network", "networks"} - (simple[first] | simple[second])
        and frozenset({first, second}) not in APART
    ]
    return random.Random(seed).sample(sorted(found), count)


def written(number, pair, folder):
    """Writes a recipe of two habits beside the modules that hold them; returns its name."""
    name = f"pair.P{number}"
    file = worker.alone(name, folder)
    file.parent.mkdir(parents=True)
    lines = []
    for part, habit in zip("ab", sorted(pair, key=lambda habit: "train" not in overridden(HABITS[habit])), strict=True):
        worker.write_alone(habit, folder / "apart")
        module = f"{part}_of_pair_{number}"
        (file.parent / f"{module}.py").write_text(worker.alone(habit, folder / "apart").read_text())
        lines.append(f"from {module} import {habit.partition('.')[2]} as {part.upper()}\n")
    text = f'\n@dataclass(kw_only=True)\nclass P{number}(A, B):\n    """{" and ".join(pair)}."""\n'
    file.write_text("from dataclasses import dataclass\n\n" + "".join(lines) + text)
    return name


def train(mode, names, folder):
    """Trains what was not yet; one that ends its process is left out of the next launch."""
    while left := [name for name in names if not (folder / mode / f"{name}.json").exists()]:
        world_size = 3 if mode == THREE else 1
        launched = Processes(world_size, [mode, folder, *left], folder=folder, call=worker.main)
        codes = launched.wait(timeout=600)
        still = [name for name in left if not (folder / mode / f"{name}.json").exists()]
        assert still != left, f"{left[0]}: {codes}\n{launched.said()[-2000:]}"


def difference(mode, name, folder):
    """What is wrong with a pair in a mode, or ""."""
    (wanted, tensors), (got, others) = (read(folder / which, name) for which in (BY_HAND[mode], mode))
    for outcome in (wanted, got):
        if "error" in outcome:
            return outcome["error"].strip().splitlines()[-1]
    if tensors.keys() != others.keys():
        return f"other tensors: {tensors.keys() ^ others.keys()}"
    for key, tensor in tensors.items():
        near = {"rtol": NEAR[mode], "atol": NEAR[mode], "equal_nan": True}
        if not torch.allclose(tensor.double(), others[key].double(), **near):
            return f"{key} differs by {(tensor.double() - others[key].double()).abs().max()}"
    if mode != RESUMED and got["scores"] != pytest.approx(wanted["scores"], rel=1e-5, abs=1e-5, nan_ok=True):
        return f"scores {got['scores']} in place of {wanted['scores']}"
    return ""


def is_finite(tensors):
    return all(tensor.double().isfinite().all() for tensor in tensors.values())


@pytest.mark.nightly
def test_two_habits_at_once(tmp_path):
    count, seed = (int(os.environ.get(f"NNDIST_PAIRS{what}", value)) for what, value in (("", 300), ("_SEED", 0)))
    chosen = {written(number, pair, tmp_path): pair for number, pair in enumerate(pairs(count, seed))}
    train("plain", chosen, tmp_path)
    outcomes = {name: read(tmp_path / "plain", name) for name in chosen}
    able = [name for name, (about, tensors) in outcomes.items() if "error" not in about and is_finite(tensors)]
    assert len(able) > 0.8 * count, "most pairs train by hand"
    wrong = []
    for mode in (ALONE, RESUMED, ACCUMULATED, THREE):
        kinds = {name: [HABITS[habit] for habit in chosen[name]] for name in able}
        names = [name for name in able if all(mode in kind.modes for kind in kinds[name])]
        if mode == THREE:  # with random numbers of each process's own three are not one
            names = [name for name in names if not any(kind.per_process for kind in kinds[name])]
            names = [name for name in names if not BY_SIGN & {*chosen[name]}]
        for which in (BY_HAND[mode], mode):
            train(which, names, tmp_path)
        wrong += [
            f"{mode} {' and '.join(chosen[name])}: {text}"
            for name in names
            if (text := difference(mode, name, tmp_path))
        ]
    assert not wrong, "\n".join(wrong)

"""Habits of ordinary training code, each compared with a loop written by hand in plain PyTorch.

Each is tried on one process (the loop's bits), with accumulation (the bits of a loop that accumulates), killed after a
save in mid-epoch and resumed in another process (the bits of the run that was not), on three processes (to 1e-12, or
three replicas by hand where each has random numbers of its own), and resumed on three.

Situations that users of other toolkits report as lost or wrong, and the habits that try them:

- accumulation: Lightning-AI/pytorch-lightning#87, #2569, #13243, #19987 (the last, smaller batch), #21808;
  huggingface/transformers#35207, karpathy/nanoGPT#605, meta-pytorch/torchtune#1875 and #1917 (padding's weight):
  every habit under accumulation, losses.WeightedExamples, losses.IgnoredLabels, losses.TinyBatches, losses.Accumulates
- clipping before all gradients are there: huggingface/transformers#1563, huggingface/accelerate#641,
  Lightning-AI/pytorch-lightning#12595: optimizers.Clipped, optimizers.ClippedByValue
- schedules that run N times as fast on N processes: huggingface/accelerate#1398, #2142, #2926, #662, #843, #1382;
  huggingface/diffusers#3954, huggingface/transformers#24088: every habit of schedules on three processes
- rates that a resume loses: huggingface/transformers#27749, #34053, #23099; Lightning-AI/pytorch-lightning#5486,
  #7637, #14699, #17296; huggingface/pytorch-image-models#2756; pytorch/pytorch#60265: schedules resumed
- random numbers and position that a resume loses: Lightning-AI/pytorch-lightning#17543, #18098, #18780, #5325, #20204;
  huggingface/transformers#11504: every habit of randomness resumed in mid-epoch
- unfreezing and parameter groups that come later: Lightning-AI/pytorch-lightning#6891, #8502, #6551, #21901:
  freezing.UnfrozenByEpoch, freezing.AddedLater, freezing.FrozenAfterSteps; frozen BatchNorm, #2551: FrozenBatchNorm
- closures called several times: Lightning-AI/pytorch-lightning#4083, #4188, #6147, #3672: optimizers.LBFGS and
  optimizers.SharpnessAware
- several networks: Lightning-AI/pytorch-lightning#591, #603, #5545, #6282: networks.GAN, networks.RequiresGradToggled
- averages of weights: mosaicml/composer#624, #2003, #1003; pytorch/ignite#2590; huggingface/pytorch-image-models#245;
  facebookresearch/moco#70: optimizers.AverageOfWeights, buffers.EMATeacher, buffers.TeacherInHook, buffers.Queue
- buffers by process: huggingface/pytorch-image-models#110: every habit of buffers on three processes
- rebound buffers, hooks on gradients, extra states: pytorch/pytorch#63916, #76464, #107063, #57473,
  NVIDIA/TransformerEngine#1860: buffers.ReboundCounter, freezing.AccumulateGradHook, parameters.Unused and
  modules.ExtraTensor
"""

import fcntl
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conformance import worker
from conformance.habit import MODES, Habit
from conformance.worker import NEEDED
from launching import Processes
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "habits"
ALIKE = ("losses", "optimizers", "parameters", "schedules")
"""Themes of which nothing is a process's own: to come back on one process and to train on three is shown apart."""


def found():
    """Every habit by name, of modules that nothing is trained from."""
    by_name = {}
    for path in sorted(FOLDER.glob("*.py")):
        specification = importlib.util.spec_from_file_location(f"listed_{path.stem}", path)
        module = importlib.util.module_from_spec(specification)
        sys.modules[module.__name__] = module
        specification.loader.exec_module(module)
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, Habit) and value.__module__ == module.__name__:
                by_name[f"{path.stem}.{name}"] = value
    return by_name


HABITS = found()


def cases():
    for mode in MODES:
        for name, kind in HABITS.items():
            if mode in kind.modes and not (mode == "three_resumed" and name.startswith(ALIKE)):
                marks = [pytest.mark.xfail(strict=True, reason=kind.bugs[mode])] if mode in kind.bugs else []
                yield pytest.param(mode, name, marks=marks, id=f"{mode}-{name}")


@pytest.fixture(scope="session")
def launched(request, tmp_path_factory):
    """Gives the folder of a mode's outcomes; its habits are trained in one launch, by the first test that asks."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "conformance"
    folder.mkdir(exist_ok=True)
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = [(params["mode"], params["name"]) for params in asked if "mode" in params]

    def get(mode):
        with (folder / f"{mode}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            wanted = [name for other, name in asked if other == mode or mode in every_needed(other)]
            launch(mode, folder, wanted_in(mode, dict.fromkeys(wanted)))
        return folder / mode

    return get


def every_needed(mode):
    needed = NEEDED.get(mode, [])
    return [*needed, *(more for other in needed for more in every_needed(other))]


def wanted_in(mode, names):
    if mode == "plain_three":
        return [name for name in names if HABITS[name].per_process]
    return [name for name in names if not (mode.startswith("plain") and (refused(name, "") or HABITS[name].stops))]


def refused(name, mode):
    """The line that a habit is refused with, or ""."""
    line = HABITS[name].refused
    return line if isinstance(line, str) else line.get(mode, "")


def launch(mode, folder, names):
    """Trains the habits that were not yet; one that ends its process is noted; the next launch continues after it."""
    while left := [name for name in names if not (folder / mode / f"{name}.json").exists()]:
        for name in left:
            worker.write_alone(name, folder)
        world_size = 3 if mode.startswith("three") else 1
        processes = Processes(world_size, [mode, folder, *left], folder=folder, call=worker.main)
        codes = processes.wait(timeout=400)
        still = [name for name in left if not (folder / mode / f"{name}.json").exists()]
        if still == left:  # the process was killed, or nobody answered
            (folder / mode).mkdir(exist_ok=True)
            died = {"error": f"the process died: {codes}\n{processes.said()[-2000:]}"}
            (folder / mode / f"{still[0]}.json").write_text(json.dumps(died))


def read(folder, name):
    described = json.loads((folder / f"{name}.json").read_text())
    file = folder / f"{name}.safetensors"
    return described, load_file(file) if file.exists() else {}


@pytest.mark.parametrize("mode, name", [*cases()])
def test_habit(launched, mode, name):
    check(mode, name, launched)


def check(mode, name, launched):
    """Asserts that a habit came out as it should; `launched` gives the folder of a mode's outcomes."""
    kind = HABITS[name]
    line = refused(name, mode)
    if line:
        got, _ = read(launched(mode), name)
        assert line in got.get("error", "nothing was refused"), got
        assert got["steps"] == 0 and "\n" not in got["error"]
        return
    if kind.stops:
        got, _ = read(launched(mode), name)
        assert kind.stops in got.get("error", "nothing stopped it"), got
        assert kind.says.get(mode, "") in got["said"] and "\n" not in got["error"]
        return
    by_hand = ["plain_three"] if mode == "three" and kind.per_process else NEEDED[mode][:1]
    (wanted, wanted_tensors), (got, tensors) = (read(launched(other), name) for other in (*by_hand, mode))
    if "error" in got and mode in kind.limits:
        assert kind.limits[mode] in got["error"] and "\n" not in got["error"], got
        return
    for described in (wanted, got):
        assert "error" not in described, described["error"]
    # the loop by hand accumulates, too, so what is carried from one micro-batch to the next is alike
    known = ("note     resumed from step 5", "results may depend on --accumulate")
    said = "\n".join(line for line in got["said"].splitlines() if not any(text in line for text in known))
    assert kind.says.get(mode, "") in said, said
    if mode not in kind.says and mode not in kind.limits:
        assert "note " not in said, said
    if "resumed" in mode:
        assert got["steps"] == wanted["steps"] - worker.SAVED_AT
        said += wanted["said"]
    if mode in kind.limits:
        assert kind.limits[mode] in said, said
        return
    rounding = (
        0.0 if "resumed" in mode else max(kind.rounding, kind.rounding_on_three) if mode == "three" else kind.rounding
    )
    compare(tensors, wanted_tensors, rounding)
    near = {"rel": max(rounding, kind.loss_rounding), "abs": max(rounding, kind.loss_rounding)}
    assert got["scores"] == pytest.approx(wanted["scores"], **near)
    assert got["losses"].keys() == wanted["losses"].keys()
    for objective, losses in wanted["losses"].items():
        assert got["losses"][objective] == pytest.approx(losses, **near), objective


def compare(tensors, wanted, rounding):
    assert tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        if not rounding:
            difference = (tensors[key].double() - tensor.double()).abs()
            assert torch.equal(tensors[key], tensor), f"{key} differs by {difference.max()}"
        else:
            torch.testing.assert_close(
                tensors[key], tensor, rtol=rounding, atol=rounding, msg=lambda text, key=key: f"{key}: {text}"
            )

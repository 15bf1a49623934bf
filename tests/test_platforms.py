"""Without what only POSIX has, as on Windows: commands run and locks hold. What this can't show: workers/no_posix."""

import multiprocessing
import os
import sys

import pytest
import torch
from launching import ROOT, python, succeeded
from torch.utils._python_dispatch import TorchDispatchMode

import nndist
from nndist import machine, metrics
from nndist.distributed.runtime import check_mps, chosen_device
from nndist.recipe import load_recipe

ENVIRONMENT = {"NO_POSIX": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/workers/no_posix"), str(ROOT)])}
RECIPE = ROOT / "recipes/two_clusters.py"


def without_posix(*arguments, folder):
    return succeeded(python(*arguments, env=ENVIRONMENT, cwd=folder, timeout=600))


@pytest.mark.parametrize(
    "flags",
    [pytest.param(["--no-verify"], marks=pytest.mark.long), pytest.param([], marks=pytest.mark.nightly)],
    ids=["quick", "with-verify"],
)
def test_all_that_a_user_does_with_a_run_without_posix(tmp_path, flags):
    """What the workflow's job for Windows and macOS runs; all of it nightly: `verify` is its slowest part by far."""
    assert "all is as it must be" in without_posix(ROOT / "tests/smoke.py", *flags, folder=tmp_path).stdout


def test_importing_the_library_needs_no_posix(tmp_path):
    """Every module of nndist can be imported."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "nndist").rglob("*.py")
        if path.name != "__main__.py"
    ]
    code = "".join(f"import {module}\n" for module in modules)
    hidden = "print(sorted(name for name in sys.modules if name in ('fcntl', 'resource', 'pwd', 'termios')))"
    done = without_posix("-c", f"{code}import sys\n{hidden}", folder=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", "what is hidden was not found in another way"


def _try_to_lock(path, windows, answers):
    if windows:
        hide_fcntl()
    with path.open("ab") as file:
        try:
            machine.lock(file, wait=False)
            answers.put("locked")
        except OSError:
            answers.put("refused")


def hide_fcntl():
    import sys

    sys.path.insert(0, str(ROOT / "tests/workers/no_posix"))
    import windows_locks

    sys.modules["msvcrt"] = windows_locks
    machine.fcntl = None


@pytest.mark.parametrize("windows", [False, True])
def test_a_lock_keeps_other_processes_out_until_it_is_closed(tmp_path, windows):
    path = tmp_path / "lock"
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def asked():
        process = context.Process(target=_try_to_lock, args=(path, windows, answers))
        process.start()
        process.join()
        return answers.get(timeout=10)

    with path.open("ab") as file:
        machine.lock(file)
        assert asked() == "refused"
    assert asked() == "locked"


def test_what_the_machine_tells():
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)
    assert 0 < machine.used_memory() < machine.memory() and 0 < machine.free_memory() < machine.memory()
    assert machine.peak_memory() >= machine.used_memory() // 2
    assert machine.busy_seconds() > 0
    assert machine.environment_of(os.getpid()).keys() >= {"PATH"}
    assert machine.environment_of(2**22 + 1) == {}


class NoFloat64(TorchDispatchMode):
    """Raises for a float64 tensor that is made anywhere but in nndist.metrics, where sums are on the CPU then."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        found = made if isinstance(made, tuple | list) else [made]
        if any(isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64 for tensor in found):
            frame = sys._getframe()
            while frame is not None and frame.f_code.co_filename != metrics.__file__:
                frame = frame.f_back
            assert frame is not None, f"{function} makes float64, which Apple's GPUs have not"
        return made


@pytest.mark.parametrize("name", ["mnist_simple_cnn", "char_gpt", "mnist_gan", "sum_mlp"])
def test_nothing_on_the_device_is_float64(tmp_path, monkeypatch, name):
    """A training as on Apple's GPU, whose part the CPU plays: images, `Weighted` losses, two networks, clipping."""
    monkeypatch.setattr(metrics, "NO_FLOAT64", {"cpu"})
    recipe = load_recipe(ROOT / f"recipes/{name}.py")(clip_norm=1.0, ema_decay=0.9)
    settings = {"data_source": "sample", "max_steps": 3, "figures": False, "report": False, "progress": False}
    with NoFloat64():
        result = nndist.train(recipe, runs_dir=tmp_path, wandb="off", log_every=1, threads=1, **settings)
    assert result.steps == 3


@pytest.mark.parametrize("asked", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_one_line(asked):
    there = torch.cuda.is_available() if asked == "cuda" else torch.backends.mps.is_available()
    if there:
        assert chosen_device(asked) == asked
        return
    with pytest.raises(nndist.UserError, match=f"^--device {asked}: no .*GPU.* is available.*use --device cpu$"):
        chosen_device(asked)


def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert chosen_device("auto") == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert chosen_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device("auto") == "cuda"


def test_what_a_macs_gpu_does_not_do_is_one_line(monkeypatch):
    with pytest.raises(nndist.UserError, match=r"^--precision bf16: not supported on Apple's GPUs; use fp32"):
        check_mps("bf16")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(nndist.UserError, match=r"^--device mps: a Mac's GPU serves one process"):
        check_mps("fp32")

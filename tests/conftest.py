"""What every test gets: real MNIST where there is some, and nothing of the user's own settings."""

import contextlib
import gc
import io
import multiprocessing.spawn
import os
import pickle
import signal
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from making import path_of
from resuming import uninterrupted  # noqa: F401  (a fixture)

import nndist

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.py"))

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: one thread each, and for what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What takes longest is begun first, else one worker ends with it while the others have nothing left to do. By folder or
# file; of the long tests by function.
BEGUN_FIRST = (
    "test_every_block_runs_in_order_in_a_clean_folder",
    "tests/conformance",
    "tests/training/test_resume.py",
    "tests/training/test_fsdp.py",
    "tests/training/test_faults.py",
    "tests/runs/test_wandb.py",
    "tests/training/test_parity.py",
    "tests/recipes",
    "tests/experiments",
    "tests/cli",
    "tests/launchers",
)

# `pytest --cov` measures these tests, and what they fork: quick ones, since it takes a third more time.
MEASURED = (
    *(f"tests/{wing}/" for wing in ("figures", "prediction", "recipe", "report", "trained")),
    *(f"tests/cli/test_{name}.py" for name in ("commands", "main", "new_recipe")),
    *(f"tests/data/test_{name}.py" for name in ("batches", "data", "mixed", "transfer")),
    "tests/experiments/test_replay.py",
    *(f"tests/runs/test_{name}.py" for name in ("checkpoint", "hostile_folders", "rebuild", "records")),
    *(f"tests/training/test_{n}.py" for n in ("fine_tuning", "hooks", "initial", "optimizers", "trainer")),
    *("tests/test_newcomer.py", "tests/test_strangers.py"),
)


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist's: files with the most tests first
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    def place(item):
        return next((place for place, name in enumerate(BEGUN_FIRST) if name in item.nodeid), len(BEGUN_FIRST))

    items.sort(key=place)  # stable: what is alike keeps its order
    for item in items:
        if not item.nodeid.startswith(MEASURED):
            item.add_marker("no_cover")


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # else every full collection would look through all of torch and of the tests


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """What a test forks is measured only if the test is: coverage has forked processes start it by themselves."""
    prepared = multiprocessing.spawn.get_preparation_data
    if item.get_closest_marker("no_cover"):

        def unmeasured(name):
            return {key: value for key, value in prepared(name).items() if key != "stowaway"}

        multiprocessing.spawn.get_preparation_data = unmeasured
    try:
        return (yield)
    finally:
        multiprocessing.spawn.get_preparation_data = prepared


@pytest.fixture(scope="session", autouse=True)
def private_settings(tmp_path_factory):
    """`accelerate config` writes a file that every later launch reads: tests have their own, empty one."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf_home"))
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))  # of the recipes that were trained
    os.environ["WANDB_MODE"] = "disabled"  # tests of W&B say so themselves


@pytest.fixture(scope="session", autouse=True)
def no_pickle_is_read():
    """Nothing of the library may read or write a pickle: whoever does fails here."""

    def refused(*arguments, **named):
        raise AssertionError("a pickle was read or written")

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (torch, "save")):
            patch.setattr(module, name, refused)
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """A test that leaves a process group would change the next one."""
    yield
    assert not dist.is_initialized()


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder of real MNIST; skips where there is none. `.ci/run` sets NNDIST_DATA, so that it can't skip there."""
    folder = Path(os.environ.get("NNDIST_DATA", "nowhere"))
    if not (folder / "MNIST/raw/train-images-idx3-ubyte").exists():
        pytest.skip("real MNIST is not in $NNDIST_DATA")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains a shipped recipe by its name, quietly, on the sample where it reads digits; the same settings once."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def train(name, **settings):
        settings = {"data_source": "sample", "runs_dir": folder, "progress": False, "threads": 1, **settings}
        with contextlib.redirect_stdout(io.StringIO()):
            return nndist.train(path_of(name), traceback=True, **settings)

    return train

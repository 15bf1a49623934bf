"""What every test gets: real MNIST where there is some, and nothing of the user's own settings."""

import contextlib
import gc
import io
import os
import pickle
import signal
from functools import cache
from pathlib import Path

import covered  # before whatever else imports nndist
import pytest
import torch
import torch.distributed as dist
from making import path_of, train_readers_in
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


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist's: files with the most tests first
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    def place(item):
        return next((place for place, name in enumerate(BEGUN_FIRST) if name in item.nodeid), len(BEGUN_FIRST))

    items.sort(key=place)  # stable: what is alike keeps its order


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    with covered.during(item.nodeid):
        return (yield)


def pytest_sessionfinish():
    covered.end()


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # else every full collection would look through all of torch and of the tests


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


@pytest.fixture
def quick_reader():
    """Classifiers that judge generated images are trained in a few steps: see `making.train_readers_in`."""
    before = train_readers_in(20)
    yield
    train_readers_in(before)


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

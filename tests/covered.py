"""The branches and lines of nndist that the quick tests of some wings reach, measured in the run of all tests.

`NNDIST_COVERAGE=FOLDER pytest -n 2` leaves a file for each worker there; `python tests/covered.py FOLDER` prints shares
by wing. What a test does in a process of its own is not measured: patched to be, not all of them ended.
"""

import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import nndist

WINGS = ("cli", "data", "experiments", "figures", "prediction", "recipe", "report", "runs", "trained", "training")
# Measuring takes a third more time: so only by tests that do much within nndist and little within torch.
MEASURED = (
    *(f"tests/{wing}/" for wing in ("figures", "prediction", "recipe", "report", "trained")),
    *(f"tests/cli/test_{name}.py" for name in ("commands", "main", "new_recipe")),
    *(f"tests/data/test_{name}.py" for name in ("batches", "data", "mixed", "transfer")),
    "tests/experiments/test_replay.py",
    *(f"tests/runs/test_{name}.py" for name in ("checkpoint", "hostile_folders", "rebuild", "records")),
    *(f"tests/test_{name}.py" for name in ("newcomer", "strangers")),
    *(f"tests/training/test_{name}.py" for name in ("fine_tuning", "hooks", "initial", "optimizers", "trainer")),
)

TIMED = "tests/report/test_report.py::test_what_a_page_costs"

_measuring = None


def _opened(folder: str):
    import coverage  # only who measures needs it

    return coverage.Coverage(f"{folder}/data", data_suffix=True, branch=True, source_pkgs=["nndist"], config_file=False)


def begin() -> None:
    """Imports all of nndist under measurement, in a worker of xdist that is told to measure."""
    global _measuring
    if "PYTEST_XDIST_WORKER" in os.environ and (folder := os.environ.get("NNDIST_COVERAGE")):
        _measuring = _opened(folder)
        with during(MEASURED[0]):
            for module in pkgutil.walk_packages(nndist.__path__, "nndist."):
                if module.name not in ("nndist.__main__", "nndist.train"):  # which begin something, or are no module
                    importlib.import_module(module.name)


@contextmanager
def during(test: str) -> Iterator[None]:
    """Measures the code within, if the test with this node ID is one of those measured by."""
    measured = _measuring is not None and test.startswith(MEASURED) and test != TIMED
    if measured:
        _measuring.start()
    try:
        yield
    finally:
        if measured:
            _measuring.stop()


def end() -> None:
    """Writes what was measured."""
    if _measuring is not None:
        _measuring.save()


if __name__ != "__main__":
    begin()
else:
    together = _opened(sys.argv[1])
    together.combine()
    for wing in WINGS:
        share = together.report(include=[f"nndist/{wing}/*"], file=io.StringIO())
        print(f"{wing:12} {share:.0f} % of branches and lines")

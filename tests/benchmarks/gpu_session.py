"""All that a GPU has to show in one call of at most ten minutes: `pytest -m gpu`, then gpu.py, as JSON.

    python tests/benchmarks/gpu_session.py --prepare     # before: MNIST's four files into build/, which git ignores
    python tests/benchmarks/gpu_session.py               # on the machine with the GPU, to which build/ came along
    python tests/benchmarks/gpu_session.py --rehearse    # all of it on a CPU: 3.2 minutes on a busy machine of 2 cores

It writes into $OUT, or --out: tests.jsonl, a line for each test; gpu.rows.jsonl, a line for each measurement; both as
soon as they are known, so that a session that is cut off leaves them. At its end gpu.json and session.json, the whole.
The tests have --test-minutes, the measurements what remains of --minutes.
"""

import argparse
import gzip
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
CARRIED = ROOT / "build/data"
FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def prepare(source: Path) -> None:
    """Copies MNIST, packed, to where it may be carried from."""
    found = [
        packed if (packed := source / f"MNIST/raw/{name}.gz").exists() else packed.with_suffix("") for name in FILES
    ]
    missing = [path for path in found if not path.exists()]
    if missing:
        sys.exit(f"error: {missing[0]}: is not there; set NNDIST_DATA to the folder that holds MNIST/raw")
    (CARRIED / "MNIST/raw").mkdir(parents=True, exist_ok=True)
    for path in found:
        if path.suffix == ".gz":
            shutil.copy(path, CARRIED / "MNIST/raw")
        else:
            (CARRIED / f"MNIST/raw/{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    size = sum(path.stat().st_size for path in (CARRIED / "MNIST/raw").iterdir())
    print(f"{CARRIED.relative_to(ROOT)}: {size / 2**20:.1f} MiB, ignored by git")


def run_tests(rows: Path) -> None:
    """Runs the tests of the GPU in this process; writes a line for each as it ends."""
    import pytest

    class Writer:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when != "call" and report.outcome == "passed":
                return
            said = "" if report.passed else str(report.longrepr).splitlines()[-1][:300]
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "said": said}
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")

    selected = [
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "--tb=short",
        str(ROOT / "tests/training/test_gpu.py"),
    ]
    sys.exit(pytest.main(selected, plugins=[Writer()]))


def started(arguments: list[Any], seconds: float, **environment: str) -> int | str:
    """Runs this Python with the arguments; its exit code, or that it was stopped."""
    process = subprocess.Popen([sys.executable, *map(str, arguments)], env={**os.environ, **environment}, cwd=ROOT)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"stopped after {seconds:.0f} s"


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="copy MNIST into build/data, then leave")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a few steps of each measurement")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT") or "build/gpu", help="default: $OUT, or build/gpu"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="that all may take")
    parser.add_argument("--test-minutes", type=float, default=2.0, help="that the tests may take")
    parser.add_argument("--only", choices=["tests", "measurements"], help="one of the two")
    parser.add_argument("--tests-into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tests_into:
        run_tests(options.tests_into)
    if options.prepare:
        prepare(Path(os.environ.get("NNDIST_DATA") or Path.home() / ".cache/nndist"))
        return
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tests.jsonl", "gpu.rows.jsonl", "gpu.json", "session.json"):
        (out / name).unlink(missing_ok=True)
    began = time.monotonic()
    device = "cpu" if options.rehearse else "cuda"
    settings = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
    settings |= {"NNDIST_TEST_DEVICE": device, "PYTHONUNBUFFERED": "1"}
    has_mnist = all(list((CARRIED / "MNIST/raw").glob(f"{name}*")) for name in FILES)
    if has_mnist:
        settings["NNDIST_DATA"] = str(CARRIED)
    ended: dict[str, int | str] = {}
    if options.only != "measurements":
        command = [__file__, "--tests-into", out / "tests.jsonl"]
        ended["tests"] = started(command, 60 * options.test_minutes + 30, **settings)
    if options.only != "tests":
        left = options.minutes - (time.monotonic() - began) / 60
        flags = ["--device", "cpu", "--quick"] if options.rehearse else ["--data-source", "mnist"] * has_mnist
        command = [ROOT / "tests/benchmarks/gpu.py", *flags, "--minutes", f"{left:.2f}", "--to", out / "gpu.json"]
        ended["measurements"] = started(command, 60 * left + 10, **settings)
    tests = lines_of(out / "tests.jsonl")
    counts = {kind: sum(row["outcome"] == kind for row in tests) for kind in ("passed", "failed", "skipped")}
    session = {
        "date": time.strftime("%Y-%m-%d"),
        "rehearsal": options.rehearse,
        "python": platform.python_version(),
        "minutes": round((time.monotonic() - began) / 60, 2),
        "ended": ended,
        "counts": counts,
        "tests": tests,
        "rows": lines_of(out / "gpu.rows.jsonl"),
    }
    (out / "session.json").write_text(json.dumps(session, indent=1) + "\n")
    print(
        f"{out / 'session.json'}: {counts}, {len(session['rows'])} measurements, {session['minutes']} minutes; {ended}"
    )
    sys.exit(0 if all(code == 0 for code in ended.values()) else 1)


if __name__ == "__main__":
    main()

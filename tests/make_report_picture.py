"""Make launch/report.png, the picture of a report in README: of two epochs of mnist_simple_cnn on real MNIST.

    NNDIST_DATA=FOLDER python tests/make_report_picture.py                # trains, about a minute
    python tests/make_report_picture.py runs/mnist_simple_cnn/first       # of a run that there is

It needs Chromium. The colours are made few, so that the file stays below 150 kB.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from browser import Browser
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--data-source", "mnist", "--epochs", "2", "--lr", "0.05", "--evaluate-every", "100 steps", "--threads", "1"]
FLAGS += ["--run", "first"]
WIDTH, HEIGHT = 1280, 975
COLOURS = 64


def train(runs: Path) -> Path:
    """The folder of a run that is trained for the picture."""
    command = [sys.executable, "launch/train.py", "recipes/mnist_simple_cnn.py", *FLAGS, "--runs-dir", str(runs)]
    subprocess.run(command, cwd=ROOT, check=True)
    return runs / "mnist_simple_cnn/first"


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="the run's folder (default: one is trained)")
    run = parser.parse_args().run
    with tempfile.TemporaryDirectory() as scratch:
        folder = run or train(Path(scratch) / "runs")
        with Browser(Path(scratch) / "profile") as browser:
            page = browser.open(folder / "report.html", width=WIDTH, height=HEIGHT)
            page.screenshot(Path(scratch) / "page.png", whole=False)
        with Image.open(Path(scratch) / "page.png") as picture:
            few = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            few.save(ROOT / "launch/report.png", optimize=True)


if __name__ == "__main__":
    main()

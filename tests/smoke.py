"""What a user does with a run, on any system: trains, stops, resumes, predicts, evaluates, compares, verifies.

    python tests/smoke.py              # minutes; in an empty folder that it makes
    python tests/smoke.py --no-verify

It needs nndist and Python's own library only, so that Windows and macOS run it, too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def nndist(*arguments: object, folder: Path) -> str:
    """Runs a sub-command in a folder and gives what it printed; leaves with its output if it fails."""
    words = [str(argument) for argument in arguments]
    print("nndist", *words, flush=True)
    environment = {**os.environ, "WANDB_MODE": "offline", "XDG_STATE_HOME": str(folder / "state")}
    if sys.platform == "win32":
        environment["USE_LIBUV"] = "0"
    done = subprocess.run(
        [sys.executable, "-m", "nndist", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=900,
    )
    if done.returncode:
        sys.exit(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def file_url(folder: Path) -> str:
    return f"file://{'' if os.sep == '/' else '/'}{folder.as_posix()}"


def smoke(folder: Path, verify: bool) -> None:
    """All of it; leaves with a message at the first thing that is not as it must be."""
    train = ["train", "two_clusters", "--run", "it", "--cpu", "--no-progress"]
    nndist(*train, "--max-steps", 40, "--wandb", "offline", folder=folder)
    nndist(*train, folder=folder)
    nndist(*train[:3], "whole", *train[4:], folder=folder)
    runs = folder / "runs/two_clusters"
    about = json.loads((runs / "it/run.json").read_text(encoding="utf-8"))
    assert about["status"] == "finished", about["status"]
    assert list((runs / "it/wandb").rglob("*.wandb")), "W&B's process has written nothing"
    assert [launch["from_step"] for launch in about["launches"]] == [0, 40], about["launches"]
    last = max((runs / "it/checkpoints").glob("step-*")).name
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        resumed, whole = ((runs / run / "checkpoints" / last / name).read_bytes() for run in ("it", "whole"))
        assert resumed == whole, f"{name}: the resumed run has other bits"
    assert "%" in nndist("predict", "runs/two_clusters/it", "2, 2", folder=folder)
    assert "accuracy" in nndist("evaluate", "runs/two_clusters/it", folder=folder)
    nndist("checkpoint", "verify", "runs/two_clusters/it", folder=folder)
    nndist("report", "runs", folder=folder)
    assert (folder / "runs/index.html").is_file() and (runs / "it/report.html").is_file()
    compared = ["compare", "two_clusters", "--vary", "lr=0.01,0.05", "--epochs", 20, "--wandb", "off", "--jobs", 2]
    assert "0.05" in nndist(*compared, folder=folder)
    stored = ["--runs-dir", file_url(folder / "my store"), "--local-runs-dir", folder / "local", "--wandb", "off"]
    nndist(*train[:3], "stored", *train[4:], *stored, "--save-every", "10 steps", "--keep", 1, folder=folder)
    assert list((folder / "my store").rglob("step-*100/manifest.json")), "the last checkpoint is not in the store"
    steps = sorted(path.name for path in (folder / "local").rglob("checkpoints/*"))
    assert steps[-1] == "step-00000100" and len(steps) <= 2, steps  # the best may be an earlier one
    # texts that no code page of Windows has, in what is printed, given and written
    dates = ["--data-source", "sample", "--max-steps", 2, "--cpu", "--no-progress", "--wandb", "off", "--run", "it"]
    assert "年" in nndist("train", "date_transformer", *dates, folder=folder)
    assert "2024年3月5日" in nndist("predict", "runs/date_transformer/it", "2024年3月5日", "--json", folder=folder)
    nndist("train", "mnist_cnn", "--data-source", "sample", "--max-steps", 5, "--cpu", "--no-progress", folder=folder)
    if verify:
        assert "BROKEN" not in nndist("verify", "two_clusters", "--steps", 30, "--kills", 2, folder=folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-verify", action="store_true", help="leave out nndist verify")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        smoke(Path(place).resolve(), not options.no_verify)
    print("all is as it must be")

"""Folders of runs, written as the training leaves them, and what tests of their pages ask a browser."""

import json
import struct
import zlib

# A page's script waits less; and the curves of a panel that can be seen.
FASTER = "const slow = setTimeout; window.setTimeout = (what, ms, ...rest) => slow(what, ms / 25, ...rest)"
VISIBLE = "[...document.querySelectorAll('.panel')[{}].querySelectorAll('g[data-series]')].map(g => g.dataset.series)"


def png(width=40, height=30) -> bytes:
    """A grey image."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x99" * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def records(steps=100, per_epoch=25, speed=1000.0, accuracy=0.9):
    """What a classifier records: losses at each step, scores at the end of each epoch."""
    found = []
    for step in range(1, steps + 1):
        where = {"step": step, "epoch": step / per_epoch}
        loss = 2.0 / step + 0.01 * (step % 3)
        found.append({**where, "train/loss": loss, "lr": 0.1, "gradient_norm": loss, "examples_per_second": speed})
        if step % per_epoch == 0:
            scores = {"test/loss": 2.2 / step, "test/accuracy": accuracy * (1 - 1 / step)}
            found.append({**where, **scores, "data": "MNIST"})
    return found


def make_run(runs_dir, recipe="digits", run="first", /, *, lines=None, figures=None, checkpoints=(100,), **about):
    """A run's folder as the training leaves it; `about` changes run.json, where None takes a key away."""
    folder = runs_dir / recipe / run
    folder.mkdir(parents=True)
    description = {
        "recipe": recipe,
        "title": "Digits with two convolutions",
        "document": "000, section 2",
        "documented": "97.959 % of the test set",
        "plan": {"data": "MNIST: 60,000 to train on, 10,000 test", "network": "model 1,199,882 parameters"},
        "fields": {"epochs": 4, "lr": 0.1, "best": None, "best_is": "highest", "shuffle": True},
        "settings": {"seed": 0, "run": run},
        "data": {"source": "MNIST", "train": 60000, "test": 10000},
        "versions": {"python": "3.11.7", "torch": "2.11.0"},
        "device": "CPU x 1 process x 2 threads",
        "world_size": 1,
        "threads": 2,
        "command": ["launch/train.py", f"recipes/{recipe}.py", "--run", run],
        "updated": "2026-01-02T03:04:05",
        "status": "finished",
        "step": 100,
        "total_steps": 100,
        "seconds": 75.5,
        "launches": [
            {"from_step": 0, "to_step": 40, "status": "preempted", "world_size": 2, "seconds": 30.0, "host": "one"},
            {"from_step": 40, "to_step": 100, "status": "finished", "world_size": 1, "seconds": 45.5, "host": "two"},
        ],
    } | about
    description = {key: value for key, value in description.items() if value is not None}
    (folder / "run.json").write_text(json.dumps(description))
    lines = [json.dumps(record) for record in records()] if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for step in checkpoints:
        saved = folder / f"checkpoints/step-{step:08d}"
        saved.mkdir(parents=True)
        for name in ("model.safetensors", "manifest.json"):
            (saved / name).write_bytes(b"x" * 2**20)
    (folder / "figures").mkdir()
    for name, content in (figures or {}).items():
        (folder / "figures" / name).write_bytes(content)
    return folder

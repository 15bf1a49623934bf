"""Weights & Biases as a sink: a separate process that reads a run's folder and sends what is written there.

The training never calls the client: a client or server that hangs, dies or is stopped can't hold it up, and
metrics.jsonl stays the source of truth. A resumed run is sent from its first record, so the newest offline folder is
always the complete run, without what an interrupted launch recorded past its last save.

    python -c 'from nndist.runs.wandb import main; main()' '{"folder": "runs/mnist_cnn/first", "mode": "offline", ...}'
"""

from __future__ import annotations

import contextlib
import csv
import html
import io
import json
import netrc
import os
import re
import shutil
import time
import urllib.parse
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import printable, read_bytes, read_json, write_json
from .reading import checkpoints_in
from .sink import Ended, Mode, SinkProcess, at_rest, description_of, records, run_sink, until_under_way

INIT_TIMEOUT_SECONDS = 10.0  # the client takes twice that before it gives up
PROGRESS_SECONDS = 5.0  # between two lines of a sync
MAX_FIGURE_BYTES = 64 << 20
MAX_PIXELS = 100_000_000


def choose_mode(wanted: str, folder: Path) -> tuple[Mode | None, str]:
    """The mode that `--wandb` selects (None is off), and a line for the user.

    auto is $WANDB_MODE, else online if an API key is configured, else offline.
    """
    later = f"later: wandb login && nndist sync {folder}"
    if wanted == "auto":
        modes = {"online": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
        wanted = modes.get(os.environ.get("WANDB_MODE", ""), "")
        if not wanted and not has_api_key():
            return "offline", f"offline, as no API key is configured; {later}"
    if wanted == "off":
        return None, ""
    return ("offline", f"offline; {later}") if wanted == "offline" else ("online", "online")


def has_api_key() -> bool:
    """Whether the client would find an API key: in the environment, or for the server in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in files:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if host and netrc.netrc(Path(file).expanduser()).authenticators(host):
                return True
    return False


class WandbProcess(SinkProcess):
    """The sink's process of W&B."""

    name, place, main = "W&B", "wandb", "nndist.runs.wandb"

    def __init__(
        self,
        folder: Path,
        mode: Mode,
        say: Callable[[str], None],
        *,
        project: str,
        artifact: bool = False,
        alert: bool = False,
    ) -> None:
        # the mode has been decided; what an offline run has yet to send stays in its folder
        inherited = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
        environment = {"WANDB_DATA_DIR": str((folder / self.place).absolute()), **inherited}
        super().__init__(folder, mode, say, {"project": project, "artifact": artifact, "alert": alert}, environment)


def sync(folder: Path, mode: Mode, *, project: str, artifact: bool, say: Callable[[str], None]) -> bool:
    """Sends a finished or interrupted run as one clean W&B run, replacing what its launches wrote offline.

    Returns whether it was sent. Raises UserError if there is no run, or it is being trained.
    """
    with at_rest(folder):
        return WandbProcess(folder, mode, say, project=project, artifact=artifact).close("synced")


# From here on: what runs in the sink's process.


def main() -> None:
    """Sends a run until its training has ended; exits with 0, or otherwise if something was not sent."""
    run_sink(WandbProcess.name, WandbProcess.place, send)


def send(folder: Path, task: dict[str, Any], ended: Ended) -> None:
    """Opens the W&B run, sends records as they appear, and finally figures and summary."""
    metrics = folder / "metrics.jsonl"
    until_under_way(metrics, ended)
    run = begin(folder, task)
    # if W&B already has the run, send only what it lacks; the records of a step are sent together
    sent_before = run.summary.get("step", -1) if run.resumed else -1
    told = time.monotonic()
    for number, record in enumerate(records(metrics, ended), 1):
        if record["step"] >= sent_before:
            run.log({name: value for name, value in record.items() if isinstance(value, int | float)})
        if ended.status == "synced" and time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            print(f"W&B: {number:,} records sent", flush=True)
    # after "killed", figures may be those of an earlier launch
    status = ended.status
    description = description_of(folder)
    if status in ("finished", "cut", "synced"):
        media = figures(folder / "figures")
        if media:
            run.log({"step": description.get("step"), **media})
    summary = {f"final/{name}": value for name, value in (description.get("scores") or {}).items()}
    if description.get("best"):
        summary |= {f"best/{name}": value for name, value in description["best"]["scores"].items()}
        summary["best/step"] = description["best"]["step"]
    run.summary.update({**summary, "status": description.get("status", status)})
    if task["artifact"] and (saved := checkpoints_in(folder / "checkpoints")):
        import wandb

        artifact = wandb.Artifact(artifact_name(f"{description['recipe']}-{folder.name}"), type="model")
        for file in sorted(path for path in saved[-1][1].iterdir() if path.is_file() and not path.is_symlink()):
            if file.name == "manifest.json" or file.name.startswith(("model", "ema")):
                artifact.add_file(str(file))
        run.log_artifact(artifact)
    if task["alert"] and status != "synced":
        text = description.get("problem") or json.dumps(description.get("scores") or {})
        run.alert(title=f"{description['recipe']}/{folder.name}: {status}", text=str(text))
    if status == "synced" and task["mode"] == "offline":
        print(
            f"W&B: {Path(run.dir).parent} is the complete run; send it with: wandb sync {Path(run.dir).parent}",
            flush=True,
        )
    run.finish(exit_code=0 if status in ("finished", "cut", "synced", "preempted") else 1)


def begin(folder: Path, task: dict[str, Any]) -> Any:
    """Opens the W&B run; offline if the server does not answer in time."""
    import wandb

    description = description_of(folder)
    state = folder / "wandb" / "run.json"
    try:
        known = read_json(state, {"id": str})
    except (OSError, ValueError):  # missing or damaged: becomes a new W&B run
        known = {"id": uuid.uuid4().hex[:8]}
    write_json(state, known)
    keep = ("recipe", "document", "data", "settings", "versions", "device", "world_size", "threads", "source_sha256")
    config = {**description.get("fields", {}), "nndist": {name: description.get(name) for name in keep}}
    mode = task["mode"]
    for attempt in (mode, "offline"):
        before = set((folder / "wandb").glob("offline-run-*"))
        settings = {
            "silent": True,
            "console": "off",
            "init_timeout": INIT_TIMEOUT_SECONDS,
            "x_transaction_log_flush_interval": 0.5,
            "x_stats_pid": task["pid"],
        }
        settings = {name: value for name, value in settings.items() if name in wandb.Settings.model_fields}
        try:
            run = wandb.init(
                project=task["project"],
                name=f"{description['recipe']}/{folder.name}",
                id=known["id"],
                dir=str(folder),
                mode=attempt,
                resume="allow" if attempt == "online" else None,
                config=config,
                settings=wandb.Settings(**settings),
            )
            break
        except Exception as error:
            if attempt == "offline":
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"W&B: online failed ({reason}); offline, later: nndist sync {folder}", flush=True)
            with contextlib.suppress(Exception):
                wandb.teardown()
    if attempt == "online":
        print(f"W&B: {run.url}", flush=True)
    else:
        for older in before:  # the new one will contain all of them
            shutil.rmtree(older, ignore_errors=True)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def figures(folder: Path) -> dict[str, Any]:
    """The contents of a run's figures/, as W&B media; a line names each file that can't be read."""
    media: dict[str, Any] = {}
    for path in sorted(folder.glob("[!.]*")):
        try:
            found = medium(path)
        except Exception as error:  # whatever is wrong with one file, the others are sent
            why = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
            print(f"W&B: figures/{printable(path.name)} is left out ({why})", flush=True)
        else:
            media |= {} if found is None else {f"figures/{path.stem}": found}
    return media


def medium(path: Path) -> Any:
    """A file of figures/ as W&B shows it; None for a file of another kind. Raises OSError and ValueError."""
    import wandb

    kind = path.suffix
    if kind not in (".png", ".gif", ".csv", ".txt"):
        return None
    content = read_bytes(path, MAX_FIGURE_BYTES)
    if kind == ".png":
        # the client opens it by its content, which may be of a format that starts another program
        if not content.startswith(b"\x89PNG\r\n\x1a\n"):
            raise ValueError("is not a PNG image")
        if int.from_bytes(content[16:20]) * int.from_bytes(content[20:24]) > MAX_PIXELS:
            raise ValueError(f"has more than {MAX_PIXELS:,} pixels")
        return wandb.Image(str(path))
    if kind == ".gif":
        return wandb.Video(str(path), format="gif")
    if kind == ".txt":
        return wandb.Html(f"<pre>{html.escape(content.decode())}</pre>", inject=False)
    columns, *rows = [*csv.reader(io.StringIO(content.decode(), newline=""))] or [[]]
    return wandb.Table(columns=[*columns], data=rows)


def artifact_name(text: str) -> str:
    """The text as an artifact's name: W&B allows letters, digits, _, . and -."""
    return re.sub(r"[^\w.-]", "_", text)

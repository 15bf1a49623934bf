"""TensorBoard and Trackio as sinks (see sink): `--track tensorboard trackio`, beside W&B or instead of it.

Both write files on this machine and send nothing. They are written by their own packages, not by Accelerate's trackers:
those start torch's processes wherever they are made, and write the hyper-parameters as a second run.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError
from ..files import printable, read_bytes, read_json, write_json
from .sink import Ended, SinkProcess, at_rest, description_of, records, run_sink, until_under_way

NAMES = {"tensorboard": "TensorBoard", "trackio": "Trackio"}
MAX_FIGURE_BYTES = 16 << 20
FLUSH_SECONDS = 2.0
PROJECT = "nndist"  # of Trackio


def check_installed(names: Iterable[str]) -> None:
    """Raises UserError for a tracker that does not exist, is named twice, or is not installed."""
    given = list(names)
    for name in given:
        if name not in NAMES:
            raise UserError(f"--track {name}: must be {' or '.join(NAMES)}")
        if given.count(name) > 1:
            raise UserError(f"--track {name}: given twice")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--track {name}: the package {name} is not installed: pip install {name}")


def where(name: str, folder: Path) -> str:
    """The command that shows a run in a tracker."""
    if name == "tensorboard":
        return f"tensorboard --logdir {folder / name}"
    return f"trackio show --project {PROJECT}"


class TrackerProcess(SinkProcess):
    """The sink's process of TensorBoard or Trackio."""

    main = "nndist.runs.trackers"

    def __init__(self, tracker: str, folder: Path, say: Callable[[str], None]):
        self.name, self.place = NAMES[tracker], tracker
        # a Trackio that is told of a server would send each record there a second time after a resume
        to_servers = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_DATASET_ID")
        environment = {name: value for name, value in os.environ.items() if name not in to_servers}
        super().__init__(folder, "offline", say, {"tracker": tracker}, environment)


def sync(tracker: str, folder: Path, *, say: Callable[[str], None]) -> bool:
    """Hands a finished or interrupted run to a tracker again; returns whether everything arrived.

    Raises UserError if there is no run, it is being trained, or the tracker is not installed.
    """
    check_installed([tracker])
    with at_rest(folder):
        done = TrackerProcess(tracker, folder, say).close("synced")
    if done:
        say(f"{NAMES[tracker]}: {where(tracker, folder)}")
    return done


# From here on: what runs in the sink's process.


def main() -> None:
    """Hands a run over until its training has ended; exits with 0, or otherwise if something did not arrive."""
    import json

    tracker = json.loads(sys.argv[1])["tracker"]
    run_sink(NAMES[tracker], tracker, send)


class Writer(Protocol):
    """A run in a tracker; made anew, without what an earlier launch has written of the same run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of a record."""

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a text."""

    def image(self, step: int, name: str, path: Path, content: bytes) -> None:
        """Writes a PNG."""

    def close(self) -> None:
        """Writes what is left."""


def send(folder: Path, task: dict[str, Any], ended: Ended) -> None:
    """Hands over the records as they appear, and finally the figures and scores."""
    metrics = folder / "metrics.jsonl"
    until_under_way(metrics, ended)
    with contextlib.redirect_stdout(sys.stderr):  # what the package prints belongs in the log
        writer: Writer = TensorBoard(folder) if task["tracker"] == "tensorboard" else Trackio(folder)
        last = 0
        for record in records(metrics, ended):
            last = record["step"]
            values = {name: value for name, value in record.items() if type(value) in (int, float) and name != "step"}
            writer.scalars(last, values)
        description = description_of(folder)
        if ended.status in ("finished", "cut", "synced"):  # after "killed", figures may be those of an earlier launch
            for problem in write_figures(writer, last, folder / "figures"):
                print(f"{NAMES[task['tracker']]}: {problem}", file=sys.__stdout__, flush=True)
        best = description.get("best") or {}
        summary = {f"best/{name}": value for name, value in best.get("scores", {}).items()}
        summary |= {f"final/{name}": value for name, value in (description.get("scores") or {}).items()}
        writer.scalars(last, {name: value for name, value in summary.items() if type(value) in (int, float)})
        writer.close()


def write_figures(writer: Writer, step: int, folder: Path) -> list[str]:
    """Writes the PNGs and texts of a run's figures/; returns a line for each that can't be read."""
    problems = []
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix not in (".png", ".txt"):
            continue
        try:
            content = read_bytes(path, MAX_FIGURE_BYTES)
            if path.suffix == ".txt":
                writer.text(step, f"figures/{path.stem}", content.decode("utf-8", "replace"))
            elif content.startswith(b"\x89PNG\r\n\x1a\n"):
                writer.image(step, f"figures/{path.stem}", path, content)
            else:
                raise ValueError("is not a PNG image")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            problems.append(f"figures/{printable(path.name)} is left out ({why})")
    return problems


def fields_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """A run's fields and what it was trained on, by plain names."""
    keep = ("recipe", "document", "data", "settings", "versions", "device", "world_size", "threads", "source_sha256")
    return {**description.get("fields", {}), "nndist": {name: description.get(name) for name in keep}}


class TensorBoard:
    """RUN/tensorboard/: one file of events, written by TensorBoard's own writer, without torch."""

    def __init__(self, folder: Path):
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2
        self._tensor, self._shape, self._types = tensor_pb2.TensorProto, tensor_shape_pb2.TensorShapeProto, types_pb2
        place = folder / "tensorboard"
        for older in place.glob("events.out.tfevents.*"):
            older.unlink()
        self._writer = EventFileWriter(str(place), flush_secs=FLUSH_SECONDS)
        fields = fields_of(description_of(folder))
        rows = "\n".join(f"|{html.escape(str(name))}|{html.escape(str(value))}|" for name, value in fields.items())
        self.text(0, "run", f"|field|value|\n|---|---|\n{rows}", plain=False)

    def _add(self, step: int, values: list[Any]) -> None:
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event(step=step, wall_time=time.time(), summary=summary))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def text(self, step: int, name: str, text: str, plain: bool = True) -> None:
        if plain:  # it is shown as Markdown
            text = "\n".join(f"    {line}" for line in text.splitlines())
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        tensor = self._tensor(
            dtype=self._types.DT_STRING,
            string_val=[text.encode("utf-8", "replace")],
            tensor_shape=self._shape(dim=[self._shape.Dim(size=1)]),
        )
        metadata = self._summary.SummaryMetadata(plugin_data=plugin)
        self._add(step, [self._summary.Summary.Value(tag=name, metadata=metadata, tensor=tensor)])

    def image(self, step: int, name: str, path: Path, content: bytes) -> None:
        width, height = int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
        image = self._summary.Summary.Image(encoded_image_string=content, width=width, height=height, colorspace=3)
        self._add(step, [self._summary.Summary.Value(tag=name, image=image)])

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A run in Trackio's database, in $TRACKIO_DIR or its usual place; never on a Space or a server."""

    def __init__(self, folder: Path):
        import trackio

        self._trackio = trackio
        description, state = description_of(folder), folder / "trackio" / "run.json"
        name = f"{description['recipe']}/{folder.name}"
        with contextlib.suppress(OSError, ValueError):  # no earlier launch
            known = read_json(state, {"id": str, "name": str})
            trackio.api.Run(PROJECT, known["name"], known["id"]).delete()
        quiet = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self._run = trackio.init(project=PROJECT, name=name, config=fields_of(description), **quiet)
        write_json(state, {"id": self._run.id, "name": self._run.name})

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if values:
            self._run.log(dict(values), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._trackio.Markdown(f"```\n{text}\n```")}, step=step)

    def image(self, step: int, name: str, path: Path, content: bytes) -> None:
        self._run.log({name: self._trackio.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()

"""The tables of a run's page: where its time went, its layers, facts, launches and checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import machine
from ..files import LAUNCH, near
from ..runs.reading import (
    Run,
    checkpoints_in,
    launch_list,
    list_of_mappings,
    mapping,
    number,
)
from .markup import STATES, duration, pairs, plain, table, text

STRAGGLES = 1.1  # times the median work of a step: such a process is named

PHASE_TITLES = {
    "data": "data",
    "passes": "forward and backward",
    "sum": "sum of the gradients",
    "update": "update",
}


def step_times(run: Run) -> str:
    """Where the time of a step went in the last launch, on each process: stalls for data and stragglers by name."""
    rows, totals = [], []
    for rank, process in enumerate(list_of_mappings(run.about.get("processes"))):
        seconds = {name: number(mapping(process.get("seconds_per_step")).get(name)) or 0.0 for name in PHASE_TITLES}
        total = sum(seconds.values())
        if total:
            totals.append((rank, seconds, total))
            share = f"{100 * seconds['data'] / total:.0f} %"
            often = plain(process.get("slowest_in"))
            times = [f"{1000 * seconds[name]:,.2f}" for name in PHASE_TITLES]
            rows.append([str(rank), str(process.get("host", "")), *times, f"{1000 * total:,.2f}", share, often])
    if not rows:
        return ""
    columns = ["process", "host", *PHASE_TITLES.values(), "step", "data's share", "slowest in records"]
    words = "Milliseconds per step of the last launch."
    if len(rows) == 1:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    else:
        work = {rank: total - seconds["sum"] for rank, seconds, total in totals}
        slowest = max(work, key=work.__getitem__)
        typical = sorted(work.values())[(len(work) - 1) // 2]
        words += " The sum of the gradients waits for the slowest process"
        if work[slowest] > STRAGGLES * typical:
            words += (
                f": that is process {slowest}, whose own work takes {work[slowest] / typical:.2f} times the median's."
            )
        else:
            words += "; all take about as long."
    drawn = table(columns, rows, numeric=set(range(2, len(columns))) | {0})
    return f"<section><h2>Time per step</h2><p>{text(words)}</p>{drawn}</section>"


def layers(run: Run) -> str:
    """Each network layer by layer."""
    drawn = []
    for name, rows in mapping(run.about.get("layers")).items():
        rows = [row for row in rows if isinstance(row, list) and len(row) == 3] if isinstance(rows, list) else []
        counts = [number(count) or 0 for *_, count in rows]
        cells = [(str(place), str(of), f"{count:,.0f}") for (place, of, _), count in zip(rows, counts, strict=True)]
        listed = table(("layer", "", "parameters"), [*cells, ("", "", f"{sum(counts):,.0f}")], numeric={2})
        drawn.append(f"<details><summary>{text(str(name))}, {len(rows)} layers</summary>{listed}</details>")
    return f"<section><h2>Networks</h2>{''.join(drawn)}</section>" if drawn else ""


def facts(run: Run) -> str:
    """Plan, fields, settings and environment."""
    about = run.about
    versions = mapping(about.get("versions"))
    hosts = dict.fromkeys(str(launch["host"]) for launch in launch_list(run) if launch.get("host"))
    environment = {
        **versions,
        "git": git_text(mapping(about.get("git"))),
        "device": about.get("device"),
        "processes": about.get("world_size"),
        "threads per process": about.get("threads"),
        "host": ", ".join(hosts) or None,
        "command": machine.command_line(command(run.about, run.name)) or None,
        "recipe's SHA-256": about.get("source_sha256"),
    }
    sections = [
        ("Plan", mapping(about.get("plan"))),
        ("Environment", {name: value for name, value in environment.items() if value is not None}),
        ("The recipe's fields", mapping(about.get("fields"))),
        ("The run's settings", mapping(about.get("settings"))),
    ]
    drawn = [f"<section><h2>{name}</h2>{pairs(values)}</section>" for name, values in sections if values]
    return f'<div class="facts-columns">{"".join(drawn)}</div>'


def git_text(git: Mapping[str, Any]) -> str | None:
    """The commit of the recipe's repository; None if it is in none."""
    commit = git.get("commit")
    return None if not commit else f"{commit}{', with changes' if git.get('dirty') else ''}"


def launches(run: Run) -> str:
    """The launches of a run, which may have been stopped and resumed."""
    rows = []
    for place, launch in enumerate(launch_list(run), 1):
        seconds = number(launch.get("seconds"))
        rows.append(
            [
                str(place),
                str(launch.get("began", "")).replace("T", " "),
                plain(launch.get("from_step")),
                plain(launch.get("to_step")),
                duration(seconds) if seconds is not None else "",
                plain(launch.get("world_size")),
                str(launch.get("host", "")),
                STATES.get(str(launch.get("status")), (str(launch.get("status", "")), ""))[0],
            ]
        )
    if not rows:
        return ""
    columns = ["launch", "began", "from step", "to step", "time", "processes", "host", "status"]
    return f"<section><h2>Launches</h2>{table(columns, rows, numeric={0, 2, 3, 4, 5})}</section>"


def checkpoints(run: Run) -> str:
    """The checkpoints, how to load them, and how to resume."""
    found: list[tuple[int, Path]] = []
    with contextlib.suppress(OSError):
        every = checkpoints_in(run.folder / "checkpoints")
        found = [(step, path) for step, path in every if (path / "manifest.json").exists()]
    best = mapping(run.about.get("best")).get("step")
    rows = []
    for step, path in found:
        size = sum(file.stat().st_size for file in path.glob("*") if file.is_file())
        what = [word for word, holds in (("newest", path == found[-1][1]), ("best", step == best)) if holds]
        rows.append([f"checkpoints/{path.name}", file_size(size), ", ".join(what)])
    parts = ["<section><h2>Use and resume</h2>"]
    if found:
        newest = found[-1][1]
        sharded = sorted(file.name for file in newest.glob("model-*-of-*.safetensors"))
        weights = [f"checkpoints/{newest.name}/{name}" for name in sharded or ["model.safetensors"]]
        parts.append(table(["checkpoint", "size", ""], rows, numeric={1}))
        parts.append("<p>The weights, from the folder of this page, by plain parameter names:</p>")
        parts.append(
            f"<pre><code>from safetensors.torch import load_file\n\nweights = load_file({text(repr(weights[0]))})"
        )
        parts += [f"weights |= load_file({text(repr(file))})" for file in weights[1:]]
        parts.append("network.load_state_dict(weights)</code></pre>")
        if any(newest.glob("ema*.safetensors")):
            parts.append("<p>The EMA of the weights is in ema.safetensors beside it.</p>")
    else:
        parts.append("<p>No checkpoint has been saved yet.</p>")
    words = command(run.about, run.name)
    if words:
        if run.status == "cut":
            parts.append(
                "<p>The command that trained it; without --max-steps it resumes the run and trains to the end:</p>"
            )
        elif run.status == "finished":
            parts.append("<p>The command that trained it; the run is complete, so there is nothing to resume:</p>")
        elif found:
            parts.append("<p>The same command resumes it from the newest checkpoint, to the same end:</p>")
        else:
            parts.append("<p>The same command starts it again:</p>")
        parts.append(f'<pre class="command"><code>{text(machine.command_line(words))}</code></pre>')
    return "\n".join([*parts, "</section>"])


def file_size(num_bytes: int) -> str:
    """Bytes in human-readable form."""
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:,.1f} KiB"


def command(about: Mapping[str, Any], name: str) -> list[str]:
    """The command that resumes a run, as a list of words; empty if unknown.

    about: contents of run.json. name: the run's.
    """
    given = about.get("command")
    if not isinstance(given, list) or not given:
        return []
    script, *flags = map(str, given)
    if Path(script).name == "__main__.py":
        start = ["-m", Path(script).parent.name]
    elif Path(script).suffix == ".py":
        start = [script]
    elif Path(script).stem == "nndist":  # nndist.exe on Windows
        start = ["-m", "nndist"]
    else:
        return []  # a notebook's kernel
    if not any(flag in ("--run", "--run-name") or flag.startswith(("--run=", "--run-name=")) for flag in flags):
        flags += ["--run", name]  # it was named after the time, and would get a new name
    num_processes = number(about.get("world_size")) or 1
    if num_processes == 1:
        return ["nndist", *flags] if Path(script).stem == "nndist" else ["python", *start, *flags]
    config = "cpu_ddp" if str(about.get("device", "")).startswith("CPU") else "gpu_ddp"
    launcher = ["accelerate", "launch", "--config_file", str(near(LAUNCH / f"accelerate/{config}.yaml"))]
    return [*launcher, "--num_processes", f"{num_processes:g}", *start, *flags]

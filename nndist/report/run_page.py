"""report.html: the page of one run, for whoever trained it and for whoever only wants the result."""

from __future__ import annotations

import base64
import contextlib
import csv
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import LAUNCH, near, open_regular, read_bytes
from ..runs.reading import (
    LAST_PANELS,
    PLOT_MARK,
    Run,
    Series,
    checkpoints_in,
    is_share,
    launch_list,
    list_of_mappings,
    mapping,
    network_of,
    number,
    panels_of,
    set_of,
)
from .markup import STATES, address, duration, figure_text, moment, page, pairs, plain, status_class, table, text

REFRESH_SECONDS = 10  # between reloads of the page of a running run
STALE_SECONDS = 1800  # after which a run that says "running" is probably dead
MAX_POINTS = 2000  # of a curve; an envelope beyond
MAX_IMAGE_BYTES = 10_000_000  # larger images are linked, not embedded
MAX_HEADER_BYTES = 4096  # of a PNG, before its pixels
MAX_TEXT_BYTES = 1_000_000  # of a text or a table
MAX_ROWS = 50  # of a table in figures/
HALF_WIDTH = 1000  # pixels: a wider image is unreadable in half of the page
STRAGGLES = 1.1  # times the median work of a step: such a process is named
HALF_LINE = 62  # characters, likewise


def html_of(run: Run, *, version: str = "", up: bool | None = None) -> str:
    """The complete page. version: of a page that is served (see live). up: whether it links to the page of all runs."""
    panels = curves(run)
    data = {
        "page": "run",
        "running": run.running,
        "updated": run.updated,
        "refresh_seconds": REFRESH_SECONDS,
        "stale_seconds": STALE_SECONDS,
        "panels": panels,
        **({"version": version} if version else {}),
    }
    nothing = "" if panels else "<p>Nothing has been recorded yet.</p>"
    body = [
        header(run, up),
        score_table(run),
        f'<section><h2>Curves</h2>{nothing}<div class="panels" id="panels"></div>',
        "<noscript><p>The curves need JavaScript.</p></noscript></section>",
        figures(run.folder / "figures"),
        step_times(run),
        layers(run),
        facts(run),
        launches(run),
        checkpoints(run),
    ]
    return page(f"{run.recipe} / {run.name}", "\n".join(body), data, refresh_seconds=REFRESH_SECONDS * run.running)


def header(run: Run, linked: bool | None = None) -> str:
    """The title, the status and the key facts. linked: whether to the page of all runs; None: if there is one."""
    about = run.about
    word, meaning = STATES.get(run.status, (run.status, "is in a state that this version does not know"))
    title = str(about.get("title") or "").rstrip(".")
    whence = f'<span class="soft">(document {text(str(about["document"]))})</span>' if about.get("document") else ""
    index = run.folder.absolute().parent.parent / "index.html"
    up = '<a href="../../index.html">all runs</a>' if (index.exists() if linked is None else linked) else ""
    if run.ended and run.status in ("finished", "cut"):
        goes_on = "; the same command without --max-steps resumes the run" if run.status == "cut" else ""
        meaning = f"was {run.ended}{goes_on}"
    if run.why_it_failed:
        meaning += f": {run.why_it_failed}"
    lead = f"This run {meaning}. Last updated: {moment(run.updated) or 'unknown'}."
    damaged = f'<p class="notice"><strong>{text(run.problem)}</strong></p>' if run.problem else ""
    return f"""<header><p class="eyebrow"><span>nndist</span>{up}</p>
<h1>{text(run.recipe)} <span class="run">/ {text(run.name)}</span></h1>
<p>{text(title)} {whence}</p>
<p class="lead"><span class="status {status_class(run.status)}">{text(word)}</span> <span>{text(lead)}</span>
<span id="age" class="soft"></span></p>{damaged}
<dl class="cards">{"".join([*score_cards(run), data_card(run), *progress_cards(run)])}</dl></header>"""


def progress_cards(run: Run) -> list[str]:
    """Steps done, and the time they took."""
    total, seconds = number(run.about.get("total_steps")), number(run.about.get("seconds"))
    steps, bar = f"{run.last_step:,}", ""
    if total is not None and total > 0:
        steps += f" of {total:,.0f}"
        bar = f'<progress max="{total:.0f}" value="{run.last_step}" aria-label="steps done"></progress>'
    speed = "" if run.speed is None else f"{run.speed:,.0f} examples per second"
    device = str(run.about.get("device", ""))
    return [
        card("Optimizer steps", steps, bar + text(run.epochs_text)),
        card("Training time", duration(seconds), "<br>".join(text(part) for part in (speed, device) if part)),
    ]


def score_cards(run: Run) -> list[str]:
    """The headline score, its best value, and the document's figure if there is one."""
    cards = []
    score = run.headline
    if texts := run.headline_texts:
        cards += [
            card(name.removesuffix("_text").replace("_", " ").capitalize(), said, kind="text")
            for name, said in texts.items()
        ]
    elif run.headline_names and not any("/" in name for name in run.headline_names):
        name = run.headline_names[0].removesuffix("_text").replace("_", " ")
        cards.append(card(name, "none yet" if run.running else "not drawn", "drawn with the figures, at the end"))
    elif score is not None and score.values:
        best = score.extreme(run.lowest_is_best(score.name))
        final = "Latest" if run.running else "Final"
        below = f"at step {score.steps[-1]:,}"
        if best is not None and len(score.values) > 1:
            which = "lowest" if run.lowest_is_best(score.name) else "highest"
            also = best[1] == score.values[-1]
            of = "so far" if run.running else "of all evaluations"
            below += f", the {which} {of}" if also else f"; {which} {figure_text(score, best[1])} at step {best[0]:,}"
        cards.append(
            card(f"{final} {score.name.replace('/', ' ', 1)}", figure_text(score, score.values[-1]), text(below))
        )
    else:
        cards.append(card("Score", "none yet", "nothing has been evaluated"))
    cards += tested_card(run, score)
    if documented := run.about.get("documented"):
        name = "The document's figure" if run.about.get("document") else "Baseline"
        cards.append(card(name, str(documented), kind="text"))
    return [*cards, *baseline_card(run)]


def baseline_card(run: Run) -> list[str]:
    """The run that this one is compared with: its scores of a name that this one has, and the difference."""
    base = mapping(run.about.get("baseline"))
    theirs = {name: value for name, value in mapping(base.get("scores")).items() if number(value) is not None}
    ours = mapping(mapping(run.about.get("best")).get("scores")) or mapping(run.about.get("scores"))
    shared = [score for score in run.scores if score.name in theirs and number(ours.get(score.name)) is not None]
    if not base:
        return []
    name, below = f"Baseline: {base.get('run', 'a run')}", f"on {text(str(base.get('data', 'unknown')))}"
    if not shared:
        return [card(name, "none yet" if run.running else "no score in common", below)]
    wanted = getattr(run.headline, "name", "").partition("/")[2]
    shared.sort(key=lambda score: (not score.name.startswith("test/"), score.name.partition("/")[2] != wanted))
    first = shared[0]
    gap = ours[first.name] - theirs[first.name]
    unit = " points" if is_share(first) else ""
    below = f"{text(first.name)}; this run: {gap * (100 if unit else 1):+.3g}{unit}<br>{below}"
    return [card(name, figure_text(first, theirs[first.name]), below)]


def tested_card(run: Run, chosen: Series | None) -> list[str]:
    """The score on a test set that was evaluated once, at the end: the run's final result."""
    step = number(run.about.get("tested"))
    tests = [score for score in run.scores if score.name.startswith("test/") and score.values]
    if step is None or not tests:
        return []
    same = [score for score in tests if chosen is not None and score.name[5:] == chosen.name.partition("/")[2]]
    score = next(iter([*same, *tests]))
    which = "best" if number(mapping(run.about.get("best")).get("step")) == step else "last"
    below = f"evaluated once, with the {which} weights, of step {step:,.0f}"
    return [card(score.name.replace("/", " ", 1).capitalize(), figure_text(score, score.values[-1]), text(below))]


def data_card(run: Run) -> str:
    """The data; a sample must not be mistaken for the full set."""
    sizes = {name: number(value) for name, value in mapping(run.about.get("data")).items() if name != "source"}
    words = {"train": "examples to train on", "val": "to validate", "test": "to test"}
    counts = ", ".join(f"{size:,.0f} {words.get(name, name)}" for name, size in sizes.items() if size is not None)
    if "sample" not in run.source:
        return card("Data", run.source, text(counts), kind="text")
    whole = run.source.replace("sample", "").strip() or "the full set"
    notice = f"A small sample, not {whole}: its scores must not be compared with those of {whole}."
    return card("Data", run.source, f"{text(counts)}<br><strong>{text(notice)}</strong>", kind="text notice")


def card(name: str, value: str, below_html: str = "", *, kind: str = "") -> str:
    """A name, a value in large letters, and something below it."""
    kind += " text" if len(value) > 20 or max(map(len, value.split()), default=0) > 9 else ""
    kind += " words" if len(value) > 60 else ""
    below = f'<dd class="small soft">{below_html}</dd>' if below_html else ""
    return f'<div class="{kind}"><dt>{text(name)}</dt><dd class="value">{text(value)}</dd>{below}</div>'


def score_table(run: Run) -> str:
    """All scores, if there are more than the cards show."""
    scores = [score for score in run.scores if score.values]
    if len(scores) < 2:
        return ""
    rows = []
    for score in scores:
        lowest = run.lowest_is_best(score.name)
        best = score.extreme(lowest)
        tested = number(run.about.get("tested")) if score.name.startswith("test/") else None
        step = score.steps[-1] if tested is None else tested  # of the weights, not of the record
        last = [score.name, figure_text(score, score.values[-1]), f"{step:,.0f}"]
        if tested is not None:
            best = None  # it was looked at once
        shown = [figure_text(score, best[1]), f"{best[0]:,}", "lowest" if lowest else "highest"] if best else [""] * 3
        if lowest is None and tested is None:
            shown[2] = "not known"
        rows.append([*last, *shown])
    columns = ["score", "latest" if run.running else "final", "at step", "best", "at step", "best is the"]
    return f"<section><h2>Scores</h2>{table(columns, rows, numeric={1, 2, 3, 4})}</section>"


def curves(run: Run) -> list[dict[str, Any]]:
    """The panels that page.js draws: losses and scores first, then learning rate, norms and speed."""
    return [panel(name, [run.series[member] for member in members]) for name, members in panels_of(run.series).items()]


def panel(name: str, members: Sequence[Series]) -> dict[str, Any]:
    """Metrics of one kind: a colour per network, or per set if there is only one network."""
    percent = all(is_share(series) for series in members)
    networks = list(dict.fromkeys(network_of(series.name) for series in members))
    evaluated = any(not series.name.startswith("train/") for series in members)
    thinned, broken = [], []
    drawn = []
    sets = list(dict.fromkeys(["train", "test", *(set_of(series.name) for series in members)]))
    for series in members:
        points = series.thinned(MAX_POINTS)
        if points is not series:
            thinned.append(f"{series.name} ({len(series.steps):,} records)")
        if num_broken := sum(value is None for value in series.values):
            broken.append(f"{series.name} ({num_broken:,})")
        drawn.append(
            {
                "name": series.name,
                "colour": networks.index(network_of(series.name))
                if len(networks) > 1
                else sets.index(set_of(series.name)),
                "thin": evaluated and series.name.startswith("train/"),
                **points.drawn(100.0 if percent else 1.0),
            }
        )
    notes = [f"Drawn as the lowest and highest of each stretch: {', '.join(thinned)}."] if thinned else []
    notes += [f"Not finite, and left out: {', '.join(broken)}."] if broken else []
    known = [value for series in members for value in series.values if value is not None]
    steep = bool(known) and min(known) > 0 and max(known) > 30 * min(known)
    return {
        "title": LAST_PANELS.get(name, name),
        "unit": "%" if percent else "",
        "log": "loss" in name and steep,
        "series": drawn,
        "notes": notes,
    }


def figures(folder: Path) -> str:
    """The run's figures, embedded; tables and texts as such."""
    paths = [path for path in sorted(folder.glob("*")) if path.is_file() and not path.name.startswith(".")]
    paths.sort(key=lambda path: path.stem == "training")  # last: it repeats the curves above
    found = []
    for path in paths:
        with contextlib.suppress(OSError, csv.Error):  # it is being rewritten, or is not such a file
            if drawn := one_figure(path):
                found.append(drawn)
    if not found:
        return ""
    halves = [drawn for drawn in found if not drawn.wide]
    alone = halves[-1] if len(halves) % 2 else None  # it would leave half of a row empty
    parts = [
        f"<figure{' class=full' if drawn.wide or drawn is alone else ''}>{drawn.inside_html}"
        f"<figcaption>{drawn.caption_html}</figcaption></figure>"
        for drawn in found
    ]
    return f'<section><h2>Figures</h2><div class="columns">{"".join(parts)}</div></section>'


@dataclass(frozen=True)
class Drawn:
    """A figure as HTML with its caption; two that are not wide share a row of the page."""

    inside_html: str
    caption_html: str
    wide: bool = False


def one_figure(path: Path) -> Drawn | None:
    """A file of figures/ as HTML, or nothing for a file of another kind."""
    kind = path.suffix.lower().lstrip(".")
    name = text(path.stem.replace("_", " "))
    link = f'<a href="{address("figures", path.name)}">figures/{text(path.name)}</a>'
    if kind in ("png", "gif"):
        size = path.stat().st_size
        if size > MAX_IMAGE_BYTES:
            return Drawn(f"<p>{link} ({size / 1e6:,.0f} MB, too large to embed)</p>", name)
        content = read_bytes(path, MAX_IMAGE_BYTES)
        width, height = image_size(content)
        # reserve the image's space while the page loads, so that a reload does not jump
        extent = f' width="{width}" height="{height}"' if width and height else ""
        # a plot is shown in dark colours where the page is; a photograph would be its negative
        extent += ' class="inverts"' if PLOT_MARK.encode() in content[:MAX_HEADER_BYTES] else ""
        image = f'<img src="data:image/{kind};base64,{base64.b64encode(content).decode()}" alt="{name}"{extent}>'
        wide = width > 1.8 * height or width > HALF_WIDTH
        return Drawn(image, name, wide=wide and path.stem != "training")
    if kind == "txt":
        said = shortened(path)
        longest = max(map(len, said.splitlines()), default=0)
        return Drawn(f"<pre>{text(said)}</pre>", name, wide=longest > HALF_LINE)
    if kind == "csv":
        head: list[str]
        body: list[list[str]]
        head, *body = [*csv.reader(shortened(path).splitlines()), []]
        rows = [row for row in body if len(row) == len(head)]
        shown = f"the first {MAX_ROWS} of the {len(rows):,} rows" if len(rows) > MAX_ROWS else f"{len(rows):,} rows"
        return Drawn(f'<div class="list">{table(head, rows[:MAX_ROWS])}</div>', f"{name}: {shown} of {link}")
    return None


def shortened(path: Path) -> str:
    """The beginning of a text, MAX_TEXT_BYTES at most; raises OSError if it is not a regular file."""
    with open_regular(path) as file:
        return file.read(MAX_TEXT_BYTES).decode("utf-8", "replace")


def image_size(content: bytes) -> tuple[int, int]:
    """Width and height of a PNG or a GIF; zeros if it is neither."""
    if content.startswith(b"\x89PNG") and len(content) >= 24:
        return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])
    if content.startswith(b"GIF8") and len(content) >= 10:
        return int.from_bytes(content[6:8], "little"), int.from_bytes(content[8:10], "little")
    return 0, 0


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
        "command": shlex.join(command(run.about, run.name)) or None,
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
        parts.append(f'<pre class="command"><code>{text(shlex.join(words))}</code></pre>')
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

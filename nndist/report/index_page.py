"""index.html: all runs of a folder, in a sortable table and a chart that compares them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ..errors import UserError
from ..runs.reading import Run, is_share, number, read_run, run_folders
from .markup import STATES, address, duration, figure_text, moment, page, status_class, text

INDEX_BYTES = 4_000_000  # for the curves of all runs
MAX_POINTS = 300  # of a curve

INDEX_COLUMNS = [
    ("recipe", "name"),
    ("run", "name"),
    ("final score", "number score"),
    ("best", "number"),
    ("data", "text"),
    ("steps", "number"),
    ("training time", "number"),
    ("examples/s", "number"),
    ("device", "text"),
    ("processes", "number"),
    ("status", "state"),
    ("when", "date"),
]


@dataclass(frozen=True)
class Entry:
    """A run in the index: when it was updated, its row, and its thinned curves; None if it can't be read."""

    updated: float
    row: str
    run: Run | None


def entry_of(folder: Path, runs_dir: Path, *, live: bool = False) -> Entry:
    """Reads a run for the index. live: whether its page is served, so that it need not have been written."""
    try:
        run = read_run(folder)
        row = index_row(run, runs_dir, live=live)
        run.series = {name: series.thinned(MAX_POINTS) for name, series in run.series.items()}  # 100 runs fit in memory
        return Entry(run.updated or 0.0, row, run)
    except Exception as error:  # one broken run must not prevent the index
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return Entry(0.0, broken_row(folder, kind + str(error).replace(f"{folder}/", "", 1)), None)


def html_of(runs_dir: Path, *, version: str = "", entry: Callable[[Path], Entry] | None = None) -> str:
    """The complete page over RUNS_DIR/<recipe>/<run>/; raises UserError if there are no runs.

    version: of a page that is served (see live). entry: makes the entry of a run's folder (default: reads it).
    """
    entries = [entry(folder) if entry else entry_of(folder, runs_dir) for folder in run_folders(runs_dir)]
    rows = sorted(((one.updated, one.row) for one in entries), key=lambda row: -row[0])
    runs = [one.run for one in entries if one.run is not None]
    num_recorded = Counter(score.name for run in runs for score in run.scores)
    scores = sorted(num_recorded, key=lambda name: ("loss" in name, -num_recorded[name]))
    metrics = list(dict.fromkeys([*scores, *(name for run in runs for name in run.series)]))
    num_series = sum(len(run.series) for run in runs)
    points = min(MAX_POINTS, max(20, INDEX_BYTES // (24 * max(1, num_series))))
    percent = {name for name in metrics if all(is_share(run.series[name]) for run in runs if name in run.series)}
    data = {
        "page": "index",
        "metrics": metrics,
        "percent": sorted(percent),
        "runs": [
            {
                "key": key_of(run.folder),
                "name": f"{run.recipe} / {run.name}",
                "series": {
                    name: series.thinned(points).drawn(100.0 if name in percent else 1.0)
                    for name, series in run.series.items()
                },
            }
            for run in runs
        ],
        **({"version": version} if version else {}),
    }
    heads = "".join(
        f'<th scope="col"{" class=number" if kind.startswith("number") else ""}'
        f"{' data-first=descending aria-sort=descending' if name == 'when' else ''}>"
        f'<button type="button">{name}</button></th>'
        for name, kind in INDEX_COLUMNS
    )
    title = f"Runs in {runs_dir.absolute().name}"
    body = f"""<header><p class="eyebrow"><span>nndist</span></p><h1>{text(title)}</h1>
<p class="soft">{len(rows)} runs, as they were on {datetime.now():%Y-%m-%d %H:%M:%S}.
Select runs to compare their curves; a heading sorts the table.</p></header>
<section aria-label="Curves"><div class="controls">
<label>curve <select id="metric"></select></label>
<label>against <select id="axis"><option value="step">step</option><option value="epoch">epoch</option></select></label>
<span class="soft" id="missing" role="status"></span></div>
<div class="panel" id="comparison"></div></section>
<section aria-label="Runs"><div class="controls">
<label>filter <input type="search" id="filter" placeholder="recipe, run, data, ..."></label>
<button type="button" id="all">select all shown</button><button type="button" id="none">select none</button>
<span class="soft" id="count" role="status">{len(rows)} of {len(rows)} runs</span></div>
<div class="wide"><table class="runs"><thead><tr><td class="keep"></td>{heads}</tr></thead><tbody>
{chr(10).join(row for _, row in rows)}
</tbody></table></div></section>"""
    return page(title, body, data)


def key_of(folder: Path) -> str:
    """What the row and the curves of a run have in common."""
    return f"{folder.parent.name}/{folder.name}"


def index_row(run: Run, runs_dir: Path, *, live: bool = False) -> str:
    """A run's row; cells with numbers carry their sort key."""
    seconds, processes = number(run.about.get("seconds")), number(run.about.get("world_size"))
    score = run.headline
    final = score.values[-1] if score is not None and score.values else None
    best = score.extreme(run.lowest_is_best(score.name)) if score is not None else None
    name = f"<br><span class='small soft'>{breakable(score.name)}</span>" if score is not None else ""
    device = str(run.about.get("device", ""))
    word = run.ended or STATES.get(run.status, (run.status, ""))[0]
    # why a run stopped early, or failed, is long; the whole of it is in the page and under the mouse
    shown = word.partition(": ")[0]
    status = f'<span class="{status_class(run.status)}" title="{text(run.why_it_failed or word)}">{text(shown)}</span>'
    if why := run.why_it_failed:
        status += f'<br><span class="small soft">{text(why if len(why) <= 80 else why[:80] + "...")}</span>'
    said = "; ".join(" ".join(found.split()) for found in run.headline_texts.values())
    if said:  # the recipe's headline is a text
        score = final = best = None
        name = f'<span class="small soft words" title="{text(said)}">{text(said[:80])}</span>'
    cells = [
        breakable(run.recipe),
        link_to(run.folder, runs_dir, run.name, live=live),
        (None, name)
        if said
        else (final, f"{figure_text(score, final)}{name}" if score is not None and final is not None else ""),
        (best and best[1], figure_text(score, best[1]) if score is not None and best else ""),
        text(run.source),
        (run.last_step, f"{run.last_step:,}"),
        (seconds, duration(seconds) if seconds is not None else ""),
        (run.speed, f"{run.speed:,.0f}" if run.speed is not None else ""),
        f'<span title="{text(device)}">{text(device.split(" x ")[0])}</span>',
        (processes, f"{processes:g}" if processes is not None else ""),
        status,
        (moment(run.updated), moment(run.updated)[:16]),
    ]
    tds = "".join(
        f'<td class="{kind}">{cell}</td>'
        if isinstance(cell, str)
        else f'<td class="{kind}" data-label="{column}" data-sort="{"" if cell[0] is None else cell[0]}">{cell[1]}</td>'
        for (column, kind), cell in zip(INDEX_COLUMNS, cells, strict=True)
    )
    box = (
        f'<input type="checkbox" aria-label="compare {text(run.recipe)} / {text(run.name)}"><span class="mark"></span>'
    )
    return f'<tr data-run="{text(key_of(run.folder))}"><td class="keep">{box}</td>{tds}</tr>'


def broken_row(folder: Path, reason: str) -> str:
    """The row of a run that can't be read: its name and the reason."""
    return (
        '<tr class="broken"><td class="keep"><input type="checkbox" disabled aria-label="can\'t be compared"></td>'
        f'<td class="name">{breakable(folder.parent.name)}</td><td class="name">{breakable(folder.name)}</td>'
        f'<td colspan="{len(INDEX_COLUMNS) - 2}" class="unreadable">unreadable: {text(reason)}</td></tr>'
    )


def link_to(folder: Path, runs_dir: Path, name: str, *, live: bool) -> str:
    """A run's name, linked to its page if it has one."""
    if not live and not (folder / "report.html").exists():
        return breakable(name)
    return f'<a href="{address(*folder.relative_to(runs_dir).parts, "report.html")}">{breakable(name)}</a>'


def breakable(name: str) -> str:
    """A name that may be broken after an underscore or a slash."""
    return re.sub("([_/])", r"\1<wbr>", text(name))

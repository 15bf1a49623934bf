"""report.html: the page of one run, for whoever trained it and for whoever only wants the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..runs.reading import (
    LAST_PANELS,
    Run,
    Series,
    is_share,
    mapping,
    network_of,
    number,
    panels_of,
    set_of,
)
from .markup import STATES, duration, figure_text, moment, page, status_class, table, text
from .run_figures import figures
from .run_tables import checkpoints, facts, launches, layers, step_times

REFRESH_SECONDS = 10  # between reloads of the page of a running run
STALE_SECONDS = 1800  # after which a run that says "running" is probably dead
MAX_POINTS = 2000  # of a curve; an envelope beyond


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

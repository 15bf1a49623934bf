"""What an audit has shown of a run, how surely, and what it has not: a page for whoever has to rely on the run."""

from __future__ import annotations

import getpass
import hashlib
import math
import platform
from datetime import datetime
from pathlib import Path

import torch

from ..files import read_bytes
from ..report import markup
from .audit import Audit
from .replay_page import put

NOT_SHOWN = (
    "that the recipe, its data and its scores are the right ones for a question: read the recipe",
    "where the data came from: only that they are those which the run was begun with, by their fingerprint",
    "figures, texts and the report, which are drawn from the weights and no part of training",
    "that nobody has trained many runs and kept the best: a seed that was chosen is trained honestly, too",
)


def missed(stretches: int, trained_again: int, forged: int) -> float:
    """The probability that none of so many forged stretches was among those that were trained again."""
    if forged > stretches:
        return 0.0
    return math.comb(stretches - forged, trained_again) / math.comb(stretches, trained_again)


def user() -> str:
    """Whose process this is; a container's may have no name, nor one on Windows without its variables."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "an unnamed user"


def write(folder: Path, found: Audit, seed: int) -> Path:
    """Writes the run's page replay/audit.html."""
    name = f"{folder.parent.name}/{folder.name}"
    again, count = len(found.chosen), len(found.stretches)
    verdict = "Everything examined holds." if found.holds else "It does not hold: see what fails below."
    signed = f"{user()} on {platform.node()}, {datetime.now().isoformat(timespec='minutes')}"
    head = (
        f'<header><p class="eyebrow"><span>nndist audit</span></p><h1>{markup.text(name)}</h1>'
        f'<p class="notice"><strong>{verdict}</strong></p>'
        f"<p>{markup.text(f'{again} of {count} stretches were trained again, drawn with seed {seed}.')}</p>"
        + "".join(f'<p class="soft">{markup.text(note)}</p>' for note in found.notes)
        + "</header>"
    )
    rows = [["holds" if held else "FAILS", what, outcome] for what, outcome, held in found.findings]
    shown = f"<section><h2>What was shown</h2>{markup.table(['', 'examined', 'outcome'], rows)}</section>"
    chances = [[str(n), f"{missed(count, again, n):.2f}"] for n in (1, 2, 3, 5, 10) if n <= count]
    columns = ["forged stretches", "chance that none was trained again"]
    said = (
        "A stretch that was trained again with the same bits is what it says: no forged weights come out of training. "
        "One that was not may be forged, with all hashes made to agree."
    )
    surely = f"<section><h2>How surely</h2><p>{said}</p>{markup.table(columns, chances, numeric={0, 1})}</section>"
    left = [f"steps {first:,} to {last:,}" for first, last in found.stretches if (first, last) not in found.chosen]
    lines = [*([f"{', '.join(left)}: not trained again"] if left else []), *NOT_SHOWN]
    items = "".join(f"<li>{markup.text(line)}</li>" for line in lines)
    unshown = f"<section><h2>What was not shown</h2><ul>{items}</ul></section>"
    hashes = [[file, sha256(folder / file)] for file in ("run.json", "recipe.py", "metrics.jsonl")]
    where = f"Audited by {signed}, with torch {torch.__version__} and Python {platform.python_version()}. The run is:"
    bound = f"<section><h2>Signed off</h2><p>{markup.text(where)}</p>"
    bound += f"{markup.table(['file', 'SHA-256'], hashes)}</section>"
    return put(folder, "audit", f"Audit of {name}", "\n".join([head, shown, surely, unshown, bound]), [])


def sha256(path: Path) -> str:
    """The hash of a file; what is wrong if it can't be read."""
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError as error:
        return str(error.strerror)

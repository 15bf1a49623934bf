"""The figures of a run on its page: images embedded, tables and texts as such."""

from __future__ import annotations

import base64
import contextlib
import csv
from dataclasses import dataclass
from pathlib import Path

from ..files import open_regular, read_bytes
from ..runs.reading import (
    PLOT_MARK,
)
from .markup import address, table, text

MAX_IMAGE_BYTES = 10_000_000  # larger images are linked, not embedded
MAX_HEADER_BYTES = 4096  # of a PNG, before its pixels
MAX_TEXT_BYTES = 1_000_000  # of a text or a table
MAX_ROWS = 50  # of a table in figures/
HALF_WIDTH = 1000  # pixels: a wider image is unreadable in half of the page
HALF_LINE = 62  # characters, likewise


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

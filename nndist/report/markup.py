"""HTML: everything from a run passes through `text`, `address` or `embedded`, so it can't become markup."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..runs.reading import Series, is_share

STATES = {
    "running": ("running", "is being trained"),
    "finished": ("finished", "has finished training"),
    "cut": ("cut", "was stopped at --max-steps; the same command without it resumes the run"),
    "preempted": ("stopped", "was stopped by a signal after a save; the same command resumes it"),
    "failed": ("failed", "ended with an error; the same command resumes it from its newest checkpoint"),
}


def text(value: str) -> str:
    """A text, escaped for elements and quoted attributes."""
    return escape(value, quote=True)


def address(*parts: str) -> str:
    """A relative URL of a file."""
    return "./" + "/".join(quote(os.fsencode(part), safe="") for part in parts)


def plain(value: Any) -> str:
    """A JSON value for a person."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) < 10**15:
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) or "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def figure_text(series: Series, value: float | None) -> str:
    """A score for a person; accuracies in percent."""
    if value is None:
        return "not finite"
    return f"{100 * value:.2f} %" if is_share(series) else f"{value:,.5g}"


def duration(seconds: float | None) -> str:
    """Seconds in human-readable form."""
    if seconds is None:
        return "not recorded"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def status_class(status: str) -> str:
    return status if status in STATES else "soft"


def moment(seconds: float | None) -> str:
    """A date and time, in the time zone of whoever writes the page."""
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Iterable[int] = ()) -> str:
    """A table of texts; the columns in `numeric` are right-aligned."""
    right = set(numeric)

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="number"' if place in right else "" for place in range(len(cells)))
        return "".join(f"<{tag}{kind}>{text(cell)}</td>" for kind, cell in zip(kinds, cells, strict=True))

    heads = row(columns, 'th scope="col"').replace("</td>", "</th>")
    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(values: Mapping[str, Any]) -> str:
    """A table of names and values."""
    rows = (f'<tr><th scope="row">{text(str(k))}</th><td>{text(plain(v))}</td></tr>' for k, v in values.items())
    return f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>'


def page(title: str, body: str, data: Mapping[str, Any], *, refresh_seconds: int = 0) -> str:
    """A complete page; its content security policy allows page.js alone to run, and forbids all requests.

    A "version" in the data is that of a page that is served (see live), and may ask its own server for a newer one.
    """
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    itself = "connect-src 'self'; " if "version" in data else ""
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        f"{itself}base-uri 'none'; form-action 'none'"
    )
    reload = f'<noscript><meta http-equiv="refresh" content="{refresh_seconds}"></noscript>' if refresh_seconds else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<link rel="icon" href="data:,">
{reload}
<style>{style}</style>
</head>
<body class="{data["page"]}">
<main>
{body}
</main>
<script type="application/json" id="data">{embedded(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def embedded(data: Any) -> str:
    """JSON for a script element: no character in it is special to HTML or JavaScript."""
    raw = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found.group()):04x}", raw)

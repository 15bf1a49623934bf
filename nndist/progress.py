"""Progress: a bar if somebody is watching, a line every half minute in a pipe or log file."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import textwrap
import warnings
from typing import Any


def watched() -> bool:
    """Whether somebody is watching, at a terminal or in a notebook."""
    kernel = sys.modules.get("ipykernel.zmqshell")
    shell = sys.modules.get("IPython")
    in_notebook = kernel and shell and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"
    return (sys.stderr.isatty() and not piped(sys.stdout)) or bool(in_notebook)


def piped(stream: Any) -> bool:
    """Whether a stream is a pipe, such as to tee: what comes out at its end would meet the bar on one line."""
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):  # closed, or no file
        return False


def fitted(text: str) -> str:
    """Lines for stdout: at a terminal, one that is too long is wrapped, below the text that follows its first word.

    Paths and flags are not broken, and a line that would then still be too long is left as it is.
    """
    if not sys.stdout.isatty():
        return text
    columns = shutil.get_terminal_size().columns
    whole = textwrap.TextWrapper(columns, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False)
    lines = []
    for line in text.split("\n"):
        parts = whole.wrap(line) if len(line) > columns else []
        lines += parts if max(map(len, parts), default=columns + 1) <= columns else [line]
    return "\n".join(lines)


def layout(text: str) -> str:
    """tqdm's `bar_format` as it is for somebody who watches; for a pipe or log file without the bar itself."""
    return text if watched() else text.replace(" {bar}", "")


def bar(total: int | None, title: str, *, shown: bool = True, leave: bool = False, **options: Any) -> Any:
    """A tqdm bar; one that does not stay (`leave`) is not drawn for short work. options: tqdm's.

    If nobody is watching, it is a line every half minute, without carriage returns.
    """
    if not watched():
        line = layout(options.pop("bar_format", LINE))
        options |= {"mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "bar_format": line}
        return _lines()(total=total, desc=title, disable=not shown, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in a notebook without ipywidgets; the bar is then plain text
        from tqdm.auto import tqdm

    options = {"dynamic_ncols": True, "mininterval": 0.2, "delay": 0.0 if leave else 0.5} | options
    return tqdm(total=total, desc=title, disable=not shown, leave=leave, **options)


LINE_SECONDS = 30.0
LINE = "{desc} {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"


def _lines() -> Any:
    from tqdm.std import tqdm

    class Lines(tqdm):
        """tqdm that prints a line instead of drawing a bar."""

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            print(str(self) if msg is None else msg, file=sys.stderr, flush=True)

        def clear(self, nolock: bool = False) -> None:
            """Does nothing: printed lines stay."""

        def close(self) -> None:
            if not getattr(self, "disable", True):
                self.disable = True
                self._decr_instances(self)

    return Lines

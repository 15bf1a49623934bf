"""Progress bars: drawn five times a second where somebody looks on, a line each half minute in a log file."""

from __future__ import annotations

import sys
import warnings
from typing import Any


def watched() -> bool:
    """Whether somebody looks on: at a terminal or in a notebook."""
    kernel = sys.modules.get("ipykernel.zmqshell")
    shell = sys.modules.get("IPython")
    in_notebook = kernel and shell and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"
    return sys.stderr.isatty() or bool(in_notebook)


def bar(total: int | None, title: str, *, shown: bool = True, leave: bool = False, **options: Any) -> Any:
    """A tqdm bar; one that does not stay (`leave`) is not drawn for what takes no time. options: tqdm's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a notebook without ipywidgets; the bar is then one of characters
        from tqdm.auto import tqdm

    interval, delay = (0.2, 0.5) if watched() else (30.0, 30.0)
    options = {"dynamic_ncols": True, "mininterval": interval, "delay": 0.0 if leave else delay} | options
    return tqdm(total=total, desc=title, disable=not shown, leave=leave, **options)

"""The run that a training is compared with (`--compare-with`), as run.json, plan, report and the last lines show it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runs.reading import mapping, number, read_about


def baseline_of(folder: Path | None) -> dict[str, Any]:
    """{"run", "data", "scores"} of the run in a folder, its best model's if it names a best score; {} without a folder.

    Raises UserError if there is no run or it has no scores yet.
    """
    if folder is None:
        return {}
    try:
        about = read_about(folder.expanduser())
    except UserError as error:
        raise UserError(f"--compare-with {error}") from error
    chosen = mapping(mapping(about.get("best")).get("scores")) or mapping(about.get("scores"))
    scores = {str(name): value for name, value in chosen.items() if number(value) is not None}
    if not scores:
        raise UserError(f"--compare-with {folder}: has no scores yet; name a run that has been evaluated")
    run = f"{about.get('recipe', folder.absolute().parent.name)}/{folder.absolute().name}"
    return {"run": run, "data": str(mapping(about.get("data")).get("source", "unknown")), "scores": scores}


def comparison(baseline: Mapping[str, Any], scores: Mapping[str, float]) -> str:
    """The baseline's scores that a run has too, and how far the run is from each; "" if they share none."""
    parts = []
    for name, value in mapping(baseline.get("scores")).items():
        if name in scores:
            parts.append(f"{name} {value:.5g} ({scores[name] - value:+.3g})")
    return "  ".join(parts)

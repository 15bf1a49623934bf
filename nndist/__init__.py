"""nndist: train a tutorial's network as a real run. Names load when they are first used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cli import train
    from .data import Data, Resident, Streamed
    from .errors import Preempted, TrainingError, UserError
    from .loading import evaluate, load_run, predict
    from .metrics import Weighted
    from .recipe import Batch, Classifier, Networks, Objective, Recipe
    from .run import Result
    from .scaling import Scaled, Scaling

__version__ = "0.1.0"

_HOMES = {
    "train": "cli",
    "evaluate": "loading",
    "load_run": "loading",
    "predict": "loading",
    "Result": "run",
    "Data": "data",
    "Resident": "data",
    "Streamed": "data",
    "Weighted": "metrics",
    "Batch": "recipe",
    "Classifier": "recipe",
    "Networks": "recipe",
    "Objective": "recipe",
    "Recipe": "recipe",
    "Scaled": "scaling",
    "Scaling": "scaling",
    "Preempted": "errors",
    "TrainingError": "errors",
    "UserError": "errors",
}
__all__ = [
    "Batch",
    "Classifier",
    "Data",
    "Networks",
    "Objective",
    "Preempted",
    "Recipe",
    "Resident",
    "Result",
    "Scaled",
    "Scaling",
    "Streamed",
    "TrainingError",
    "UserError",
    "Weighted",
    "evaluate",
    "load_run",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nndist' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)

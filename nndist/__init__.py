"""nndist: train a tutorial's network as a real run. Names load when they are first used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import Data, DataConfig, ExampleRandom, ExampleSet, Resident, Streamed, Tensors, scale_images
    from .errors import Preempted, TrainingError, UserError
    from .metrics import Output, Total, Weighted, balanced_weights
    from .prediction import Answers, Inputs
    from .recipe import (
        ACTIVATIONS,
        CELLS,
        Activation,
        Amount,
        Batch,
        Cell,
        Classifier,
        Count,
        Fraction,
        Networks,
        Objective,
        Recipe,
        Scaled,
        Scaling,
        Share,
    )
    from .runs.tracking import History
    from .schedules import ScheduleName
    from .trained.loaded_run import evaluate, load_run, predict
    from .training.api import train
    from .training.run import Result

__version__ = "0.1.0"

_HOMES = {
    "data": "Data DataConfig ExampleRandom ExampleSet Resident Streamed Tensors scale_images",
    "errors": "Preempted TrainingError UserError",
    "metrics": "Output Total Weighted balanced_weights",
    "prediction": "Answers Inputs",
    "recipe": "ACTIVATIONS CELLS Activation Amount Batch Cell Classifier Count Networks Objective Fraction Recipe "
    "Scaled Scaling Share",
    "runs.tracking": "History",
    "schedules": "ScheduleName",
    "trained.loaded_run": "evaluate load_run predict",
    "training.api": "train",
    "training.run": "Result",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = [
    "ACTIVATIONS",
    "CELLS",
    "Activation",
    "Amount",
    "Answers",
    "Batch",
    "Cell",
    "Classifier",
    "Count",
    "Data",
    "DataConfig",
    "ExampleRandom",
    "ExampleSet",
    "Fraction",
    "History",
    "Inputs",
    "Networks",
    "Objective",
    "Output",
    "Preempted",
    "Recipe",
    "Resident",
    "Result",
    "Scaled",
    "Scaling",
    "ScheduleName",
    "Share",
    "Streamed",
    "Tensors",
    "Total",
    "TrainingError",
    "UserError",
    "Weighted",
    "balanced_weights",
    "evaluate",
    "load_run",
    "predict",
    "scale_images",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'nndist' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)

"""The contract of a recipe, loading one from its file, and what a run stores of it."""

from .contract import ACTIVATIONS, CELLS, Activation, Batch, Cell, Classifier, Networks, Objective, Recipe
from .loading import load_recipe
from .scaling import Scaled, Scaling

__all__ = [
    "ACTIVATIONS",
    "CELLS",
    "Activation",
    "Batch",
    "Cell",
    "Classifier",
    "Networks",
    "Objective",
    "Recipe",
    "Scaled",
    "Scaling",
    "load_recipe",
]

"""The contract of a recipe, loading one from its file, and what a run stores of it."""

from .classifier import Classifier
from .contract import ACTIVATIONS, CELLS, Activation, Batch, Cell, Networks, Objective, Recipe
from .fields import Amount, Count, Fraction, Share
from .loading import load_recipe
from .scaling import Scaled, Scaling

__all__ = [
    "ACTIVATIONS",
    "CELLS",
    "Activation",
    "Amount",
    "Batch",
    "Cell",
    "Classifier",
    "Count",
    "Fraction",
    "Networks",
    "Objective",
    "Recipe",
    "Scaled",
    "Scaling",
    "Share",
    "load_recipe",
]

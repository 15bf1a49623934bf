"""Figures of a run: curves, confusion matrices, images and tables, and what generated images are worth."""

from .plots import (
    Table,
    activation_functions,
    classification,
    confusion_matrix,
    csv_text,
    fitted_curve,
    image_grid,
    new_figure,
    panels_of,
    save,
    training,
)

__all__ = [
    "Table",
    "activation_functions",
    "classification",
    "confusion_matrix",
    "csv_text",
    "fitted_curve",
    "image_grid",
    "new_figure",
    "panels_of",
    "save",
    "training",
]

"""Figures of a run: curves, confusion matrices, images and tables, and the quality of generated images."""

from .alignments import alignments
from .photographs import augmentation, saliency
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
    training_images,
)

__all__ = [
    "Table",
    "activation_functions",
    "alignments",
    "augmentation",
    "classification",
    "confusion_matrix",
    "csv_text",
    "fitted_curve",
    "image_grid",
    "new_figure",
    "panels_of",
    "saliency",
    "save",
    "training",
    "training_images",
]

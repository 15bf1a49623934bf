"""Inputs to trained networks and their predictions: files as batches, outputs as tables, JSON and pictures."""

from .answers import Answers
from .inputs import Inputs

__all__ = ["Answers", "Inputs"]

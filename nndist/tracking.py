"""Kept for recipes, those in run folders too, that import it from here; it is `nndist.runs.tracking`."""

from .runs.tracking import History, NullTracker, Record, Tracker

__all__ = ["History", "NullTracker", "Record", "Tracker"]

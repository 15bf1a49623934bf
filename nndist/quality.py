"""Kept for recipes, those in run folders too, that import it from here; it is `nndist.figures.generated_images`."""

from .figures.generated_images import Quality, Reader, image_rows, measure, plane, principal_components, trained_reader

__all__ = ["Quality", "Reader", "image_rows", "measure", "plane", "principal_components", "trained_reader"]

"""The data sets of the recipes: MNIST and its variants, generated sets, small embedded samples."""

from ..data.config import DataConfig

__all__ = ["DataConfig"]

"""The data sets that recipes name: MNIST and its kin, procedural sets, the small embedded samples."""

from ..data.config import DataConfig

__all__ = ["DataConfig"]

"""Examples, the order in which they are visited, and each process's share of them. Imports only the base modules."""

from .config import DataConfig
from .examples import Decode
from .mixed import Mixed
from .randomness import ExampleRandom
from .sets import Data, ExampleSet, Resident, Streamed, Tensors, permutation, scale_images
from .transforms import per_example

__all__ = [
    "Data",
    "DataConfig",
    "Decode",
    "ExampleRandom",
    "ExampleSet",
    "Mixed",
    "Resident",
    "Streamed",
    "Tensors",
    "per_example",
    "permutation",
    "scale_images",
]

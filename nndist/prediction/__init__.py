"""What a person gives to trained networks, and what they answer: files as batches, batches as answers and pictures."""

from .answers import Answers
from .inputs import Inputs

__all__ = ["Answers", "Inputs"]

"""Sequences of different lengths, in batches of similar ones, padded to the longest of each."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .sets import ExampleSet, Tensors, permutation

BATCHES_SORTED = 50  # whose examples are drawn at random and sorted by length together


class Ragged(ExampleSet):
    """Sequences of whole numbers, each with a number that belongs to it, such as a class.

    A batch is (tokens, int64 [k, longest], padded with `padding`; the numbers, int64 [k]; lengths, int64 [k]). In an
    epoch's order neighbours have similar lengths: 50 batches' worth of shuffled examples are sorted by length, and the
    batches shuffled. It is a function of (seed, epoch, batch size) alone, so it is the same on any number of processes.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], numbers: Sequence[int], padding: int = 0):
        self.lengths = torch.tensor([len(sequence) for sequence in sequences])
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int32)
        self.numbers, self.padding = torch.tensor(list(numbers)), padding
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> Ragged:
        there = Ragged([], [], self.padding)
        there.lengths, there.starts, there.tokens = self.lengths, self.starts, self.tokens
        there.numbers, there.device = self.numbers, device
        return there

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensors]:
        for index in indices:
            index = index.cpu()
            lengths = self.lengths[index]
            places = torch.arange(max(1, int(lengths.max())))
            inside = places < lengths.unsqueeze(1)  # [k, longest]
            tokens = torch.full(inside.shape, self.padding)
            tokens[inside] = self.tokens[(self.starts[index].unsqueeze(1) + places)[inside]].long()
            yield tokens.to(self.device), self.numbers[index].to(self.device), lengths.to(self.device)

    def order(self, seed: int, epoch: int, shuffle: bool, batch_size: int) -> Tensor:
        if not shuffle:
            return torch.arange(len(self))
        drawn = permutation(len(self), seed, epoch)
        parts = [part[self.lengths[part].argsort(stable=True)] for part in drawn.split(BATCHES_SORTED * batch_size)]
        by_length = torch.cat(parts)
        whole = len(by_length) // batch_size * batch_size  # a smaller batch stays the last
        batches = by_length[:whole].view(-1, batch_size)
        return torch.cat([batches[permutation(len(batches), seed, epoch)].flatten(), by_length[whole:]])

    def fingerprint(self) -> str:
        """The CRC-32 of all tokens, lengths and numbers."""
        checksum = 0
        for tensor in (self.tokens, self.lengths, self.numbers):
            checksum = zlib.crc32(tensor.numpy().tobytes(), checksum)
        return f"{checksum:08x}"

"""What a recipe's `data` is told of the machine: where files lie, and whether they may be fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where data files lie and which set is asked for; made by the loop, handed to `Recipe.data`.

    directory: folder that holds torchvision's layout (`MNIST/raw/...`).
    source: "auto" (the recipe's own set, else its embedded sample) or a named set, which is then strict.
    download: whether this process may fetch missing files; the others wait for it and then only read.
    progress: whether a download shows a bar.
    num_workers: loader processes of a set that is streamed from disk.
    cache_bytes: disk space in `directory` for what is fetched in parts and given up again.
    """

    directory: Path
    source: str = "auto"
    download: bool = True
    progress: bool = True
    num_workers: int = 2
    cache_bytes: int = 50_000_000_000

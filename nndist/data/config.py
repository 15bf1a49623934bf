"""What a recipe's `data` gets to know: where files are, and whether they may be downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where data files are and which set is requested; passed to `Recipe.data`.

    directory: folder in torchvision's layout (`MNIST/raw/...`).
    source: "auto" (the recipe's own set, else its embedded sample) or a named set, which is then strict.
    download: whether this process may download missing files; the others wait for it and then only read.
    progress: whether a download shows a progress bar.
    num_workers: worker processes for a set that is streamed from disk.
    cache_bytes: disk space in `directory` for shards that are fetched and removed again.
    """

    directory: Path
    source: str = "auto"
    download: bool = True
    progress: bool = True
    num_workers: int = 2
    cache_bytes: int = 50_000_000_000

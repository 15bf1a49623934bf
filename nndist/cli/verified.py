"""A training as `verify` starts it, with what must not be a setting of a run, since it changes what is learned.

python -m nndist.cli.verified RECIPE --without-dropout --examples-to FOLDER [the training's own flags]
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..experiments.examples_taken import write_down
from .main import main


def switch_off_dropout() -> None:
    """Makes dropout the identity: each process draws its own masks, so only then can results agree."""
    import torch

    torch.nn.functional.dropout = lambda input, *_, **__: input
    for kind in (torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d, torch.nn.AlphaDropout):
        kind.forward = lambda self, input: input  # type: ignore[method-assign]


if __name__ == "__main__":
    recipe, without_dropout, examples_to, folder, *flags = sys.argv[1:]
    assert (without_dropout, examples_to) == ("--without-dropout", "--examples-to")
    switch_off_dropout()
    write_down(Path(folder))
    main([recipe, *flags])

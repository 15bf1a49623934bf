"""python -m nndist: the command `nndist`, as launchers of several processes start it."""

import sys
from pathlib import Path

from .cli.main import main


def switch_off_dropout() -> None:
    """Makes dropout the identity: each process draws its own masks, so only then can results agree."""
    import torch

    torch.nn.functional.dropout = lambda input, *_, **__: input
    for kind in (torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d, torch.nn.AlphaDropout):
        kind.forward = lambda self, input: input  # type: ignore[method-assign]


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--without-dropout" in arguments:  # for verify; not a setting of a run, since it changes what is learned
        arguments.remove("--without-dropout")
        switch_off_dropout()
    if "--examples-to" in arguments:  # for verify, too
        from .experiments.examples_taken import write_down

        place = arguments.index("--examples-to")
        write_down(Path(arguments[place + 1]))
        del arguments[place : place + 2]
    main(arguments)

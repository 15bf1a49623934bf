"""python -m nndist: the command `nndist`, as launchers of several processes start it."""

import sys

from .cli.main import main

if __name__ == "__main__":
    main(sys.argv[1:])

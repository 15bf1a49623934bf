"""Prints the script that completes sub-commands, recipes and flags in a shell.

python launch/completion.py bash

This is `nndist completion`.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["completion", *sys.argv[1:]])

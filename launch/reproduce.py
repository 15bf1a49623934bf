"""Trains every recipe as documented, and prints the results.

python launch/reproduce.py                          # all: hours on a laptop

This is `nndist reproduce`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["reproduce", *sys.argv[1:]])

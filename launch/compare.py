"""Compares values of a recipe's fields, or runs: a table over seeds, and curves.

python launch/compare.py recipes/sum_mlp.py --vary lr=0.001,0.003 --seeds 3

This is `nndist compare`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])

"""Writes a commented recipe to start from.

python launch/new.py my_net.py --like mnist_cnn   # like launch/recipes.py's

This is `nndist new`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["new", *sys.argv[1:]])

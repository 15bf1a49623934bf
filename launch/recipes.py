"""Lists the recipes: what they are and what they reach.

python launch/recipes.py

This is `nndist recipes`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["recipes", *sys.argv[1:]])

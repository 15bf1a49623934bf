"""Shows runs in a browser while they train: the curves grow without a reload.

python launch/watch.py runs

This is `nndist watch`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["watch", *sys.argv[1:]])

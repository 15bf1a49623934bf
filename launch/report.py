"""Writes the pages of runs: open them in a browser, no network needed.

python launch/report.py runs                    # runs/index.html, all runs

This is `nndist report`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])

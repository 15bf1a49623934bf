"""Writes the pages of runs: open them in a browser, no network needed.

python launch/report.py runs                    # runs/index.html, all runs
python launch/report.py runs/mnist_cnn/first    # the report.html of one run
"""

import sys

from nndist.cli.commands import report_command

if __name__ == "__main__":
    report_command(sys.argv[1:], __doc__ or "")

"""Says what this machine has, and what a training would choose, for a bug report.

python launch/doctor.py

This is `nndist doctor`.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["doctor", *sys.argv[1:]])

"""Audits a run: its hashes, and stretches of it trained again, bit for bit.

python launch/audit.py runs/mnist_cnn/first

This is `nndist audit`; --help shows more examples.
"""

import sys

from nndist.cli.main import main

if __name__ == "__main__":
    main(["audit", *sys.argv[1:]])

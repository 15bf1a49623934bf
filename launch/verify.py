"""Proves a recipe's promises on this machine: real processes, real kill -9.

python launch/verify.py recipes/mnist_cnn.py --data-source sample
python launch/verify.py my_net.py --steps 100 --kills 8 --lr 0.1
"""

import sys

from nndist.cli.commands import verify_command

if __name__ == "__main__":
    verify_command(sys.argv[1:], __doc__ or "")

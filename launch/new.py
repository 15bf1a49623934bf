"""Writes a commented recipe to start from.

python launch/new.py my_net.py --like mnist_cnn   # like launch/recipes.py's
python launch/new.py my_net.py                    # a small regression
"""

import sys

from nndist.cli.commands import new_command

if __name__ == "__main__":
    new_command(sys.argv[1:], __doc__ or "")

"""Writes a commented recipe to start from.

python launch/new.py my_net.py --like mnist_cnn      # made from a recipe of launch/recipes.py
python launch/new.py my_net.py                       # a small regression
"""

import sys

from nndist.commands import new_command

if __name__ == "__main__":
    new_command(sys.argv[1:], __doc__ or "")

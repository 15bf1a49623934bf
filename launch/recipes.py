"""Lists the recipes, what they are and what they reach: python launch/recipes.py"""

import sys

from nndist.catalogue import recipes_command

if __name__ == "__main__":
    recipes_command(sys.argv[1:])
